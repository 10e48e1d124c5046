"""The HunyuanVideo VAE equals diffusers', names, numbers and tiles; its lengths, and what sees what."""

import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from arrays import relative_error, video
from mindspore import Tensor, nn
from tiny_models import HUNYUAN_VAE as TINY
from tiny_models import SMALL_HUNYUAN_VAE as SMALL
from tiny_models import randomized

from mg import runtime
from mg.checkpoints import CheckpointError
from mg.models import create_model, from_pretrained
from mg.models.hunyuan_vae.blocks import Conv, Upsample
from mg.models.hunyuan_vae.hunyuan_vae import HUNYUAN_VAE_CONFIG, HunyuanVAE, factors
from mg.models.layers.attention import CausalAttention, DotProductAttention
from mg.models.layers.conv import CausalConv3d
from mg.models.layers.forms import in_form
from mg.models.layers.resample import DoublingCausalConv3d
from mg.tiling import TilingConfig

DATA = Path(__file__).parent / "data"
TOLERANCE = 1e-4  # of the output's scale


def latents(model, x: Tensor) -> np.ndarray:
    """Such as a clip of x's shape has. Those of a random encoder hardly vary, and norms blow up what they lose."""
    return np.random.default_rng(1).standard_normal(model.latent_shape(x.shape), dtype=np.float32)


class Original:
    """diffusers' AutoencoderKLHunyuanVideo with random parameters, on numpy arrays."""

    def __init__(self, config: dict):
        self.torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
        levels = len(config["block_out_channels"])
        generator = self.torch.Generator().manual_seed(0)
        with self.torch.random.fork_rng():
            self.torch.manual_seed(0)
            self.model = diffusers.AutoencoderKLHunyuanVideo(
                down_block_types=["HunyuanVideoDownBlock3D"] * levels,
                up_block_types=["HunyuanVideoUpBlock3D"] * levels,
                **config,
            ).eval()
        for name, p in self.model.named_parameters():
            if p.ndim == 1:  # biases, and the norms' gains and offsets, which start at 0 and 1
                gain = float("norm" in name and name.endswith("weight"))
                p.data = self.torch.randn(p.shape, generator=generator) * 0.3 + gain
        self.tile(False)

    def tile(self, frames: bool, **tiles: int) -> None:
        """By default it cuts time into tiles; a test says whether it is to."""
        self.model.use_framewise_encoding = self.model.use_framewise_decoding = frames
        self.model.disable_tiling()
        if tiles:
            self.model.enable_tiling(**tiles)

    def moments(self, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
        with self.torch.no_grad():
            posterior = self.model.encode(self.torch.from_numpy(x.asnumpy())).latent_dist
        return posterior.mean.numpy(), posterior.logvar.numpy()

    def decode(self, z: np.ndarray) -> np.ndarray:
        with self.torch.no_grad():
            return self.model.decode(self.torch.from_numpy(z)).sample.numpy()


@pytest.fixture(scope="module")
def original():
    return Original(TINY)


@pytest.fixture(scope="module")
def model(original, tmp_path_factory):
    """The original's weights, read from the folder that diffusers writes."""
    folder = tmp_path_factory.mktemp("diffusers")
    original.model.save_pretrained(folder)
    return from_pretrained(folder)


@pytest.fixture
def paper(model):
    """The same, in the layout and form of the paper, so that its layers can be called one by one."""
    with in_form(model, "paper"):
        yield model


@pytest.fixture(scope="module")
def small():
    return randomized(create_model("hunyuan_vae", **SMALL))


def assert_equal(model, original, x: Tensor) -> None:
    """Encoder and decoder, the latter of latents of unit variance."""
    mean, logvar = original.moments(x)
    encoded = model.encode(x)
    assert encoded.mean.shape == model.latent_shape(x.shape)
    assert relative_error(encoded.mean, mean) < TOLERANCE
    assert relative_error(encoded.logvar, logvar) < TOLERANCE
    z = latents(model, x)
    assert relative_error(model.decode(Tensor(z)), original.decode(z)) < TOLERANCE


# Equal to the original.


@pytest.mark.parametrize("frames", [1, 5, 9, 17])
def test_every_length_equals_diffusers(model, original, frames):
    assert isinstance(model, HunyuanVAE) and TINY.items() <= model.config.items()
    assert_equal(model, original, video(2 if frames == 5 else 1, 3, frames, 24, 40))


def test_graph_mode_equals_diffusers(tmp_path):
    original = Original(SMALL)
    original.model.save_pretrained(tmp_path)
    runtime.setup("cpu", "graph", seed=0)
    assert_equal(from_pretrained(tmp_path), original, video(1, 3, 5, 6, 8))


@pytest.mark.full
def test_graph_mode_equals_diffusers_at_every_level(original, tmp_path):
    original.model.save_pretrained(tmp_path)
    runtime.setup("cpu", "graph", seed=0)
    assert_equal(from_pretrained(tmp_path), original, video(1, 3, 9, 24, 40))


@pytest.mark.parametrize("ratio, changes", [(8, [(2, 2), (2, 2)]), (1, [(2, 1), (2, 1)])])
def test_other_ratios_equal_diffusers(tmp_path, ratio, changes):
    config = {**SMALL, "spatial_compression_ratio": min(ratio, 4), "mid_block_add_attention": ratio == 1}
    assert factors({**HUNYUAN_VAE_CONFIG, **config}) == changes
    original = Original(config)
    original.model.save_pretrained(tmp_path)
    assert_equal(from_pretrained(tmp_path), original, video(1, 3, 5, 8, 12))


def test_the_default_is_the_released_checkpoint():
    stored = dict(line.split(" ", 1) for line in (DATA / "hunyuan_vae_names.txt").read_text().splitlines())
    shapes = HunyuanVAE.weight_shapes(HUNYUAN_VAE_CONFIG)
    nothing = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    found = {name: array.shape for name, array in HunyuanVAE.original_weights(nothing, HUNYUAN_VAE_CONFIG).items()}
    assert found == {name: tuple(json.loads(f"[{shape.strip('(),')}]")) for name, shape in stored.items()}
    sizes = {
        part: sum(int(np.prod(shape)) for name, shape in shapes.items() if name.startswith(part))
        for part in ("encoder.", "decoder.", "")
    }
    assert len(shapes) == 248
    assert sizes == {"encoder.": 100_341_408, "decoder.": 146_136_067, "": 246_478_803}
    assert factors(HUNYUAN_VAE_CONFIG) == [(1, 2), (2, 2), (2, 2)]


def test_parameters_have_their_place_as_their_name(model):
    assert [p.name for p in model.get_parameters()] == [name for name, _ in model.named_weights()]


@pytest.mark.full
def test_the_model_of_full_size_equals_diffusers(tmp_path):
    original = Original(HUNYUAN_VAE_CONFIG)
    original.model.save_pretrained(tmp_path)
    model = from_pretrained(tmp_path)
    parameters = list(model.get_parameters())
    assert (len(parameters), sum(p.size for p in parameters)) == (248, 246_478_803)
    assert_equal(model, original, video(1, 3, 5, 16, 24))


def test_latents_are_the_networks_own_and_their_factor_is_the_callers(small):
    z = small.encode(video(1, 3, 5, 4, 4)).mean
    assert small.unscaled(z) is z and small.config["scaling_factor"] == 0.476986
    assert small.scaling_for(0.3, 2.0, [0.3] * 4, [2.0] * 4) == {"scaling_factor": 0.5}
    assert "shift" not in small.scaling and set(small.scaling_for(0, 1, [], [])) <= set(small.config)


# Lengths and sizes.


# What sees what.


def changed(fn, x: np.ndarray, k: int) -> list[bool]:
    """Which output frames are other ones when frame k is."""
    before = fn(Tensor(x)).asnumpy()
    after = fn(Tensor(np.where(np.arange(x.shape[2]).reshape(1, 1, -1, 1, 1) == k, x + 1, x))).asnumpy()
    return (before != after).any(axis=(0, 1, 3, 4)).tolist()


def test_no_convolution_looks_ahead(paper):
    convolutions = {name: cell for name, cell in paper.cells_and_names() if isinstance(cell, CausalConv3d)}
    assert len(convolutions) == 46
    for name, conv in convolutions.items():
        if isinstance(conv, DoublingCausalConv3d):
            continue  # the next test's
        x = video(1, conv.weight.shape[1], 5, 4, 4).asnumpy()
        for k in range(5):
            first = -(-k // conv.stride[0])  # the first output frame that frame k may reach; its own, where it has one
            differs = changed(conv, x, k)
            assert not any(differs[:first]) and (k % conv.stride[0] or differs[first]), (name, k)


def test_upsampling_keeps_the_first_frame_one_and_looks_no_further(paper):
    ups = [cell for _, cell in paper.cells_and_names() if isinstance(cell, Upsample)]
    assert [up.conv.factors for up in reversed(ups)] == [(1, 2), (2, 2), (2, 2)]
    for up in ups:
        x = video(1, up.conv.weight.shape[1], 3, 2, 4).asnumpy()
        time = up.conv.factors[0]
        assert up(Tensor(x)).shape == (*x.shape[:2], 2 * time + 1, 4, 8)
        assert changed(up, x, 0)[0]
        for k in (1, 2):
            first = time * (k - 1) + 1
            assert changed(up, x, k)[: first + 1] == [False] * first + [True]


def test_attention_sees_its_own_frame_and_earlier_ones():
    attention = randomized(CausalAttention(8, 4))
    attention.norm = nn.Identity()  # it sees the whole clip
    for k in range(4):
        assert changed(attention, video(1, 8, 4, 2, 3).asnumpy(), k) == [i >= k for i in range(4)]


def test_attention_equals_the_masked_one_and_holds_scores_of_one_frame_only(monkeypatch):
    torch, models = pytest.importorskip("torch"), pytest.importorskip("diffusers.models")
    original = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_hunyuan_video")
    make_mask = original.prepare_causal_attention_mask
    ours = randomized(CausalAttention(8, 4))
    theirs = models.attention_processor.Attention(
        8,
        heads=1,
        dim_head=8,
        eps=1e-6,
        norm_num_groups=4,
        residual_connection=True,
        bias=True,
        upcast_softmax=True,
        _from_deprecated_attn_block=True,
    )
    names = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    theirs.load_state_dict(
        {
            f"{names[name]}.{ {'gamma': 'weight', 'beta': 'bias'}.get(parameter, parameter) }": torch.from_numpy(
                p.asnumpy()
            )
            for (name, parameter), p in ((name.split("."), p) for name, p in ours.parameters_and_names())
        }
    )
    sizes, construct = [], DotProductAttention.construct
    monkeypatch.setattr(
        DotProductAttention,
        "construct",
        lambda self, q, k, v: (sizes.append((q.shape, k.shape)), construct(self, q, k, v))[1],
    )
    x = video(2, 8, 3, 2, 5)
    tokens = torch.from_numpy(x.asnumpy()).permute(0, 2, 3, 4, 1).flatten(1, 3)
    with torch.no_grad():
        wanted = theirs(tokens, attention_mask=make_mask(3, 10, torch.float32, "cpu", 2))
    wanted = wanted.unflatten(1, (3, 2, 5)).permute(0, 4, 1, 2, 3).numpy()
    assert relative_error(ours(x), wanted) < 1e-6
    assert sizes == [((2, 10, 8), (2, 10 * (i + 1), 8)) for i in range(3)]


# Tiles.


@pytest.fixture
def tiled(model):
    """A function that tiles the model until the end of the test."""
    yield model.enable_tiling
    model.disable_tiling()


@pytest.mark.parametrize(
    "frames, height, width", [pytest.param(25, 24, 40, marks=pytest.mark.full), (5, 40, 24), (1, 16, 64)]
)
def test_tiles_in_time_and_along_either_side_equal_diffusers(model, original, tiled, frames, height, width):
    """Not along both sides at once: diffusers blends in place, so that at corners a tile counts twice."""
    x = video(1, 3, frames, height, width)
    whole = model.encode(x).mean.asnumpy()
    original.tile(
        True,
        tile_sample_min_num_frames=16,
        tile_sample_stride_num_frames=12,
        tile_sample_min_height=32,
        tile_sample_min_width=32,
        tile_sample_stride_height=24,
        tile_sample_stride_width=24,
    )
    tiled(encode_tile=16, encode_overlap=4, decode_tile=16, decode_overlap=4, spatial_tile=32, spatial_overlap=8)
    try:
        assert_equal(model, original, x)
    finally:
        original.tile(False)
    assert np.abs(model.encode(x).mean.asnumpy() - whole).max() > 1e-3  # tiles make a difference


def test_diffusers_default_tiles_only_time(model, original, tiled):
    original.tile(True)
    tiled(encode_tile=16, encode_overlap=4, decode_tile=16, decode_overlap=4, spatial_tile=0)
    try:
        assert_equal(model, original, video(1, 3, 37, 16, 8))
    finally:
        original.tile(False)


def test_the_default_tiles_are_open_soras(tiled, model):
    tiled()
    assert model.tiling == TilingConfig(64, 16, 64, 16, 256, None, "short")
    said = TilingConfig.from_tile_sizes(4, 8, spatial_tile_size=256, temporal_tile_size=64, tile_overlap_factor=0.25)
    assert model.tiling.encode_axes(4, 8, 1) == said.encode_axes(4, 8, 1)
    assert model.tiling.decode_axes(4, 8, 1) == said.decode_axes(4, 8, 1)


@pytest.mark.parametrize(
    "frames, height, width", [(1, 7, 20), pytest.param(6, 21, 8, marks=pytest.mark.full), (10, 8, 6)]
)
def test_tiles_give_the_untiled_shape(small, frames, height, width):
    x = video(1, 3, frames, height, width)
    shape = small.latent_shape(x.shape)
    small.enable_tiling(encode_tile=4, encode_overlap=0, decode_tile=8, decode_overlap=4, spatial_tile=8)
    try:
        assert small.encode(x).mean.shape == shape
        assert small(x).shape == x.shape
        with pytest.raises(ValueError, match="encode_tile is 6; it must be a positive multiple of 4"):
            small.enable_tiling(encode_tile=6)
    finally:
        small.disable_tiling()


# Precision and training.


def test_an_untrained_posterior_is_certain():
    logvar = create_model("hunyuan_vae", **SMALL).latents(video(1, 3, 5, 4, 4))["logvar"].asnumpy()
    assert np.array_equal(logvar, np.full_like(logvar, -6))


# Layers.


@pytest.mark.parametrize("kernel, stride", [(3, (1, 1, 1)), (3, (1, 2, 2)), (3, (2, 2, 2)), (1, (1, 1, 1))])
def test_convolutions_that_repeat_the_edges_equal_torchs(kernel, stride):
    torch = pytest.importorskip("torch")
    conv = randomized(Conv(3, 4, kernel, stride))
    theirs = torch.nn.Conv3d(3, 4, kernel, stride)
    with torch.no_grad():
        theirs.weight.copy_(torch.from_numpy(conv.weight.asnumpy()))
        theirs.bias.copy_(torch.from_numpy(conv.bias.asnumpy()))
    sides = (kernel // 2,) * 4
    for frames in (1, 5):
        x = video(2, 3, frames, 6, 4)
        leaf = torch.from_numpy(x.asnumpy()).requires_grad_()
        wanted = theirs(torch.nn.functional.pad(leaf, (*sides, kernel - 1, 0), mode="replicate"))
        wanted.square().sum().backward()
        assert relative_error(conv(x), wanted.detach().numpy()) < 1e-5
        gradient = ms.grad(lambda x: conv(x).square().sum())(x)
        assert relative_error(gradient, leaf.grad.numpy()) < 1e-5


def test_an_unknown_padding_is_named():
    with pytest.raises(ValueError, match="padding is 'edge'; it must be zeros or replicate"):
        CausalConv3d(2, 2, padding="edge")


# Configs.


@pytest.mark.parametrize(
    "config, message",
    [
        ({"latent_channels": 0}, "latent_channels is 0; it must be a whole number above 0"),
        ({"block_out_channels": None}, "block_out_channels is None; it must be 3 or more multiples of 4"),
        ({"block_out_channels": [8, 8]}, r"block_out_channels is \[8, 8\]; it must be 3 or more multiples of 4"),
        (
            {"block_out_channels": [8, 8, 18]},
            "block_out_channels is .*; it must be 3 or more multiples of 4, the config's norm_num_groups",
        ),
        ({"temporal_compression_ratio": 8}, "temporal_compression_ratio is 8; it must be 4"),
        ({"spatial_compression_ratio": 8}, "spatial_compression_ratio is 8; it must be one of 1, 2, 4"),
        ({"mid_block_add_attention": None}, "mid_block_add_attention is None; it must be true or false"),
        ({"scaling_factor": None}, "scaling_factor is None; it must be a number above 0"),
        ({"shift_factor": 0.0}, "hunyuan_vae has no config key 'shift_factor'; did you mean 'scaling_factor'?"),
    ],
)
def test_a_config_that_cannot_be_built_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        create_model("hunyuan_vae", **{**SMALL, **config})


def test_the_config_of_diffusers_and_of_tencent_are_read():
    released = HunyuanVAE.original_config(HUNYUAN_VAE_CONFIG)
    assert HunyuanVAE.is_original_config(released) and not HunyuanVAE.is_original_config(HUNYUAN_VAE_CONFIG)
    assert HunyuanVAE.translate_config({**released, "_diffusers_version": "0.32.0"}) == HUNYUAN_VAE_CONFIG
    tencents = {
        "_class_name": "AutoencoderKLCausal3D",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlockCausal3D"] * 4,
        "sample_size": 256,
        "sample_tsize": 64,
        "time_compression_ratio": 4,
        "up_block_types": ["UpDecoderBlockCausal3D"] * 4,
    }
    assert {**HUNYUAN_VAE_CONFIG, **HunyuanVAE.translate_config(tencents)} == HUNYUAN_VAE_CONFIG
    assert HunyuanVAE.translate_config({"_class_name": "AutoencoderKLHunyuanVideo"}) == {}  # all is the default
    with pytest.raises(CheckpointError, match="act_fn is gelu; this VAE only supports silu"):
        HunyuanVAE.translate_config({**released, "act_fn": "gelu"})
    with pytest.raises(CheckpointError, match="down_block_types is .*DownEncoderBlock2D"):
        HunyuanVAE.translate_config({**released, "down_block_types": ["DownEncoderBlock2D"] * 4})
