"""The TAE equals its originals: diffusers' image VAE where it was inflated from one, and mindone's TAE everywhere."""

import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from arrays import relative_error
from tiers import GRAPH_IN_FULL

from mg.models import create_model, from_pretrained
from mg.models.image_vae.image_vae import ImageAutoencoder
from mg.models.tae.inflation import inflate
from mg.models.tae.tae import TAE_CONFIG, TemporalAutoencoder

DATA = Path(__file__).parent / "data"
TOLERANCE = 1e-4  # of the output's scale
TINY = {**TAE_CONFIG, "ch": 32, "ch_mult": [1, 1, 2, 2], "num_res_blocks": 1, "z_channels": 4}


def image_vae(config: dict):
    """diffusers' AutoencoderKL of the config's architecture, its weights and norms random."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    levels = len(config["ch_mult"])
    vae = diffusers.AutoencoderKL(
        block_out_channels=[config["ch"] * m for m in config["ch_mult"]],
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        layers_per_block=config["num_res_blocks"],
        latent_channels=config["z_channels"],
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    for name, parameter in vae.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.2)
    return vae


def reference(vae, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moments and reconstruction of (N, 3, H, W) by diffusers, each with a frame axis: (N, C, 1, H, W)."""
    import torch

    with torch.no_grad():
        posterior = vae.encode(torch.from_numpy(images)).latent_dist
        decoded = vae.decode(posterior.mean).sample
    return posterior.parameters.numpy()[:, :, None], decoded.numpy()[:, :, None]


def inflated(vae, config: dict, dtype: str = "fp32") -> TemporalAutoencoder:
    state, _ = inflate({name: p.numpy() for name, p in vae.state_dict().items()}, config)
    model = TemporalAutoencoder(config, dtype=dtype)
    for name, parameter in model.named_weights():
        parameter.set_data(ms.Tensor(state[name]))
    return model


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


@pytest.fixture(scope="module")
def tiny_vae():
    return image_vae(TINY)


@pytest.mark.parametrize("mode", GRAPH_IN_FULL, indirect=True)
def test_inflated_tae_equals_the_image_vae_on_images(tiny_vae, mode):
    model, x = inflated(tiny_vae, TINY), images(2, 3, 40, 24)
    moments, decoded = reference(tiny_vae, x)
    _, mean, logvar = model.encode(ms.Tensor(x[:, :, None]))
    assert relative_error(mean, moments[:, :4]) < TOLERANCE
    assert relative_error(logvar, moments[:, 4:]) < TOLERANCE
    y = model.decode(ms.Tensor(moments[:, :4]), num_target_frames=1)
    assert relative_error(y, decoded) < TOLERANCE


def test_still_clip_reconstructs_to_the_image_in_every_frame(tiny_vae):
    model, x = inflated(tiny_vae, TINY), images(1, 3, 16, 24)
    _, decoded = reference(tiny_vae, x)
    y = model(ms.Tensor(x[:, :, None].repeat(16, axis=2)))
    assert relative_error(y, decoded.repeat(16, axis=2)) < TOLERANCE


@pytest.mark.full
def test_inflated_tae_of_full_size_equals_the_image_vae(mode):
    vae, x = image_vae(TAE_CONFIG), images(1, 3, 64, 48)
    model = inflated(vae, TAE_CONFIG)
    moments, decoded = reference(vae, x)
    assert relative_error(model.encode(ms.Tensor(x[:, :, None])).mean, moments[:, :16]) < TOLERANCE
    assert relative_error(model.decode(ms.Tensor(moments[:, :16]), num_target_frames=1), decoded) < TOLERANCE


@pytest.mark.parametrize("mode", GRAPH_IN_FULL, indirect=True)
def test_mindone_checkpoint_loads_as_it_is_and_equals_mindone(mode):
    folder = DATA / "tae"
    config = json.loads((folder / "meta.json").read_text())["config"]
    model = TemporalAutoencoder({**config, "temporal_upsample_padding": "zeros"}, pretrained=folder / "weights.ckpt")
    x, mean, logvar, y = (np.load(folder / f"{name}.npy") for name in ("x", "mean", "logvar", "y"))
    encoded = model.encode(ms.Tensor(x))
    assert relative_error(encoded.mean, mean) < TOLERANCE
    assert relative_error(encoded.logvar, logvar) < TOLERANCE
    assert relative_error(model.decode(ms.Tensor(mean)), y) < TOLERANCE


@pytest.mark.parametrize("mode", GRAPH_IN_FULL, indirect=True)
def test_image_vae_equals_diffusers(tiny_vae, mode, tmp_path):
    tiny_vae.save_pretrained(tmp_path)
    model, x = from_pretrained(tmp_path, name="image_vae"), images(2, 3, 24, 16)
    moments, decoded = reference(tiny_vae, x)
    frames = ms.Tensor(x.transpose(1, 0, 2, 3)[None])  # two images as the frames of one video
    mean = model.encode(frames).mean
    assert relative_error(mean, moments[:, :4, 0].transpose(1, 0, 2, 3)[None]) < TOLERANCE
    assert relative_error(model.decode(mean), decoded[:, :, 0].transpose(1, 0, 2, 3)[None]) < TOLERANCE
    assert isinstance(model, ImageAutoencoder)


def test_parameters_are_mindones():
    names = dict(line.split(" ", 1) for line in (DATA / "tae_names.txt").read_text().splitlines())
    shapes = {name: tuple(p.shape) for name, p in TemporalAutoencoder().named_weights()}
    assert shapes == TemporalAutoencoder.weight_shapes(TAE_CONFIG)
    assert shapes.keys() == names.keys()
    assert len(shapes) == 388
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 114_472_801


@pytest.fixture(scope="module")
def smallest():
    return TemporalAutoencoder({"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "z_channels": 4})


def test_sample_is_random_around_the_mean_and_can_be_switched_off(smallest):
    x = ms.Tensor(images(1, 3, 8, 8, 8))
    z, mean, logvar = smallest.encode(x)
    assert not np.allclose(z.asnumpy(), mean.asnumpy())
    noise = (z - mean).asnumpy() / np.exp(0.5 * logvar.asnumpy())
    assert np.abs(noise).max() < 6
    again = TemporalAutoencoder(smallest.config, sample_deterministic=True)
    z, mean, _ = again.encode(x)
    assert np.array_equal(z.asnumpy(), mean.asnumpy())


@pytest.mark.parametrize(
    "config, message",
    [
        ({"chh": 32}, "did you mean 'ch'"),
        ({"attn_resolutions": [16]}, "attn_resolutions"),
        ({"double_z": False}, "double_z"),
        ({"dropout": 0.1}, "dropout"),
        ({"ch": 48}, "48 channels"),
        ({"temporal_upsample_level": [3]}, "must be as long as temporal_downsample_level"),
        ({"temporal_upsample_padding": "mirror"}, "replicate or zeros"),
    ],
)
def test_config_that_cannot_be_built(config, message):
    with pytest.raises(ValueError, match=message):
        TemporalAutoencoder(config)


def test_unknown_model_and_precision():
    with pytest.raises(
        ValueError, match="no model 'tea'; the models are dc_ae, hunyuan_vae, image_vae,.* tae, temporal_vae"
    ):
        create_model("tea")
    with pytest.raises(ValueError, match="fp32, fp16, bf16"):
        create_model("tae", dtype="fp8", ch=32)
