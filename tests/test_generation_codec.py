"""Autoencoders below a diffusion model: channels, sizes, frames and scaling are the model's, whichever it is."""

from pathlib import Path

import numpy as np
import pytest
from arrays import relative_error, video
from mindspore import Tensor
from tiny_models import DC_AE, HUNYUAN_VAE, IMAGE_VAE, SMALL_TAE, TEMPORAL_VAE, randomized

from mg.deploy import load
from mg.deploy.export import ExportConfig, export
from mg.generation.codec import LatentCodec, load_codec
from mg.generation.config import AutoencoderSection
from mg.inference.loading import TileFields
from mg.models import create_model

DATA = Path(__file__).parent / "data" / "generation" / "video_autoencoder_kl"
SMALL_DC_AE = {**DC_AE, "scaling_factor": 0.5}

# name, config, frames -> latent frames, pixels of a latent
MODELS = [
    ("image_vae", {**IMAGE_VAE, "ch_mult": [1, 1, 1, 1]}, 5, 5, 8),
    ("tae", SMALL_TAE, 9, 2, 8),
    ("dc_ae", SMALL_DC_AE, 9, 3, 32),
    ("hunyuan_vae", HUNYUAN_VAE, 9, 3, 8),
    ("temporal_vae", TEMPORAL_VAE, 20, 6, 8),
]


def load_array(name: str) -> np.ndarray:
    return np.load(DATA / f"{name}.npy")


@pytest.fixture
def codec():
    """Open-Sora's VideoAutoencoderKL, tiny."""
    return load_codec(AutoencoderSection("VideoAutoencoderKL", str(DATA)), "fp32")


def test_an_image_vae_encodes_and_decodes_videos_as_the_original(codec):
    z = codec.encode(load_array("x"))
    assert relative_error(Tensor(z), load_array("z_mode")) < 1e-5
    assert relative_error(Tensor(codec.decode(z, z.shape[2])), load_array("y")) < 1e-5
    assert (codec.in_channels, codec.cell, codec.chunk) == (4, 8, (1, 1))


def test_samples_of_the_posterior_are_scaled_as_the_original_scales_them(codec):
    z = codec._scaled(codec.model.codec.encode(load_array("x"), load_array("posterior_noise")).z)
    assert relative_error(Tensor(z), load_array("z_sample")) < 1e-5
    one, other = (codec.encode(load_array("x"), seed) for seed in (1, 2))
    assert not np.array_equal(one, other) and np.array_equal(one, codec.encode(load_array("x"), 1))


def test_results_do_not_depend_on_micro_batch_size(codec):
    micro = load_codec(AutoencoderSection("VideoAutoencoderKL", str(DATA), micro_batch_size=2), "fp32")
    assert micro.model.micro_batch_size == 2
    x = load_array("x")
    z = codec.encode(x)
    assert relative_error(Tensor(micro.encode(x)), z) < 1e-5  # rounding, which differs between CPUs
    assert relative_error(Tensor(micro.decode(z, 5)), codec.decode(z, 5)) < 1e-5


@pytest.mark.parametrize(
    "name, config, frames, latents, cell",
    [pytest.param(*m, id=m[0], marks=[pytest.mark.full] * (m[0] not in ("image_vae", "hunyuan_vae"))) for m in MODELS],
)
def test_a_codec_has_the_latents_of_its_model(name, config, frames, latents, cell):
    model = randomized(create_model(name, **config))
    codec = LatentCodec(model)
    size = (frames, 2 * cell, 3 * cell + 1)
    assert codec.latent_size(size) == (latents, 2, 3) and codec.pixel_size(size[1:]) == (2 * cell, 3 * cell)
    x = video(1, 3, frames, *codec.pixel_size(size[1:])).asnumpy()
    z = codec.encode(x)
    assert z.shape == (1, codec.in_channels, latents, 2, 3) and codec.in_channels == model.latent_channels
    assert codec.decode(z, frames).shape == x.shape
    assert relative_error(Tensor(codec.decode(z, frames)), model(Tensor(x)).asnumpy()) < 1e-4  # scaling is undone
    raw = model.posterior(Tensor(x))[0].asnumpy()
    scale, shift = model.config.get("scaling_factor"), model.config.get("shift_factor") or 0
    if not model.applies_scaling:
        np.testing.assert_allclose(z, (raw - shift) * scale, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="at least one"):
        codec.latent_size((frames, cell - 1, cell))


def test_latent_frames_stand_for_frames_as_each_model_counts_them():
    counts = {name: LatentCodec(create_model(name, **config)) for name, config, *_ in MODELS}
    assert counts["image_vae"].frames_of(4) == 4
    assert counts["tae"].frames_of(2) == 16 and counts["dc_ae"].frames_of(2) == 8
    assert counts["hunyuan_vae"].frames_of(3) == 9  # the first frame has a latent of its own
    assert counts["temporal_vae"].frames_of(10) == 34 and counts["temporal_vae"].chunk == (17, 5)
    with pytest.raises(ValueError, match="turns 17 frames into 5 at once; it must be a multiple of 5"):
        counts["temporal_vae"].frames_of(4)


def test_an_autoencoder_is_loaded_by_its_weights_or_open_soras_name(tmp_path):
    create_model("temporal_vae", **TEMPORAL_VAE).save_pretrained(tmp_path)
    section = AutoencoderSection("OpenSoraVAE_V1_2", str(tmp_path), micro_batch_size=2, micro_frame_size=9)
    assert load_codec(section, "fp32").chunk == (9, 3)
    codec = load_codec(AutoencoderSection(from_pretrained=str(tmp_path)), "fp32")
    assert codec.model.name == "temporal_vae" and codec.chunk == (17, 5)


def test_scaling_and_tiles_can_be_set():
    section = AutoencoderSection(from_pretrained=str(DATA), scaling_factor=0.13025, shift_factor=0.5)
    section.enable_tile, section.tiling = True, TileFields(spatial_tile=32)
    codec = load_codec(section, "fp32")
    plain = load_codec(AutoencoderSection(from_pretrained=str(DATA)), "fp32")
    assert codec.model.tiling.spatial_tile == 32 and plain.model.tiling is None
    x = load_array("x")[:, :, :1, :32, :32]
    np.testing.assert_allclose(codec.encode(x), (plain.encode(x) / 0.18215 - 0.5) * 0.13025, rtol=1e-4, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("name, config, frames", [("tae", SMALL_TAE, 16), ("temporal_vae", TEMPORAL_VAE, 17)])
def test_an_exported_autoencoder_works_too(tmp_path, name, config, frames):
    pytest.importorskip("onnxruntime")
    model = randomized(create_model(name, **config))
    model.save_pretrained(tmp_path / "model")
    target = tmp_path / "exported"
    export(ExportConfig(ckpt_path=str(tmp_path / "model"), target=str(target), size=32, spatial_overlap=0))
    codec, own = load_codec(AutoencoderSection(from_pretrained=str(target)), "fp32"), LatentCodec(model)
    assert type(codec.model) is type(load(target))
    assert codec.latent_size((frames, 32, 32)) == own.latent_size((frames, 32, 32)) and codec.chunk == own.chunk
    x = video(1, 3, frames, 32, 32).asnumpy()
    z = codec.encode(x)
    assert z.shape[2:] == codec.latent_size((frames, 32, 32))
    assert codec.decode(z, frames).shape == x.shape
    once, twice = (AutoencoderSection(from_pretrained=str(target), scaling_factor=factor) for factor in (1.0, 2.0))
    if name == "tae":
        np.testing.assert_allclose(
            load_codec(twice, "fp32").encode(x), 2 * load_codec(once, "fp32").encode(x), rtol=1e-5
        )
    else:  # its networks scale
        with pytest.raises(
            ValueError, match="the settings of an exported temporal_vae are fixed; leave scaling_factor out"
        ):
            load_codec(twice, "fp32")
