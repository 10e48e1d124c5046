"""Weights of the TAE: its names and shapes, inflation from an image VAE and back, and mindone's checkpoints.

The spatial half of a TAE is an image VAE, layer by layer; the temporal half is next to it:

    image VAE                          TAE
    encoder.conv_in                    encoder.conv_in.conv_spat, .conv_temp
    encoder.down.0.downsample.conv     encoder.down.0.downsample_spat.conv, .downsample_temp.conv
    encoder.mid.attn_1.q               encoder.mid.attn_1.0.q, and attn_1.1.{norm,to_q,to_k,to_v,proj_out}

On images an inflated TAE equals its image VAE (Movie Gen, arXiv 2410.13720, section 3.1.1): temporal kernels are the
identity, and the temporal attention's output projection is zero.
"""

import logging
import zlib
from collections.abc import Mapping

import numpy as np

from mg.checkpoints import CheckpointError, LoadReport
from mg.models.image_vae.weights import (
    Layer,
    check_fit,
    config_from_diffusers,
    config_to_diffusers,
    layers,
    rename,
    to_diffusers,
)

_logger = logging.getLogger(__name__)

_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_ATTENTION_STD = 0.02  # of the temporal attention's queries, keys and values, truncated at two deviations


def expected_shapes(config: Mapping) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter of a TAE, as in mindone's checkpoints but without the unused temb_proj."""
    shapes = {}
    for layer in layers(config):
        for parameter, shape in layer.shapes().items():
            shapes[f"{_spatial_name(layer)}.{parameter}"] = shape
        shapes.update(_temporal_shapes(layer, config))
    return shapes


def inflate(image_state: Mapping[str, np.ndarray], config: Mapping) -> tuple[dict[str, np.ndarray], LoadReport]:
    """A TAE's weights from an image VAE's.

    Args:
        image_state: in any names that `mg.models.image_vae.weights.rename` knows. It may also hold other models'
            tensors, as in a single-file checkpoint; they are reported as left over.
        config: the TAE's.

    Returns:
        The TAE's parameters in float32, the same on every call, and a report of the names used and left over.

    Raises:
        CheckpointError: the VAE in `image_state` doesn't match the config; details are in its `report`.
    """
    image, report = rename(image_state, config)
    check_fit(report)
    state = {}
    for layer in layers(config):
        for parameter in layer.shapes():
            state[f"{_spatial_name(layer)}.{parameter}"] = image[f"{layer.name}.{parameter}"]
        for name, shape in _temporal_shapes(layer, config).items():
            state[name] = _temporal_start(name, shape)
    return state, report


def to_image_vae(tae_state: Mapping[str, np.ndarray], config: Mapping) -> dict[str, np.ndarray]:
    """The spatial half of a TAE as an image VAE in diffusers' names; the temporal half is dropped.

    Raises:
        CheckpointError: a parameter is missing.
    """
    image = {}
    for layer in layers(config):
        for parameter in layer.shapes():
            name = f"{_spatial_name(layer)}.{parameter}"
            if name not in tae_state:
                raise CheckpointError(f"{name} is missing; a TAE of this config has it")
            image[f"{layer.name}.{parameter}"] = tae_state[name]
    return to_diffusers(image, config)


def from_mindone(state: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], LoadReport]:
    """The TAE in a mindone checkpoint, trained or not, under our names, which are mindone's without prefixes.

    The prefixes `autoencoder.` and `_backbone.` are removed. Anything that isn't a parameter of the model (optimizer
    moments, counters, logvar, the discriminator, the unused temb_proj) is skipped and reported as unexpected.

    Raises:
        CheckpointError: two names are the same without their prefixes.
    """
    renamed, report = {}, LoadReport()
    for source in state:
        name = _own_name(source)
        if name is None:
            report.unexpected.append(source)
            continue
        if name in renamed:
            raise CheckpointError(f"{name} appears twice, once as {source}")
        renamed[name] = state[source]
        report.used.append(source)
    if report.unexpected:
        _logger.info("skipped %d entries that aren't parameters of the TAE", len(report.unexpected))
    return renamed, report


def own_part(state: Mapping) -> dict:
    """The TAE's part of a mindone checkpoint, under our names."""
    names = {source: _own_name(source) for source in state}
    return {name: state[source] for source, name in names.items() if name is not None}


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


def _own_name(source: str) -> str | None:
    """Our name of a mindone entry; None if it isn't a parameter of the model."""
    name = source.replace("_backbone.", "").removeprefix("autoencoder.")
    return name if name.startswith(_PARTS) and ".temb_proj." not in name else None


def _spatial_name(layer: Layer) -> str:
    """The name of an image VAE's layer in the TAE."""
    if ".mid.attn_1." in layer.name:
        return layer.name.replace(".attn_1.", ".attn_1.0.")
    if layer.kind == "norm":
        return layer.name
    for resampling in ("downsample", "upsample"):
        if layer.name.endswith(f".{resampling}.conv"):
            return layer.name.replace(f".{resampling}.", f".{resampling}_spat.")
    return f"{layer.name}.conv_spat"


def _temporal_shapes(layer: Layer, config: Mapping) -> dict[str, tuple[int, ...]]:
    """The temporal parameters after an image VAE's layer in the TAE."""
    width = layer.out_channels
    if layer.kind == "norm":
        return {}
    if layer.kind == "attention":
        if not layer.name.endswith(".proj_out") or config.get("attn_type", "vanilla") == "spat_only":
            return {}
        name = layer.name.replace(".attn_1.proj_out", ".attn_1.1")
        shapes: dict[str, tuple[int, ...]] = {f"{name}.norm.gamma": (width,), f"{name}.norm.beta": (width,)}
        for projection in ("to_q", "to_k", "to_v", "proj_out"):
            shapes |= {f"{name}.{projection}.weight": (width, width), f"{name}.{projection}.bias": (width,)}
        return shapes
    name, kernel = f"{layer.name}.conv_temp", 3 if layer.kernel > 1 else 1
    for resampling in ("downsample", "upsample"):
        if layer.name.endswith(f".{resampling}.conv"):
            if int(layer.name.split(".")[2]) not in config[f"temporal_{resampling}_level"]:
                return {}
            name = layer.name.replace(f".{resampling}.", f".{resampling}_temp.")
    return {f"{name}.weight": (width, width, 1, kernel), f"{name}.bias": (width,)}


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
