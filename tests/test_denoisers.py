"""STDiT, STDiT2, STDiT3 and DiT equal the originals, and keep their other promises."""

import math
from pathlib import Path

import denoisers
import mindspore as ms
import numpy as np
import pytest
from arrays import relative_error
from denoisers import CASES, array, config_of, inputs, original
from mindspore import Tensor, nn, ops
from tiny_models import randomized

from mg import runtime
from mg.diffusion.networks import DENOISERS, TYPES, create_denoiser
from mg.diffusion.networks.blocks import MultiHeadCrossAttention, ScalarEmbedder, hidden_tokens
from mg.diffusion.networks.positions import PositionEmbedding2D
from mg.models.layers.attention import MultiHeadAttention
from mg.models.layers.forms import ascend, set_form
from mg.models.layers.precision import set_precision

NAMES = Path(__file__).parent / "data"
TINY = {"depth": 1, "hidden_size": 24, "num_heads": 2, "caption_channels": 8, "model_max_length": 4}

OF_CLASSES = {"condition": "label_1000", "input_size": [1, 32, 32]}
# Case, output, the masks that went in, and how the network differs from the default.
OUTPUTS = [
    ("stdit", "out", ["mask"], {}),
    ("stdit", "out_masked", ["mask", "x_mask"], {"norm_given_twice": True}),
    ("stdit", "out_masked_single_norm", ["mask", "x_mask"], {}),
    ("stdit2", "out", ["mask"], {}),
    ("stdit2", "out_no_text_mask", [], {}),
    ("stdit2", "out_masked", ["mask", "x_mask"], {"norm_given_twice": True}),
    ("stdit2", "out_masked_norm_first", ["mask", "x_mask"], {"norm_given_twice": True, "qk_norm_legacy": False}),
    ("stdit2", "out_masked_single_norm", ["mask", "x_mask"], {}),
    ("stdit3", "out", ["mask"], {}),
    ("stdit3", "out_masked", ["mask", "x_mask"], {"norm_given_twice": True}),
    ("stdit3", "out_masked_single_norm", ["mask", "x_mask"], {}),
    ("dit_text", "out", [], {}),
    ("dit_label", "out", [], {}),
]


# What the originals give.


@pytest.mark.parametrize("case, output, masks, settings", OUTPUTS)
def test_output_is_the_originals(case, output, masks, settings):
    found = original(case, **settings)(**inputs(case, *masks))
    assert found.dtype == ms.float32 and relative_error(found, array(case, output)) < 1e-4


def test_a_compiled_graph_gives_what_pynative_does():
    network = create_denoiser("stdit2", **TINY)
    randomized(network)
    given = call(network, frames=2, x_mask=Tensor([[True, False], [True, True]]))
    wanted = network(**given).asnumpy()
    runtime.setup("cpu", "graph")
    assert wanted.std() > 0.1 and relative_error(network(**given), wanted) < 1e-5


@pytest.mark.full
@pytest.mark.parametrize("case, output, masks, settings", OUTPUTS)
def test_output_of_every_compiled_graph_is_the_originals(case, output, masks, settings):
    runtime.setup("cpu", "graph")
    assert relative_error(original(case, **settings)(**inputs(case, *masks)), array(case, output)) < 1e-4


@pytest.mark.parametrize("case", ["stdit2", "stdit3"])
def test_positions_are_the_originals(case):
    """Odd sizes among them: the grid is that of the filled latents."""
    x, config = array(case, "x"), config_of(case)
    embed = PositionEmbedding2D(config["hidden_size"], config["input_sq_size"])
    height, width = (Tensor(array(case, name)[:1]) for name in ("height", "width"))
    found = embed(height, width, *(-(-size // 2) for size in x.shape[3:]))
    wanted = array(case, "pos_emb")
    np.testing.assert_allclose(found.asnumpy().reshape(wanted.shape), wanted, atol=1e-5)


@pytest.mark.parametrize("case", ["stdit", "dit_text"])
def test_positions_of_a_fixed_size_are_those_in_the_originals_file(case):
    network, stored = original(case), denoisers.read(case)
    for name in network.settings:
        np.testing.assert_allclose(dict(network.named_weights())[name].asnumpy(), stored[name], atol=1e-6)


@pytest.mark.parametrize("name", ["stdit", "stdit2", "stdit3", "dit", "dit_label"])
def test_names_shapes_and_number_of_parameters_are_the_released_ones(name):
    lines = dict(line.split(" ", 1) for line in (NAMES / f"{name}_names.txt").read_text().splitlines())
    network = DENOISERS.model_class(name.partition("_")[0])
    config = {**network.default_config, **(OF_CLASSES if name == "dit_label" else {})}
    shapes = network.weight_shapes(config)
    assert {name: str(shape) for name, shape in shapes.items()} == lines
    untrained = {*network.settings, "y_embedder.y_embedding"}
    trained = sum(math.prod(shape) for name, shape in shapes.items() if name not in untrained)
    counts = {"stdit": 759_620_768, "stdit2": 767_452_064, "stdit3": 1_207_643_936}
    assert trained == counts.get(name, 674_834_720 if name == "dit_label" else 675_600_800)


@pytest.mark.parametrize("type, name, width, heads, patch", [
    ("STDiT-XL/2", "stdit", 1152, 16, [1, 2, 2]),
    ("STDiT2-XL/2", "stdit2", 1152, 16, [1, 2, 2]),
    ("STDiT3-XL/2", "stdit3", 1152, 16, [1, 2, 2]),
    ("STDiT3-3B/2", "stdit3", 1872, 26, [1, 2, 2]),
    ("DiT-XL/2", "dit", 1152, 16, [1, 2, 2]),
    ("DiT-XL/2x2", "dit", 1152, 16, [2, 2, 2]),
])  # fmt: skip
def test_types_are_the_originals_sizes(type, name, width, heads, patch):
    name_there, sizes = TYPES[type]
    config = {**DENOISERS.model_class(name).default_config, **sizes}
    assert name_there == name and config["depth"] == 28 and set(TYPES) >= {type}
    assert (config["hidden_size"], config["num_heads"], config["patch_size"]) == (width, heads, patch)
    network = create_denoiser(type, **{**TINY, "enable_flashattn": True})
    assert network.config["enable_flash_attn"] and network.config["patch_size"] == patch


def test_trained_parameters_start_as_the_originals_do():
    """STDiT and STDiT2 answer nothing at first, and the temporal half of STDiT3 does nothing."""
    for name in ("stdit", "stdit2"):
        network = create_denoiser(name, **TINY, input_size=[1, 4, 4])
        assert not network(**call(network)).asnumpy().any()
    network = create_denoiser("stdit3", **TINY)
    alone = network(**call(network)).asnumpy()
    assert alone.std() > 0.01
    weights = dict(network.named_weights())
    for layer in ("attn.proj", "cross_attn.proj", "mlp.fc2"):
        assert not weights[f"temporal_blocks.0.{layer}.weight"].asnumpy().any()
        assert weights[f"spatial_blocks.0.{layer}.weight"].asnumpy().any()
    limit = (6 / (24 + 72)) ** 0.5
    assert 0.9 * limit < np.abs(weights["spatial_blocks.0.attn.qkv.weight"].asnumpy()).max() <= limit
    untrained = {"rope.freqs", "y_embedder.y_embedding"}
    assert {name for name, parameter in weights.items() if not parameter.requires_grad} == untrained


def call(network, samples=2, frames=1, **other) -> dict:
    """Inputs of a network of TINY sizes."""
    rng = np.random.default_rng(0)
    shapes = {"x": (samples, 4, frames, 4, 4), "y": (samples, 1, 4, 8)}
    given = {name: Tensor(rng.standard_normal(shape).astype(np.float32)) for name, shape in shapes.items()}
    sizes = {name: Tensor(np.full(samples, 32, np.float32)) for name in network.extra_inputs}
    return {**given, "t": Tensor(np.full(samples, 999, np.float32)), **sizes, **other}


# Promises of our own.


def test_padding_after_a_caption_does_not_matter_and_its_length_compiles_no_graph():
    network, given = original("stdit3"), inputs("stdit3")
    y, mask = given["y"].asnumpy(), np.arange(12) < np.array([[7], [3], [5]])[: given["x"].shape[0]]
    wanted = network(**given, mask=Tensor(mask)).asnumpy()
    shapes, construct = [], network.construct
    network.construct = lambda x, t, y, *rest: shapes.append(y.shape) or construct(x, t, y, *rest)
    short = {**given, "y": Tensor(y[:, :, :7]), "mask": Tensor(mask[:, :7])}
    np.testing.assert_array_equal(network(**short).asnumpy(), wanted)
    assert shapes == [y.shape]
    noisy = np.where(mask[:, None, :, None], y, 1e4).astype(np.float32)
    np.testing.assert_array_equal(network(**{**given, "y": Tensor(noisy)}, mask=Tensor(mask)).asnumpy(), wanted)


def test_a_caption_without_tokens_attends_to_all_of_them():
    network, given = original("stdit2"), inputs("stdit2")
    mask = np.zeros((given["y"].shape[0], given["y"].shape[2]), np.bool_)
    empty = network(**given, mask=Tensor(mask)).asnumpy()
    np.testing.assert_array_equal(empty, network(**given).asnumpy())


def test_no_frame_mask_means_all_frames():
    network, given = original("stdit2"), inputs("stdit2", "mask")
    mask = Tensor(np.ones((given["x"].shape[0], given["x"].shape[2]), np.bool_))
    np.testing.assert_allclose(network(**given, x_mask=mask).asnumpy(), network(**given).asnumpy(), atol=1e-5)


def test_sizes_of_a_half_batch_are_those_of_both_halves():
    """In turn, (a, b, a, b), and not each twice."""
    network, given = original("stdit2"), inputs("stdit2", "mask")
    twice = {name: ops.cat((value, value)) for name, value in given.items()}
    few = {name: given[name] for name in ("mask", *network.extra_inputs)}
    np.testing.assert_array_equal(network(**{**twice, **few}).asnumpy(), network(**twice).asnumpy())


def test_timesteps_and_sizes_are_not_rounded_to_bf16():
    embedder = set_precision(ScalarEmbedder(8), "bf16")
    seen = []
    embedder.mlp.construct = lambda x: seen.append(x.asnumpy()) or x
    embedder(Tensor([999.0, 1000.0, 854.0, 856.0]))
    angles = np.array([999.0, 1000.0, 854.0, 856.0])[:, None] * np.exp(-math.log(10000) * np.arange(128) / 128)
    np.testing.assert_allclose(seen[0], np.concatenate([np.cos(angles), np.sin(angles)], 1), atol=2e-4)


@pytest.mark.full
@pytest.mark.parametrize("dtype, most", [("bf16", 5e-2), ("fp16", 1e-2)])
def test_low_precision_stays_close(dtype, most):
    case = "stdit3"
    network = denoisers.original(case, dtype=dtype)
    found = network(**inputs(case, "mask", "x_mask"))
    assert network.dtype == dtype and found.dtype == ms.float32
    assert 1e-5 < relative_error(found, array(case, "out_masked_single_norm")) < most


@pytest.mark.full
@pytest.mark.parametrize("case", ["stdit", "stdit2", "stdit3", "dit_text"])
def test_gradient_checkpointing_changes_no_gradient(case):
    given = inputs(case) if case.startswith("dit") else inputs(case, "mask", "x_mask")

    def gradients(**settings):
        network = original(case, **settings)
        grad = ms.grad(lambda: (network(**given) ** 2).mean(), None, network.trainable_params())
        return {p.name: g.asnumpy() for p, g in zip(network.trainable_params(), grad())}

    kept, anew = gradients(), gradients(use_recompute=True)
    assert kept.keys() == anew.keys() and len(kept) > 20
    for name in kept:
        np.testing.assert_allclose(anew[name], kept[name], rtol=1e-4, atol=1e-5, err_msg=name)


# Attention on Ascend.


def flash_attention(query, key, value, head_num, attn_mask=None, scalar_value=1.0, input_layout="BSH", **others):
    """What MindSpore's document of `ops.flash_attention_score` says that it takes and gives."""
    b, length, heads, channels = query.shape
    assert not others and input_layout == "BSND" and heads == head_num
    assert channels % 16 == 0 and channels <= 512 and 1 <= b <= 2048
    assert query.dtype == key.dtype == value.dtype and query.dtype in (ms.float16, ms.bfloat16)
    q, k, v = (x.asnumpy().astype(np.float64).transpose(0, 2, 1, 3) for x in (query, key, value))
    scores = q @ k.transpose(0, 1, 3, 2) * scalar_value
    if attn_mask is not None:
        assert attn_mask.dtype == ms.bool_ and attn_mask.shape == (b, 1, length, key.shape[1])
        scores = np.where(attn_mask.asnumpy(), -np.inf, scores)  # True is left out
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    y = (weights / weights.sum(-1, keepdims=True)) @ v
    return Tensor(y.transpose(0, 2, 1, 3).astype(np.float16))


@pytest.mark.parametrize("channels", [72, 24, 16])
@pytest.mark.parametrize("masked", [False, True])
def test_flash_attention_is_the_plain_form(monkeypatch, channels, masked):
    calls = []
    monkeypatch.setattr(ops, "flash_attention_score", lambda *a, **k: calls.append(a) or flash_attention(*a, **k))
    rng = np.random.default_rng(0)
    q, k, v = (Tensor(rng.standard_normal((2, n, 3, channels)).astype(np.float16)) for n in (9, 6, 6))
    hidden = hidden_tokens(Tensor(np.arange(6)[None] < np.array([[2], [5]]))) if masked else None
    plain = set_precision(MultiHeadAttention(flash=True), "fp16")
    flash = set_form(set_precision(MultiHeadAttention(flash=True), "fp16"), "ascend")
    wanted = plain(q, k, v, hidden).asnumpy()
    assert not calls and type(flash) is ascend.MultiHeadAttention
    np.testing.assert_allclose(flash(q, k, v, hidden).asnumpy(), wanted, atol=3e-3)
    assert len(calls) == 1


@pytest.mark.parametrize("flash, dtype, sequences, tokens", [
    (False, "fp16", 2, 9),
    (True, "fp32", 2, 9),  # which the operator does not take
    (True, "fp16", 9, 9),  # no gain, as along time
])  # fmt: skip
def test_flash_attention_is_avoided_where_it_does_not_help(monkeypatch, flash, dtype, sequences, tokens):
    monkeypatch.setattr(ops, "flash_attention_score", None)
    attention = set_form(set_precision(MultiHeadAttention(flash), dtype), "ascend")
    x = Tensor(np.ones((sequences, tokens, 2, 16), np.float32))
    assert attention(x, x, x).shape == (sequences, tokens, 32)


def test_enable_flash_attn_reaches_every_attention():
    for name, flash in (("stdit2", True), ("stdit3", False), ("dit", True)):
        network = create_denoiser(name, **TINY, enable_flash_attn=flash)
        found = [cell for _, cell in network.cells_and_names() if isinstance(cell, MultiHeadAttention)]
        assert found and all(cell.flash == flash for cell in found)


def test_a_lone_token_of_a_caption_has_all_the_weight():
    """One frame along time, one token of a text: there is no softmax, and no fault of one."""
    attention = MultiHeadCrossAttention(8, 2)
    x, y = (Tensor(np.random.default_rng(0).standard_normal(s).astype(np.float32)) for s in ((1, 2, 3, 8), (1, 1, 8)))
    value = attention.kv_linear(y)[:, :, 8:]
    wanted = ops.broadcast_to(attention.proj(value).expand_dims(1), (1, 2, 3, 8)).asnumpy()
    np.testing.assert_allclose(attention(x, y).asnumpy(), wanted, atol=1e-6)


# What is told about what cannot be.


@pytest.mark.parametrize("name, config, message", [
    ("stdit4", {}, "there is no network 'stdit4'; there are STDiT-XL/2, STDiT2-XL/2,"),
    ("stdit2", {"hiden_size": 96}, "stdit2 has no config key 'hiden_size'; did you mean 'hidden_size'?"),
    ("stdit2", {"hidden_size": 64}, "stdit2: hidden_size is 64; it must be a multiple of 48"),
    ("stdit3", {"hidden_size": 60, "num_heads": 20}, "60 channels in 20 heads are an odd number per head"),
    ("stdit3", {"depth": 0}, "stdit3: depth is 0; it must be a whole number above 0"),
    ("stdit", {"input_size": None}, "stdit: input_size is None; it must be three whole numbers, [T, H, W]"),
    ("dit", {"patch_size": [2, 2]}, "dit: patch_size is [2, 2]; it must be three whole numbers, [T, H, W]"),
    ("dit", {"condition": "label_"}, "dit: condition is 'label_'; it must be text or label_N"),
])  # fmt: skip
def test_a_network_that_cannot_be_built_is_one_line(name, config, message):
    with pytest.raises(ValueError) as error:
        create_denoiser(name, **config)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name, wrong, message", [
    ("stdit2", {"fps": None}, "this call of stdit2 lacks fps; besides x, t, y and masks it takes height, width,"),
    ("stdit3", {"ar": Tensor([1.0])}, "this call of stdit3 takes no ar; besides x, t, y and masks it takes height,"),
    ("stdit", {"fps": Tensor([1.0])}, "this call of stdit takes no fps; besides x, t, y and masks it takes nothing"),
    ("stdit3", {"x": Tensor(np.zeros((2, 3, 1, 4, 4)))}, "x has shape (2, 3, 1, 4, 4); it must be (B, 4, T, H, W)"),
    ("stdit", {"x": Tensor(np.zeros((2, 4, 1, 4, 6)))}, "this stdit is for [1, 4, 4], [T, H, W]; build it with that"),
    ("stdit3", {"t": Tensor(np.zeros(3))}, "t has shape (3,); it must have 2 rows, or a divisor of that"),
    ("stdit3", {"y": Tensor(np.zeros((2, 1, 5, 8)))}, "y has shape (2, 1, 5, 8); it must be (B, 1, L, 8), L up to 4"),
    ("stdit3", {"mask": Tensor(np.ones((2, 3)))}, "mask has shape (2, 3); it must be (B, 4), to match y"),
    ("stdit3", {"x_mask": Tensor(np.ones((2, 2)))}, "x_mask has shape (2, 2); it must be (2, 1), (B, T)"),
    ("dit", {"x_mask": Tensor(np.ones((2, 1)))}, "dit takes no frame mask (x_mask): it generates all frames"),
    ("dit", {"mask": Tensor(np.ones((2, 1)))}, "dit takes no caption mask"),
])  # fmt: skip
def test_an_impossible_call_is_one_line(name, wrong, message):
    network = create_denoiser(name, **TINY, input_size=[1, 4, 4])
    given = call(network)
    if name == "dit":
        given["y"] = given["y"][:, :, :1]
    with pytest.raises(ValueError) as error:
        network(**{**given, **wrong})
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("case", CASES)
def test_all_networks_have_the_same_interface(case):
    network = original(case)
    assert isinstance(network, nn.Cell) and (network.in_channels, network.out_channels) == (4, 8)
    assert network.takes_frame_mask == (not case.startswith("dit"))
    null = network.null_caption
    if case == "dit_label":
        np.testing.assert_array_equal(null, [10])
    else:
        np.testing.assert_array_equal(null, denoisers.read(case)["y_embedder.y_embedding"])
