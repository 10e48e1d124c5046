"""A TAE from an image VAE, and back.

The spatial half of a TAE is an image VAE, layer by layer; the temporal half is next to it:

    image VAE                          TAE
    encoder.conv_in                    encoder.conv_in.conv_spat, .conv_temp
    encoder.down.0.downsample.conv     encoder.down.0.downsample_spat.conv, .downsample_temp.conv
    encoder.mid.attn_1.q               encoder.mid.attn_1.0.q, and attn_1.1.{norm,to_q,to_k,to_v,proj_out}

On images an inflated TAE equals its image VAE (Movie Gen, arXiv 2410.13720, section 3.1.1): temporal kernels are the
identity, and the temporal attention's output projection is zero.
"""

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from mg.checkpoints import CheckpointError, LoadReport
from mg.models import naming
from mg.models.image_vae.image_vae import ImageAutoencoder
from mg.models.image_vae.weights import config_from_diffusers, config_to_diffusers
from mg.models.naming import renamed
from mg.models.tae.tae import TemporalAutoencoder

_ATTENTION_STD = 0.02  # of the temporal attention's queries, keys and values, truncated at two deviations
_PARTS = ("encoder", "decoder")
_TEMPORAL = (".conv_temp.", "_temp.conv.", ".attn_1.1.")
_RULES = ((r"\.conv_spat\.", "."), (r"_spat\.", "."), (r"\.attn_1\.0\.", ".attn_1."))  # a TAE's names -> an image VAE's


def inflate(image_state: Mapping[str, np.ndarray], config: Mapping) -> tuple[dict[str, np.ndarray], LoadReport]:
    """A TAE's weights from an image VAE's.

    Args:
        image_state: in any names that `ImageAutoencoder` reads. It may also hold other models' tensors, as in a
            single-file checkpoint; they are reported as left over.
        config: the TAE's.

    Returns:
        The TAE's parameters in float32, the same on every call, and a report of the names used and left over.

    Raises:
        CheckpointError: the VAE in `image_state` doesn't match the config; details are in its `report`.
    """
    given = image_config(config)
    wanted = ImageAutoencoder.weight_shapes(given)
    image, report = ImageAutoencoder.fit(image_state, given, wanted)
    report = _in_the_files_names(report, image_state, given, wanted)
    start = naming.prefix(report.used, _PARTS)
    parts = tuple(f"{start}{part}." for part in ("encoder", "decoder", "quant_conv", "post_quant_conv"))
    if not report.complete or any(name.startswith(parts) for name in report.unexpected):
        raise CheckpointError(f"is not an image VAE of the expected architecture: {report.summary()}", report)
    shapes = TemporalAutoencoder.weight_shapes(config)
    return {
        name: _temporal_start(name, shape) if _is_temporal(name) else np.float32(image[renamed(name, _RULES)])
        for name, shape in shapes.items()
    }, report


def to_image_vae(tae_state: Mapping[str, np.ndarray], config: Mapping) -> dict[str, np.ndarray]:
    """The spatial half of a TAE as an image VAE in diffusers' names; the temporal half is dropped.

    Raises:
        CheckpointError: a parameter is missing.
    """
    image = {}
    for name in TemporalAutoencoder.weight_shapes(config):
        if name not in tae_state:
            raise CheckpointError(f"{name} is missing; a TAE of this config has it")
        if not _is_temporal(name):
            image[renamed(name, _RULES)] = tae_state[name]
    return ImageAutoencoder.original_weights(image, image_config(config))


def image_config(config: Mapping) -> dict:
    """The config of the image VAE that is a TAE's spatial half."""
    return {key: config[key] for key in ImageAutoencoder.default_config if key in config}


def config_from_image_vae(config: Mapping) -> dict:
    """The config of the TAE that an image VAE inflates to, from diffusers' `config.json` or from our keys.

    The frame rate is halved wherever the frame is.

    Raises:
        CheckpointError: it describes another class, or an AutoencoderKL that has no TAE counterpart.
    """
    described = config_to_diffusers(config) if "ch_mult" in config else config
    image = config_from_diffusers(described)
    levels = len(image["ch_mult"])
    return {
        "double_z": True,
        "resolution": described.get("sample_size", 32),
        "attn_resolutions": [],
        "dropout": 0.0,
        **image,
        "attn_type": "vanilla",
        "temporal_downsample_level": list(range(levels - 1)),
        "temporal_upsample_level": list(range(levels - 1, 0, -1)),
    }


def _in_the_files_names(report: LoadReport, state: Mapping, config: Mapping, wanted: Iterable[str]) -> LoadReport:
    """A report of `ImageAutoencoder.fit` in the names of the file."""
    own = naming.own_part(state, _PARTS)
    names = ImageAutoencoder.our_names(own, config, wanted)
    sources = {name: own.sources[source] for source, name in names.items()}
    diffusers = any("_blocks." in name or ".mid_block." in name for name in own)
    spoken = ImageAutoencoder.formats["diffusers" if diffusers else "latent_diffusion"].names(wanted, config)
    return replace(
        report,
        used=[sources[name] for name in report.used],
        missing=[spoken[name] for name in report.missing],
        mismatched=[(sources[name], found, right) for name, found, right in report.mismatched],
    )


def _is_temporal(name: str) -> bool:
    return any(part in name for part in _TEMPORAL)


def _temporal_start(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of a temporal parameter in an inflated TAE."""
    if name.endswith(".gamma"):
        return np.ones(shape, np.float32)
    if name.endswith((".bias", ".beta", ".proj_out.weight")):
        return np.zeros(shape, np.float32)
    if len(shape) == 2:  # random, but seeded by the name: the same on every call
        numbers = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
        return (numbers.clip(-2, 2) * _ATTENTION_STD).astype(np.float32)
    weight = np.zeros(shape, np.float32)  # (C, C, 1, k)
    weight[range(shape[0]), range(shape[0]), 0, shape[3] // 2] = 1
    return weight
