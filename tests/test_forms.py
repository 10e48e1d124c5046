"""All forms of a layer give what the paper's form gives, and its gradients, to rounding."""

import mg  # noqa: F401  # isort: skip

from functools import partial

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, mint, nn, ops
from tiny_models import DC_AE, SMALL_HUNYUAN_VAE, SMALL_TEMPORAL_VAE

from mg import runtime
from mg.models import create_model
from mg.models.layers.attention import (
    CausalAttention,
    DotProductAttention,
    LinearAttention,
    SpatialAttention,
    TemporalAttention,
)
from mg.models.layers.conv import CausalConv3d, Conv3d, FactorizedConv, GroupedPointwiseConv, SpatialConv, TemporalConv
from mg.models.layers.forms import FORMS, ascend, in_form, pieces, set_form
from mg.models.layers.layout import Enter, Leave, split
from mg.models.layers.norm import GroupNorm, RMSNorm
from mg.models.layers.resample import (
    ChannelsToFrames,
    DoublingCausalConv3d,
    DoublingConv3d,
    SpatialDownsample,
    SpatialUpsample,
    TemporalDownsample,
    TemporalUpsample,
)
from mg.models.layers.resnet import ResnetBlock
from mg.models.layers.shortcuts import AverageChannels, ChannelsToPixels, Gate, PixelsToChannels, RepeatChannels

CHANNELS = 4
CLIP, FRAME = (2, CHANNELS, 3, 6, 4), (2, CHANNELS, 1, 6, 4)
EVEN = (2, CHANNELS, 4, 6, 4)  # frames


def zeros_upsample():
    return TemporalUpsample(CHANNELS, "zeros")


def edges_conv(**options):
    return CausalConv3d(CHANNELS, 6, padding="replicate", **options)


# What makes a layer, and shapes that it takes.
LAYERS = {
    "spatial conv": (lambda: SpatialConv(CHANNELS, 6), CLIP),
    "spatial downsampling": (lambda: SpatialDownsample(CHANNELS), CLIP),
    "spatial upsampling": (lambda: SpatialUpsample(CHANNELS), CLIP),
    "temporal conv": (lambda: TemporalConv(CHANNELS), CLIP, FRAME),
    "temporal conv with zeros": (lambda: TemporalConv(CHANNELS, padding="zeros"), CLIP, FRAME),
    "temporal downsampling": (lambda: TemporalDownsample(CHANNELS), CLIP, EVEN, FRAME),
    "temporal upsampling": (lambda: TemporalUpsample(CHANNELS), CLIP),
    "temporal upsampling with zeros": (zeros_upsample, CLIP, FRAME),
    "factorized conv": (lambda: FactorizedConv(CHANNELS, 6), CLIP, FRAME),
    "factorized 1x1 conv": (lambda: FactorizedConv(CHANNELS, 6, 1), CLIP),
    "conv3d": (lambda: Conv3d(CHANNELS, 6), CLIP, FRAME),
    "conv3d of stride 2": (lambda: Conv3d(CHANNELS, 6, stride=(2, 2, 2)), EVEN, FRAME),
    "conv3d of stride 2 in space": (lambda: Conv3d(CHANNELS, 6, stride=(1, 2, 2)), CLIP),
    "conv3d 1x1x1": (lambda: Conv3d(CHANNELS, 6, 1, bias=False), CLIP, FRAME),
    "depthwise conv3d": (lambda: Conv3d(CHANNELS, CHANNELS, 5, depthwise=True), CLIP, FRAME, (1, CHANNELS, 2, 6, 4)),
    "grouped 1x1x1 conv": (lambda: GroupedPointwiseConv(CHANNELS, 2), CLIP),
    "causal conv3d": (lambda: CausalConv3d(CHANNELS, 6), CLIP, FRAME),
    "causal conv3d of stride 2": (lambda: CausalConv3d(CHANNELS, 6, stride=(2, 1, 1)), EVEN),
    "causal conv3d 1x1x1": (lambda: CausalConv3d(CHANNELS, 6, 1), CLIP),
    "causal conv3d with edges": (edges_conv, CLIP, FRAME, (1, CHANNELS, 2, 6, 4)),
    "causal conv3d with edges, of stride 2": (lambda: edges_conv(stride=(2, 2, 2)), (2, CHANNELS, 5, 6, 4), FRAME),
    **{
        f"causal conv3d doubled by {factors}": (
            lambda factors=factors: DoublingCausalConv3d(CHANNELS, factors),
            CLIP,
            FRAME,
        )
        for factors in ((1, 2), (2, 1), (2, 2))
    },
    "conv3d doubled in space": (lambda: WithFrames(DoublingConv3d(CHANNELS, 6), 1), CLIP, FRAME),
    "conv3d doubled": (lambda: WithFrames(DoublingConv3d(CHANNELS, 6), 2), CLIP, FRAME),
    "group norm": (lambda: GroupNorm(CHANNELS, 2), CLIP, FRAME),
    "rms norm": (lambda: RMSNorm(CHANNELS), CLIP),
    "spatial attention": (lambda: SpatialAttention(CHANNELS, 2), CLIP),
    "temporal attention": (lambda: TemporalAttention(CHANNELS, 2), CLIP, FRAME),
    "causal attention": (lambda: CausalAttention(CHANNELS, 2), CLIP, FRAME),
    "linear attention": (lambda: Halves(LinearAttention(16)), (2, 96, 3, 3, 4)),
    "channels to frames": (ChannelsToFrames, CLIP),
    "average of channels": (lambda: AverageChannels(2), CLIP),
    "repeated channels": (lambda: RepeatChannels(8), CLIP),
    "pixels to channels": (lambda: PixelsToChannels(8, temporal=True), EVEN, FRAME),
    "pixels to channels in space": (lambda: PixelsToChannels(8, temporal=False), CLIP),
    "channels to pixels": (lambda: WithFrames(ChannelsToPixels(2), 2), CLIP),
    "channels to pixels in space": (lambda: WithFrames(ChannelsToPixels(2), 1), CLIP),
    "gate": (Gate, CLIP),
}


class WithFrames(nn.Cell):
    """A layer that is told how many frames become of one."""

    def __init__(self, layer, frames):
        super().__init__()
        self.layer, self.frames = layer, frames

    def construct(self, x):
        return self.layer(x, self.frames)


class Halves(nn.Cell):
    """Linear attention, which takes two inputs, of half the channels each; above zero, as it divides by their sum."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.leave, self.enter = layer, Leave(), Enter()

    def construct(self, x):
        x = ops.abs(self.leave(x)) + 0.1
        first, second = split(x, x.shape[1] // 2, 1)
        return self.layer(self.enter(first), self.enter(second))


class Entered(nn.Cell):
    """A layer between `Enter` and `Leave`."""

    def __init__(self, layer):
        super().__init__()
        self.enter, self.layer, self.leave = Enter(), layer, Leave()

    def construct(self, x):
        return self.leave(self.layer(self.enter(x)))


@pytest.fixture(params=[form for form in FORMS if form != "paper"])
def form(request, monkeypatch):
    """Every form but the paper's; operators that only Ascend has are stood in for."""
    if request.param.startswith("ascend"):
        monkeypatch.setattr(ascend, "conv3d", conv3d_of_a_cpu)
        monkeypatch.setattr(mint.nn.functional, "pad", pad_of_a_cpu)
    return request.param


def conv3d_of_a_cpu(x, weight, bias, stride, padding, groups):
    return ops.conv3d(x, weight, bias, stride, "pad", padding, 1, groups)


def pad_of_a_cpu(x, padding, mode="constant"):
    for axis, (before, behind) in zip((4, 3, 2), zip(padding[::2], padding[1::2])):
        first, last = ops.narrow(x, axis, 0, 1), ops.narrow(x, axis, x.shape[axis] - 1, 1)
        if mode == "constant":
            first, last = first * 0.0, last * 0.0
        x = ops.cat((first,) * before + (x,) + (last,) * behind, axis)
    return x


def scatter(cell, rng):
    """Weights and biases that are nothing special: layers start as the identity, or at zero."""
    for parameter in cell.get_parameters():
        parameter.set_data(Tensor(rng.standard_normal(parameter.shape, np.float32)))
    return cell


def value_and_gradients(cell, *inputs):
    """The output, and the gradients of a sum of it, all outputs weighted otherwise, by the input and the parameters."""

    def weighted(*inputs):
        y = cell(*inputs)
        return (y * Tensor(np.cos(np.arange(y.size, dtype=np.float32)).reshape(y.shape))).sum(), y

    grad = ms.value_and_grad(weighted, 0, list(cell.get_parameters()), has_aux=True)
    (_, y), (by_input, by_parameters) = grad(*inputs)
    return [y.asnumpy(), by_input.asnumpy(), *(g.asnumpy() for g in by_parameters)]


def assert_equal(found, right, tolerance=3e-6):
    assert len(found) == len(right)
    for one, other in zip(found, right):
        assert one.shape == other.shape
        assert np.abs(one - other).max() <= tolerance * max(1.0, np.abs(other).max())


@pytest.mark.parametrize("name", LAYERS)
def test_every_form_of_a_layer_gives_what_the_papers_form_gives(name, form):
    make, *shapes = LAYERS[name]
    rng = np.random.default_rng(0)
    layer = scatter(Entered(make()), rng)
    for shape in shapes:
        x = Tensor(rng.standard_normal(shape, np.float32))
        right = value_and_gradients(set_form(layer, "paper"), x)
        assert_equal(value_and_gradients(set_form(layer, form), x), right, 1e-5)


# What a CPU takes in pieces along time, with what is around them or without.
IN_PIECES = [
    name
    for name in LAYERS
    if not name.startswith(("grouped", "linear", "channels", "average", "repeated", "pixels"))
    and name not in ("temporal downsampling", "factorized 1x1 conv")
    and not name.endswith("of stride 2")
]


@pytest.mark.parametrize("name", IN_PIECES)
def test_a_layer_gives_the_same_in_pieces_along_time(name, joined):
    make, *shapes = LAYERS[name]
    rng = np.random.default_rng(0)
    layer = scatter(Entered(make()), rng)
    for shape in shapes:
        x = Tensor(rng.standard_normal(shape, np.float32))
        right = set_form(layer, "paper")(x).asnumpy()
        set_form(layer, "cpu")
        for frames in (1, 2):
            pieces.most_values = frames * x.size // shape[2]
            assert_equal([layer(x).asnumpy()], [right], 1e-5)
    assert joined


@pytest.fixture
def joined(monkeypatch):
    """An entry for each time that a layer took a clip in pieces."""
    found = []
    monkeypatch.setattr(
        pieces, "_join", lambda *given, join=pieces._join, **along: found.append(1) or join(*given, **along)
    )
    monkeypatch.setattr(pieces, "most_values", pieces.most_values)  # what a test sets goes with it
    return found


BLOCKS = {
    "factorized": FactorizedConv,
    "spatial": lambda inside, outside, kernel_size=3, zero=False: SpatialConv(
        inside, outside, kernel_size, padding=(kernel_size // 2,) * 4
    ),
    "causal": partial(CausalConv3d, padding="replicate"),
}


@pytest.mark.parametrize("conv", BLOCKS)
def test_a_block_runs_large_clips_in_pieces_unless_gradients_are_needed(conv, joined):
    rng = np.random.default_rng(0)
    block = scatter(Entered(ResnetBlock(CHANNELS, 6, 2, BLOCKS[conv])), rng)
    x = Tensor(rng.standard_normal((2, CHANNELS, 5, 6, 4), np.float32))
    right = value_and_gradients(set_form(block, "paper"), x)
    set_form(block, "cpu")
    pieces.most_values = x.size // 5
    assert_equal([block(x).asnumpy()], right[:1], 1e-5)
    assert joined
    joined.clear()
    assert_equal(value_and_gradients(block, x), right, 1e-4)
    block.set_train()
    assert_equal([block(x).asnumpy()], right[:1], 1e-5)
    assert not joined


@pytest.mark.parametrize(
    "name", ["temporal conv", "spatial upsampling", "temporal upsampling", "causal conv3d doubled by (2, 2)"]
)
def test_a_layer_gives_the_same_in_a_compiled_graph(name):
    make, shape, *_ = LAYERS[name]
    rng = np.random.default_rng(0)
    layer, x = scatter(Entered(make()), rng), Tensor(rng.standard_normal(shape, np.float32))
    right = layer(x).asnumpy()
    runtime.setup("cpu", "graph")
    for form in ("cpu", "export"):
        other = set_form(Entered(make()), form)
        for mine, theirs in zip(other.get_parameters(), layer.get_parameters()):
            mine.set_data(theirs)
        assert_equal([other(x).asnumpy()], [right])


def test_a_single_frame_is_not_doubled_if_both_would_be_equal():
    layer = scatter(TemporalUpsample(CHANNELS), np.random.default_rng(0))
    x = Tensor(np.random.default_rng(1).standard_normal(FRAME, np.float32))
    two = layer(x).asnumpy()
    for form in ("cpu", "export"):
        one = set_form(Entered(layer), form)(x).asnumpy()
        assert one.shape[2] == 1 and two.shape[2] == 2
        for i in (0, 1):
            np.testing.assert_allclose(two[:, :, i : i + 1], one, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_a_norm_of_values_far_from_zero_is_exact_on_a_cpu(training):
    """Squares of deviations are summed, not deviations of squares; and large inputs are normalised in parts."""
    rng = np.random.default_rng(0)
    norm = scatter(Entered(GroupNorm(8, 4)), rng)
    x = Tensor(rng.standard_normal((2, 8, 3, 40, 40), np.float32) + 30)
    right = value_and_gradients(set_form(norm, "paper"), x)
    set_form(norm, "cpu").set_train(training)
    assert norm.layer.in_parts(x) is not training
    assert_equal(value_and_gradients(norm, x), right, 1e-4)


def test_a_form_keeps_the_parameters_and_precision_of_every_layer():
    model = create_model("dc_ae", dtype="fp16", **DC_AE)
    names = [p.name for p in model.get_parameters()]
    kinds = [type(cell) for _, cell in model.cells_and_names() if type(cell) in FORMS["cpu"].values()]
    for form in FORMS:
        set_form(model, form)
        assert [p.name for p in model.get_parameters()] == names
        assert model.encoder.project_in.cast.dtype == ms.float16
    set_form(model)
    assert [type(cell) for _, cell in model.cells_and_names() if type(cell) in FORMS["cpu"].values()] == kinds


def test_a_model_is_built_in_the_form_of_its_device(monkeypatch):
    def form_of(device):
        monkeypatch.setattr(runtime, "device", lambda: device)
        model = create_model("image_vae", **MODELS["image_vae"])
        kinds = {type(cell) for _, cell in model.cells_and_names()}
        return [form for form, table in FORMS.items() if table and set(table.values()) & kinds]

    assert form_of("cpu") == form_of("gpu") == ["cpu"]
    assert form_of("ascend") == ["ascend", "ascend_folded"]


def test_an_unknown_form_is_named():
    with pytest.raises(ValueError, match="form is 'plain'; it must be one of paper, cpu, ascend"):
        set_form(GroupNorm(4, 2), "plain")


def test_a_form_ends_with_its_block_whatever_happens():
    conv = set_form(SpatialConv(3, 3), "cpu")
    before = type(conv)
    with pytest.raises(KeyError), in_form(conv, "export"):
        assert type(conv) is FORMS["export"][SpatialConv]
        raise KeyError
    assert type(conv) is before


def test_attention_in_pieces_gives_what_it_gives_at_once(mode):
    rng = np.random.default_rng(0)
    q, k, v = (Tensor(rng.standard_normal((2, length, 8), np.float32)) for length in (7, 5, 5))
    for channels_last in (True, False):
        if not channels_last:
            q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        attention, in_pieces = DotProductAttention(channels_last), DotProductAttention(channels_last)
        in_pieces.most_scores = 2 * 5 * 3  # three queries at once, and the last alone
        np.testing.assert_allclose(in_pieces(q, k, v).asnumpy(), attention(q, k, v).asnumpy(), atol=1e-6)


def test_a_lone_key_has_all_the_weight_and_spoils_no_later_gradient():
    rng = np.random.default_rng(0)

    def gradients(keys):
        q, k, v = (Tensor(rng.standard_normal((2, length, 8), np.float32)) for length in (3, keys, keys))
        attention = DotProductAttention(channels_last=True)
        weights = Tensor(rng.standard_normal((2, 3, 8), np.float32))
        grad = ms.grad(lambda q, k, v: (attention(q, k, v) * weights).sum(), (0, 1, 2))
        return (attention(q, k, v) - v[:, :1]).asnumpy(), weights.asnumpy(), [g.asnumpy() for g in grad(q, k, v)]

    difference, weights, (by_q, by_k, by_v) = gradients(1)
    assert not difference.any() and not by_q.any() and not by_k.any()
    np.testing.assert_allclose(by_v, weights.sum(axis=1, keepdims=True), atol=1e-5)
    _, _, (by_q, by_k, _) = gradients(4)
    assert np.abs(by_q).max() > 0.1 and np.abs(by_k).max() > 0.1
    assert np.abs(by_k.sum(axis=1)).max() < 1e-5  # the same added to all keys moves no weight


def test_the_norm_of_a_large_clip_is_exact():
    """Millions of values to a group, which must not be summed up one by one in fp32."""
    x = np.random.default_rng(0).standard_normal((1, 4, 16, 256, 256), np.float32) + 2
    found = set_form(Entered(GroupNorm(4, 1)), "cpu")(Tensor(x)).asnumpy()
    right = (x - x.mean(dtype=np.float64)) / x.std(dtype=np.float64)
    assert np.abs(found - right).max() < 1e-5


MODELS = {
    "tae": {
        "ch": 8,
        "norm_num_groups": 4,
        "num_res_blocks": 1,
        "ch_mult": [1, 2],
        "temporal_downsample_level": [0],
        "temporal_upsample_level": [1],
    },
    "image_vae": {"ch": 8, "norm_num_groups": 4, "num_res_blocks": 1, "ch_mult": [1, 2]},
    "dc_ae": DC_AE,
    "temporal_vae": SMALL_TEMPORAL_VAE,
    "hunyuan_vae": SMALL_HUNYUAN_VAE,
}


@pytest.mark.parametrize("frames", [pytest.param(1, marks=pytest.mark.full), 5])
@pytest.mark.parametrize("name", MODELS)
def test_every_form_of_a_model_gives_what_the_papers_form_gives(name, frames, form):
    """Latents and all frames of the reconstruction; an image's latents decoded to all that they can stand for too."""
    rng = np.random.default_rng(0)
    model = create_model(name, **MODELS[name])
    for parameter in model.get_parameters():  # no branch at zero
        noise = 0.1 * rng.standard_normal(parameter.shape, np.float32)
        parameter.set_data(Tensor(parameter.asnumpy() + noise.astype(np.float32)))
    x = Tensor(rng.uniform(-1, 1, (1, 3, frames, 32, 64)).astype(np.float32))
    set_form(model, "paper")
    mean = model.encode(x).mean
    decoded = [model.decode(mean, n).asnumpy() for n in (frames, None)]
    set_form(model, form)
    assert_equal([model.encode(x).mean.asnumpy()], [mean.asnumpy()], 1e-5)
    assert_equal([model.decode(mean, n).asnumpy() for n in (frames, None)], decoded, 1e-5)
