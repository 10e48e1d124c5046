"""What a layer leaves out changes nothing: it and its gradients are those of the papers' form, `plain`, to rounding."""

import mg  # noqa: F401  # isort: skip

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from tiny_models import DC_AE, SMALL_HUNYUAN_VAE, SMALL_TEMPORAL_VAE

from mg import runtime
from mg.models import create_model
from mg.models.layers.attention import DotProductAttention, TemporalAttention
from mg.models.layers.conv import CausalConv3d, Conv3d, FactorizedConv, TemporalConv
from mg.models.layers.forms import set_plain
from mg.models.layers.norm import GroupNorm, RMSNorm
from mg.models.layers.resample import (
    DoublingCausalConv3d,
    DoublingConv3d,
    SpatialUpsample,
    TemporalUpsample,
)

CHANNELS = 4
LAYERS = {
    "spatial upsampling": (lambda: SpatialUpsample(CHANNELS), (2, CHANNELS, 3, 5, 4)),
    "temporal upsampling": (lambda: TemporalUpsample(CHANNELS), (2, CHANNELS, 3, 5, 4)),
    "temporal upsampling with zeros": (lambda: TemporalUpsample(CHANNELS, "zeros"), (2, CHANNELS, 3, 5, 4)),
    "temporal upsampling with zeros of a frame": (lambda: TemporalUpsample(CHANNELS, "zeros"), (2, CHANNELS, 1, 5, 4)),
    "temporal conv of a frame": (lambda: TemporalConv(CHANNELS), (2, CHANNELS, 1, 5, 4)),
    "temporal conv with zeros of a frame": (lambda: TemporalConv(CHANNELS, padding="zeros"), (2, CHANNELS, 1, 5, 4)),
    "temporal conv of stride 2 of a frame": (lambda: TemporalConv(CHANNELS, stride=2), (2, CHANNELS, 1, 5, 4)),
    "factorized 1x1 conv": (lambda: FactorizedConv(CHANNELS, 6, 1), (2, CHANNELS, 3, 5, 4)),
    "temporal attention to a frame": (lambda: TemporalAttention(CHANNELS, 2), (2, CHANNELS, 1, 3, 4)),
    "conv3d of a frame": (lambda: Conv3d(CHANNELS, 6), (2, CHANNELS, 1, 5, 4)),
    "depthwise conv3d of a frame": (lambda: Conv3d(CHANNELS, CHANNELS, 5, depthwise=True), (2, CHANNELS, 1, 5, 4)),
    "conv3d of stride 2 of a frame": (lambda: Conv3d(CHANNELS, 6, stride=(2, 2, 2)), (2, CHANNELS, 1, 6, 4)),
    "causal conv3d of a frame": (lambda: CausalConv3d(CHANNELS, 6), (2, CHANNELS, 1, 5, 4)),
    "causal conv3d with edges of a frame": (
        lambda: CausalConv3d(CHANNELS, 6, padding="replicate"),
        (2, CHANNELS, 1, 5, 4),
    ),
    **{
        f"causal conv3d of {frames} frames doubled by {factors}": (
            lambda factors=factors: DoublingCausalConv3d(CHANNELS, factors),
            (2, CHANNELS, frames, 5, 4),
        )
        for factors in ((1, 2), (2, 1), (2, 2))
        for frames in (1, 3)
    },
}


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
def test_a_layer_gives_what_its_plain_form_gives(name):
    make, shape = LAYERS[name]
    rng = np.random.default_rng(0)
    layer, x = scatter(make(), rng), Tensor(rng.standard_normal(shape, np.float32))
    found = value_and_gradients(layer, x)
    assert_equal(found, value_and_gradients(set_plain(layer), x))


@pytest.mark.parametrize(
    "name", ["spatial upsampling", "temporal upsampling", "causal conv3d of 3 frames doubled by (2, 2)"]
)
def test_a_layer_gives_the_same_in_a_compiled_graph(name):
    make, shape = LAYERS[name]
    rng = np.random.default_rng(0)
    layer, x = scatter(make(), rng), Tensor(rng.standard_normal(shape, np.float32))
    right = layer(x).asnumpy()
    runtime.setup("cpu", "graph")
    assert_equal([layer(x).asnumpy()], [right])
    other = make()
    for mine, theirs in zip(other.get_parameters(), layer.get_parameters()):
        mine.set_data(theirs)
    assert_equal([set_plain(other)(x).asnumpy()], [right])


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("length", [1, 3])
def test_a_doubling_conv3d_gives_what_its_plain_form_gives(frames, length):
    rng = np.random.default_rng(0)
    layer = scatter(DoublingConv3d(CHANNELS, 6), rng)
    x = Tensor(rng.standard_normal((2, CHANNELS, length, 5, 4), np.float32))
    doubled = [value_and_gradients(set_plain(layer, plain), x, frames) for plain in (False, True)]
    assert doubled[0][0].shape == (2, 6, frames * length, 10, 8)
    assert_equal(*doubled)


def test_a_single_frame_is_doubled_to_one_where_both_would_be_alike():
    layer = scatter(TemporalUpsample(CHANNELS), np.random.default_rng(0))
    x = Tensor(np.random.default_rng(1).standard_normal((1, CHANNELS, 1, 3, 4), np.float32))
    one, two = layer(x).asnumpy(), set_plain(layer)(x).asnumpy()
    assert one.shape[2] == 1 and two.shape[2] == 2
    for i in (0, 1):
        np.testing.assert_allclose(two[:, :, i : i + 1], one, atol=1e-5)


@pytest.mark.parametrize(
    "norm, shape",
    [(lambda: GroupNorm(8, 4), (2, 8, 3, 40, 40)), (lambda: RMSNorm(8), (2, 8, 3, 5, 4))],
    ids=["group", "rms"],
)
def test_a_composed_norm_gives_what_the_operators_give(norm, shape):
    """Values far from zero too: squares of deviations are summed, not deviations of squares."""
    rng = np.random.default_rng(0)
    norm = scatter(norm(), rng)
    x = Tensor(rng.standard_normal(shape, np.float32) + 30)
    found = value_and_gradients(norm, x)
    norm.on_cpu = False
    assert_equal(found, value_and_gradients(norm, x), 1e-4)


@pytest.mark.parametrize(
    "make, frames",
    [
        (lambda: Conv3d(8, 6), 5),
        (lambda: Conv3d(8, 6, stride=(2, 2, 2)), 6),
        (lambda: CausalConv3d(8, 6), 5),
        (lambda: CausalConv3d(8, 6, stride=(2, 2, 2)), 6),
        (lambda: CausalConv3d(8, 6, padding="replicate"), 5),
        (lambda: CausalConv3d(8, 6, stride=(2, 1, 1), padding="replicate"), 5),
    ],
    ids=["conv", "conv of stride 2", "causal", "causal of stride 2", "edges", "edges of stride 2"],
)
def test_a_conv3d_on_frames_gives_what_the_operator_gives(make, frames):
    rng = np.random.default_rng(0)
    layer, x = scatter(make(), rng), Tensor(rng.standard_normal((1, 8, frames, 48, 40), np.float32))
    assert layer.in_parts(x)
    found = value_and_gradients(layer, x)
    layer.set_train()
    assert not layer.in_parts(x)
    assert_equal(found, value_and_gradients(layer, x), 1e-5)


def test_attention_in_pieces_gives_what_it_gives_at_once(mode):
    rng = np.random.default_rng(0)
    q, k, v = (Tensor(rng.standard_normal((2, length, 8), np.float32)) for length in (7, 5, 5))
    attention, in_pieces = DotProductAttention(), DotProductAttention()
    in_pieces.most_scores = 2 * 5 * 3  # three queries at once, and the last alone
    np.testing.assert_allclose(in_pieces(q, k, v).asnumpy(), attention(q, k, v).asnumpy(), atol=1e-6)


def test_a_lone_key_has_all_the_weight_and_spoils_no_later_gradient():
    rng = np.random.default_rng(0)

    def gradients(keys):
        q, k, v = (Tensor(rng.standard_normal((2, length, 8), np.float32)) for length in (3, keys, keys))
        attention = DotProductAttention()
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
    found = GroupNorm(4, 1)(Tensor(x)).asnumpy()
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


@pytest.mark.parametrize("frames", [1, 5])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_gives_what_its_plain_form_gives(name, frames):
    """Latents and all frames of the reconstruction; an image's latents decoded to all that they can stand for too."""
    rng = np.random.default_rng(0)
    model = create_model(name, **MODELS[name])
    for parameter in model.get_parameters():  # no branch at zero
        noise = 0.1 * rng.standard_normal(parameter.shape, np.float32)
        parameter.set_data(Tensor(parameter.asnumpy() + noise.astype(np.float32)))
    x = Tensor(rng.uniform(-1, 1, (1, 3, frames, 32, 64)).astype(np.float32))
    mean = model.encode(x).mean
    decoded = [model.decode(mean, n).asnumpy() for n in (frames, None)]
    set_plain(model)
    plain = model.encode(x).mean
    assert_equal([mean.asnumpy()], [plain.asnumpy()], 1e-5)
    assert_equal(decoded, [model.decode(mean, n).asnumpy() for n in (frames, None)], 1e-5)
