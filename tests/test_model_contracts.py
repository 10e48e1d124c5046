"""What every model promises, whatever it is made of: sizes, batches, files, precisions.

What is a model's own, its equality with the original above all, is in the file of its name.
"""

import re
from dataclasses import FrozenInstanceError

import mindspore as ms
import numpy as np
import pytest
from arrays import relative_error, video
from mindspore import Tensor
from tiny_models import DC_AE, IMAGE_VAE, SMALL_HUNYUAN_VAE, SMALL_TAE, SMALL_TEMPORAL_VAE, randomized

from mg.checkpoints import CheckpointError
from mg.models import create_model, from_pretrained, list_models, model_class
from mg.models.config import StoredConfig

# Config, and the latent frames that clips on both sides of every boundary have.
CASES = {
    "tae": (SMALL_TAE, {1: 1, 2: 1, 7: 1, 8: 1, 9: 2, 16: 2, 17: 3, 32: 4, 33: 5}),
    "dc_ae": (DC_AE, {1: 1, 3: 1, 4: 1, 5: 2, 9: 3}),
    "temporal_vae": (SMALL_TEMPORAL_VAE, {1: 1, 2: 1, 4: 2, 5: 3, 6: 4, 11: 7}),  # 3 of each chunk of 5 frames
    "hunyuan_vae": (SMALL_HUNYUAN_VAE, {1: 1, 2: 2, 4: 2, 5: 2, 6: 3}),
    "image_vae": (IMAGE_VAE, {1: 1, 2: 2, 3: 3}),
}
SIZES = ((1, 1), (17, 23), (9, 40), (31, 8))
LENGTHS = [(name, frames) for name, (_, lengths) in CASES.items() for frames in lengths]


@pytest.fixture(scope="module", params=CASES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def models():
    """One of each kind, all parameters random, built when it is first asked for."""
    built = {}

    def get(name: str):
        if name not in built:
            built[name] = randomized(create_model(name, **CASES[name][0]))
        return built[name]

    return get


@pytest.fixture(scope="module")
def model(name, models):
    return models(name)


def clip(model, batch: int = 1, seed: int = 0) -> Tensor:
    """A frame and a row more than one latent stands for."""
    c, s = model.temporal_compression, model.spatial_compression
    return video(batch, 3, c + 1, s + 1, s, seed=seed)


def latents(model, shape: tuple[int, ...]) -> Tensor:
    """Of a clip of that shape, but of unit variance: a random encoder's hardly vary, and norms blow up what is lost."""
    return Tensor(np.random.default_rng(1).standard_normal(model.latent_shape(shape), dtype=np.float32))


def test_every_model_is_held_to_these_contracts():
    assert {name for name in list_models() if not name.endswith("convs")} == set(CASES)


# Sizes.


@pytest.mark.parametrize("name, frames", LENGTHS)
def test_any_length_and_size_comes_back(models, name, frames):
    model, s = models(name), models(name).spatial_compression
    height, width = SIZES[frames % len(SIZES)]
    x = video(1, 3, frames, height, width)
    z, mean, logvar = model.encode(x)
    latent_frames = CASES[name][1][frames]
    wanted = (1, model.latent_channels, latent_frames, -(-height // s), -(-width // s))
    assert z.shape == mean.shape == model.latent_shape(x.shape) == wanted
    assert (logvar is None) != model.geometry.has_posterior and (logvar is None or logvar.shape == wanted)
    assert model(x).shape == x.shape
    rows, columns = s * wanted[3], s * wanted[4]
    assert model.decode(z, num_target_frames=frames).shape == (1, 3, frames, rows, columns)
    if not (model.geometry.keeps_images and latent_frames == 1):  # which would be an image
        assert model.decode(z).shape[2] >= frames


def test_missing_frames_rows_and_columns_repeat_the_last_ones(model):
    """Frames where whole groups of them are needed; elsewhere any number is taken as it is."""
    x, s = clip(model), model.spatial_compression
    frames = (model.geometry.lead - x.shape[2]) % model.geometry.frame_multiple
    padded = Tensor(np.pad(x.asnumpy(), [(0, 0), (0, 0), (0, frames), (0, s - 1), (0, 0)], mode="edge"))
    assert np.allclose(model.encode(x).mean.asnumpy(), model.encode(padded).mean.asnumpy(), atol=1e-6)
    assert relative_error(model(x), model(padded).asnumpy()[:, :, : x.shape[2], : s + 1]) < 1e-5


def test_a_video_of_another_shape_is_named(model):
    with pytest.raises(ValueError, match=r"x has shape \(3, 8, 8\); it must be \(B, 3, T, H, W\)"):
        model.encode(video(3, 8, 8))
    wanted = rf"z has shape .*; it must be \(B, {model.latent_channels}, T, H, W\)"
    with pytest.raises(ValueError, match=wanted):
        model.decode(video(1, model.latent_channels + 1, 1, 1, 1))


# Batches.


def test_clips_of_a_batch_do_not_see_each_other(model):
    x = clip(model, batch=2)
    z = latents(model, x.shape)
    mean, y = model.encode(x).mean.asnumpy(), model.decode(z).asnumpy()
    for i in range(2):
        assert relative_error(model.encode(x[i : i + 1]).mean, mean[i : i + 1]) < 1e-5
        assert relative_error(model.decode(z[i : i + 1]), y[i : i + 1]) < 1e-5


# A pass from the outside and from within a training step.


def test_a_surrounding_graph_gets_the_result_of_a_call_from_the_last_convolution(model):
    x = clip(model)
    y = model(x).asnumpy()
    found, z, mean, _ = model.forward(x)
    assert np.array_equal(z.asnumpy(), mean.asnumpy()) and relative_error(found, y) < 1e-5
    h = model.features(model.latents(x)["code"], x.shape[2])
    assert relative_error(model.picture(h, x.shape), y) < 1e-5
    assert model.last_conv in [cell for _, cell in model.cells_and_names()]


def test_the_codec_gives_a_loss_what_a_training_step_gives_it(model):
    x = clip(model)
    noise = latents(model, x.shape)
    wanted = model.latents(x, noise)
    found = model.codec.latents(x.asnumpy(), noise.asnumpy())
    assert set(found) == set(wanted) and (found["target"] is not None) == model.two_stages
    for key, value in wanted.items():
        assert (found[key] is None) == (value is None)
        assert value is None or relative_error(Tensor(found[key]), value.asnumpy()) < 1e-5, key
    y = model.codec.video(wanted["code"].asnumpy(), x.shape)  # norms blow up differences of the code
    assert relative_error(Tensor(y), model.reconstruct(wanted["code"], x.shape).asnumpy()) < 1e-5


# Files.


@pytest.mark.parametrize("file", ["folder", "weights.ckpt", "weights.safetensors"])
def test_what_is_saved_is_read_again_to_the_bit(model, tmp_path, file):
    model.save_pretrained(tmp_path / file) if file == "folder" else model.save_weights(tmp_path / file)
    again = from_pretrained(tmp_path / file)
    assert type(again) is type(model) and again.config == model.config
    for (one, a), (other, b) in zip(model.named_weights(), again.named_weights(), strict=True):
        assert one == other and np.array_equal(a.asnumpy(), b.asnumpy()), one


OTHER_SIZES = {
    "tae": {"z_channels": 8},
    "dc_ae": {"encoder_width_list": [64] * 6},
    "temporal_vae": {"filters": 64},
    "hunyuan_vae": {"block_out_channels": [8, 8, 32]},
    "image_vae": {"ch": 64},
}


def test_weights_of_another_size_are_refused_by_name(model, name, tmp_path):
    model.save_weights(tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=rf"weights.safetensors does not fit this {name}: .*; if its sizes diff"):
        create_model(name, tmp_path / "weights.safetensors", **OTHER_SIZES[name])


def test_weights_of_another_model_are_refused_by_name(model, name, tmp_path):
    model.save_weights(tmp_path / "weights.safetensors")
    other = "tae" if name != "tae" else "dc_ae"
    with pytest.raises(CheckpointError, match=f"holds a model other than '{other}'"):
        create_model(other, tmp_path / "weights.safetensors")


# Configs.


def test_a_config_is_typed_frozen_and_documented_and_reads_as_a_mapping(name):
    config = model_class(name).default_config
    assert isinstance(config, StoredConfig) and dict(config) == config == {**config} and len(config) == len([*config])
    for key, value in config.items():
        assert getattr(config, key) is value
        assert any(re.search(rf"\b{key}\b", each.__doc__ or "") for each in type(config).__mro__), key
        with pytest.raises(FrozenInstanceError):
            setattr(config, key, value)
    with pytest.raises(KeyError):
        config["no_such_key"]


# Precisions.


@pytest.mark.parametrize("dtype, bound", [("bf16", 0.1), ("fp16", 0.02)])
def test_low_precision_stays_near_and_gives_fp32(model, name, dtype, bound):
    low = randomized(create_model(name, dtype=dtype, **CASES[name][0]))
    c, s = model.temporal_compression, model.spatial_compression
    x = video(1, 3, c, max(s, 16), max(s, 16))  # norms over a few values would blow up any difference
    z = latents(model, x.shape)
    for found, wanted in ((low.encode(x).mean, model.encode(x).mean), (low.decode(z), model.decode(z))):
        assert found.dtype == ms.float32
        assert 1e-6 < relative_error(found, wanted.asnumpy()) < bound  # really low, and no lower than it should be
    assert all(p.dtype == ms.float32 for p in low.get_parameters())
    last = low.last_conv.cast(Tensor([1 + 2**-12], ms.float32)).asnumpy()  # fp32 in bf16, where it costs most
    assert last == np.float32(1 + (2**-12 if dtype == "bf16" else 0))
