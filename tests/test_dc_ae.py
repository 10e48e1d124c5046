"""Video DC-AE equals Open-Sora 2.0's, names, numbers and latents, and takes clips that the original refuses."""

import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from arrays import relative_error, video
from mindspore import Tensor
from tiers import GRAPH_IN_FULL
from tiny_models import DC_AE as TINY

from mg.checkpoints import read_state_dict
from mg.models import create_model
from mg.models.dc_ae.blocks import ResBlock
from mg.models.dc_ae.dc_ae import DC_AE_CONFIG, VideoDCAE
from mg.models.layers.attention import LinearAttention
from mg.models.layers.conv import Conv3d, GroupedPointwiseConv
from mg.models.layers.norm import RMSNorm
from mg.models.layers.precision import set_precision
from mg.models.layers.shortcuts import ChannelsToPixels, PixelsToChannels

DATA = Path(__file__).parent / "data"
ORIGINAL = DATA / "dc_ae" / "weights.safetensors"
TOLERANCE = 1e-4  # of the output's scale


def data(name: str) -> np.ndarray:
    return np.load(DATA / "dc_ae" / f"{name}.npy")


def original(**config) -> VideoDCAE:
    """A tiny model with the weights of the parity data."""
    return create_model("dc_ae", ORIGINAL, **TINY, **config)


@pytest.fixture(scope="module")
def model():
    return original()


# Equal to the original.


@pytest.mark.parametrize("mode", GRAPH_IN_FULL, indirect=True)
def test_encode_and_decode_equal_the_originals(mode):
    model = original()
    assert relative_error(model.encode(Tensor(data("x"))).z, data("z")) < TOLERANCE
    assert relative_error(model.decode(Tensor(data("z"))), data("y")) < TOLERANCE


def test_an_image_equals_the_originals(model):
    image = Tensor(data("x")[:, :, :1])
    assert relative_error(model.encode(image).z, data("image_z")) < TOLERANCE
    assert relative_error(model.decode(Tensor(data("image_z"))), data("image_y")) < TOLERANCE
    assert relative_error(model(image), data("image_y")) < TOLERANCE


@pytest.mark.full
def test_tiles_in_space_and_time_equal_the_originals(model):
    torch = pytest.importorskip("torch")
    x = torch.rand((1, 3, 40, 64, 320), generator=torch.Generator().manual_seed(1)) * 2 - 1  # the data's own x
    model.enable_tiling()
    try:
        assert relative_error(model.encode(Tensor(x.numpy())).z, data("tiled_z")) < TOLERANCE
        y = model.decode(Tensor(data("tiled_z")))
    finally:
        model.disable_tiling()
    assert y.shape == x.shape
    assert relative_error(y[:, :, ::4, ::4, ::4], data("tiled_y_every_4th")) < TOLERANCE


def test_the_default_is_the_released_checkpoint():
    stored = dict(line.split(" ", 1) for line in (DATA / "dc_ae_names.txt").read_text().splitlines())
    shapes = VideoDCAE.weight_shapes(DC_AE_CONFIG)
    nothing = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    found = {name: array.shape for name, array in VideoDCAE.original_weights(nothing, DC_AE_CONFIG).items()}
    assert found == {name: tuple(json.loads(f"[{shape.strip('(),')}]")) for name, shape in stored.items()}
    assert (len(found), sum(map(np.prod, found.values()))) == (339, 459_462_147)
    parts = {name.split(".")[0]: 0 for name in found}
    for name, shape in found.items():
        parts[name.split(".")[0]] += int(np.prod(shape))
    assert parts == {"encoder": 220_439_936, "decoder": 239_022_211}


@pytest.mark.full
def test_the_model_of_full_size_is_built_and_runs():
    model = create_model("dc_ae")
    parameters = list(model.get_parameters())
    assert (len(parameters), sum(p.size for p in parameters)) == (339, 459_462_147)
    assert model(video(1, 3, 4, 32, 32)).shape == (1, 3, 4, 32, 32)


# Clips of any size.


def test_one_latent_frame_is_an_image_unless_more_frames_are_asked_for(model):
    z = model.encode(video(1, 3, 4, 32, 32)).z
    image, clip = model.decode(z), model.decode(z, num_target_frames=4)
    assert image.shape[2] == 1 and clip.shape[2] == 4
    assert np.array_equal(model.decode(z, num_target_frames=1).asnumpy(), image.asnumpy())
    assert np.array_equal(model.decode(z, num_target_frames=3).asnumpy(), clip.asnumpy()[:, :, :3])
    assert not np.allclose(clip.asnumpy()[:, :, :1], image.asnumpy(), atol=1e-3)


# Tiles.


@pytest.mark.full
@pytest.mark.parametrize("frames", [33, 52, 76])
def test_no_frame_is_lost_between_tiles(model, frames):
    """The original gives 49 frames for 52, and 73 for 76."""
    x = video(1, 3, frames, 32, 32)
    model.enable_tiling()
    try:
        z = model.encode(x).z
        assert z.shape == model.latent_shape(x.shape)
        assert model(x).shape == x.shape
        assert model.decode(z, num_target_frames=frames).shape == x.shape
    finally:
        model.disable_tiling()


@pytest.mark.parametrize(
    "frames, tiles",
    [
        (1, {"spatial_tile": 64}),
        (6, {"spatial_tile": 0, "encode_tile": 4, "encode_overlap": 0, "decode_tile": 4, "decode_overlap": 0}),
        pytest.param(
            13,
            {"spatial_tile": 64, "encode_tile": 8, "encode_overlap": 4, "decode_tile": 8, "decode_overlap": 4},
            marks=pytest.mark.full,
        ),
        pytest.param(
            13,
            {"spatial_tile": 96, "spatial_overlap": 64}
            | dict.fromkeys(("encode_tile", "encode_overlap", "decode_tile", "decode_overlap"), 0),
            marks=pytest.mark.full,
        ),
    ],
)
def test_tiles_of_any_size_give_the_untiled_shape(model, frames, tiles):
    x = video(1, 3, frames, 40, 100)
    model.enable_tiling(**tiles)
    try:
        assert model.encode(x).z.shape == model.latent_shape(x.shape)
        assert model(x).shape == x.shape
    finally:
        model.disable_tiling()


def test_tiles_without_overlap_are_clips_of_their_own(model):
    """Not causal and without norms over a clip: a tile alone decides its part. One latent frame of a video stays a
    video, 4 frames."""
    x = video(1, 3, 8, 32, 32)
    model.enable_tiling(encode_tile=4, encode_overlap=0, decode_tile=4, decode_overlap=0, spatial_tile=0)
    try:
        tiled = model(x).asnumpy()
    finally:
        model.disable_tiling()
    parts = [model(x[:, :, i : i + 4]).asnumpy() for i in (0, 4)]
    assert np.array_equal(tiled, np.concatenate(parts, axis=2))


def test_tile_sizes_that_do_not_fit_are_named(model):
    with pytest.raises(ValueError, match="spatial_tile is 100; it must be a positive multiple of 32"):
        model.enable_tiling(spatial_tile=100)
    assert model.tiling is None


# scaling_factor.


def test_encode_divides_by_the_scaling_factor_and_decode_multiplies(model):
    scaled, x = original(scaling_factor=0.5), video(1, 3, 4, 32, 32)
    z = model.encode(x).z
    assert np.allclose(scaled.encode(x).z.asnumpy(), z.asnumpy() / 0.5, rtol=1e-6)
    assert np.allclose(scaled.decode(scaled.encode(x).z).asnumpy(), model.decode(z).asnumpy(), atol=1e-5)
    assert np.allclose(scaled(x).asnumpy(), model(x).asnumpy(), atol=1e-5)


# Precision.


@pytest.mark.parametrize("dtype, bound", [("bf16", 0.02), ("fp16", 0.004)])
def test_low_precision_stays_near_and_gives_fp32(dtype, bound):
    model = create_model("dc_ae", ORIGINAL, dtype, **TINY)
    z, y = model.encode(Tensor(data("x"))).z, model.decode(Tensor(data("z")))
    assert z.dtype == y.dtype == ms.float32
    assert all(p.dtype == ms.float32 for p in model.get_parameters())
    for found, wanted in ((z, data("z")), (y, data("y"))):
        assert 1e-6 < relative_error(found, wanted) < bound  # really low, and no lower than it should be


def attention(q, k, v) -> np.ndarray:
    q, k, v = (array.astype(np.float64) for array in (q, k, v))
    q, k = np.maximum(q, 0), np.maximum(k, 0)
    return v @ k.swapaxes(2, 3) @ q / (k.sum(axis=3, keepdims=True).swapaxes(2, 3) @ q)


def test_linear_attention_equals_its_formula_and_fp16_does_not_overflow():
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 32, 4096)).astype(np.float32) * 30
    wanted = attention(q, k, v)
    heads = [
        Tensor(np.concatenate(head, axis=1).reshape(1, 96, 1, 64, 64))
        for head in zip(*(x.swapaxes(0, 1) for x in (q, k, v)))
    ]
    assert np.maximum(k, 0).sum(axis=3).min() > 32768  # one product with q takes it beyond fp16
    for precision, bound in (("fp32", 1e-5), ("fp16", 1e-5), ("bf16", 0.05)):
        found = set_precision(LinearAttention(32), precision)(*heads)
        assert found.dtype == ms.float32
        assert np.abs(found.asnumpy().reshape(wanted.shape) - wanted).max() < bound * np.abs(wanted).max()


def test_under_bf16_products_are_rounded_and_the_division_is_not():
    qkv = [Tensor(a) for a in np.random.default_rng(0).standard_normal((2, 1, 192, 2, 8, 4)).astype(np.float32)]
    cell = set_precision(LinearAttention(32), "bf16")
    found = cell(*qkv).asnumpy()
    assert not np.array_equal(found, Tensor(found).astype(ms.bfloat16).astype(ms.float32).asnumpy())
    rounded = [a.astype(ms.bfloat16).astype(ms.float32) for a in qkv]
    assert np.array_equal(cell(*rounded).asnumpy(), found)  # its operands are rounded before the products


# Layers.


def test_layers_equal_their_counterparts_in_torch():
    torch = pytest.importorskip("torch")
    cases = [
        (Conv3d(6, 4, 3, (2, 1, 2)), torch.nn.Conv3d(6, 4, 3, (2, 1, 2), 1)),
        (Conv3d(6, 4, 3, bias=False), torch.nn.Conv3d(6, 4, 3, 1, 1, bias=False)),
        (Conv3d(6, 4, 1), torch.nn.Conv3d(6, 4, 1)),
        (GroupedPointwiseConv(6, 3), torch.nn.Conv3d(6, 6, 1, groups=3, bias=False)),
        (Conv3d(6, 6, 5, depthwise=True), torch.nn.Conv3d(6, 6, 5, 1, 2, groups=6)),
    ]
    x = video(2, 6, 3, 5, 7)
    for ours, theirs in cases:
        with torch.no_grad():
            theirs.weight.copy_(torch.from_numpy(ours.weight.asnumpy()))
            if theirs.bias is not None:
                theirs.bias.normal_()
                ours.bias.set_data(Tensor(theirs.bias.numpy()))
            wanted = theirs(torch.from_numpy(x.asnumpy())).numpy()
        assert relative_error(ours(x), wanted) < 1e-5, ours


def test_gradients_of_convolutions_equal_torchs_in_a_batch():
    torch = pytest.importorskip("torch")
    cases = [
        (Conv3d(4, 6, 3, (2, 2, 2)), torch.nn.Conv3d(4, 6, 3, 2, 1)),
        (Conv3d(4, 4, 5, depthwise=True), torch.nn.Conv3d(4, 4, 5, 1, 2, groups=4)),
        (GroupedPointwiseConv(4, 2), torch.nn.Conv3d(4, 4, 1, groups=2, bias=False)),
    ]
    x = video(3, 4, 6, 5, 6)
    for ours, theirs in cases:
        _, gradient = ms.value_and_grad(lambda x: ours(x).square().sum(), 0, ours.weight)(x)
        with torch.no_grad():
            theirs.weight.copy_(torch.from_numpy(ours.weight.asnumpy()))
            if theirs.bias is not None:
                theirs.bias.zero_()
        leaf = torch.from_numpy(x.asnumpy()).requires_grad_()
        theirs(leaf).square().sum().backward()
        assert relative_error(gradient[0], leaf.grad.numpy()) < 1e-5, ours
        assert relative_error(gradient[1], theirs.weight.grad.numpy()) < 1e-5, ours


def test_rms_norm_equals_its_formula():
    norm, x = RMSNorm(8), video(2, 8, 2, 3, 4)
    gamma, beta = np.random.default_rng(1).standard_normal((2, 8, 1, 1, 1)).astype(np.float32)
    norm.gamma.set_data(Tensor(gamma.reshape(8)))
    norm.beta.set_data(Tensor(beta.reshape(8)))
    array = x.asnumpy()
    wanted = array / np.sqrt((array**2).mean(axis=1, keepdims=True) + 1e-5) * gamma + beta
    assert relative_error(norm(x), wanted) < 1e-6


@pytest.mark.parametrize("frames", [1, 2])
def test_pixels_go_to_channels_as_in_torch_and_back(frames):
    torch = pytest.importorskip("torch")
    x = video(2, 3, 4, 6, 8)
    channels = PixelsToChannels(3 * frames * 4, temporal=frames == 2)(x)
    assert channels.shape == (2, 3 * frames * 4, 4 // frames, 3, 4)
    assert np.array_equal(ChannelsToPixels(3)(channels, frames).asnumpy(), x.asnumpy())
    if frames == 1:
        frame = torch.from_numpy(x.asnumpy()[:, :, 2])
        assert np.array_equal(channels.asnumpy()[:, :, 2], torch.nn.functional.pixel_unshuffle(frame, 2).numpy())


def test_an_untrained_residual_branch_starts_near_zero():
    block, x = ResBlock(32), video(1, 32, 2, 8, 8)
    assert np.abs(block.norm.gamma.asnumpy()).max() < 0.1 and block.norm.gamma.asnumpy().std() > 0.01
    assert relative_error(block(x), x.asnumpy()) < 0.2


# Configs that cannot be built.


@pytest.mark.parametrize(
    "config, message",
    [
        ({"encoder_width_list": [32] * 5}, "encoder_width_list is .*; it must be 6 whole numbers above 0"),
        ({"decoder_depth_list": [1, 1, 1, 1, 1, 0]}, "decoder_depth_list is .*; it must be 6 whole numbers above 0"),
        ({"encoder_width_list": [32, 32, 32, 48, 64, 64]}, "the last three must be multiples of 32"),
        ({"decoder_width_list": [32, 32, 32, 32, 64, 512]}, r"4 \* 64 must be a multiple of 512"),
        ({"latent_channels": 48}, "latent_channels is 48; encoder_width_list ends in 64"),
        ({"scaling_factor": 0}, "scaling_factor is 0; it must be a number above 0, or null"),
        ({"latent_chanels": 4}, "dc_ae has no config key 'latent_chanels'; did you mean 'latent_channels'?"),
    ],
)
def test_a_config_that_cannot_be_built_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        create_model("dc_ae", **{**TINY, **config})


def test_a_checkpoint_of_open_soras_names_holds_every_parameter():
    stored = read_state_dict(ORIGINAL)
    config = {**DC_AE_CONFIG, **TINY}
    assert set(VideoDCAE.translate_weights(stored, config)) == set(VideoDCAE.weight_shapes(config))
    assert len(stored) == 138
