"""Names and shapes of the Open-Sora 1.2 VAE's parameters and its config: ours, and those of Open-Sora's checkpoints.

    Open-Sora                                                   here
    spatial_vae.module.encoder.down_blocks.0.resnets.0.norm1.weight  spatial_vae.encoder.down.0.block.0.norm1.gamma
    temporal_vae.encoder.block_res_blocks.0.0.conv1.conv.weight  temporal_vae.encoder.down.0.block.0.conv1.weight
    temporal_vae.encoder.conv_blocks.1.conv.weight               temporal_vae.encoder.down.1.downsample.weight
    temporal_vae.encoder.res_blocks.0.norm1.weight               temporal_vae.encoder.mid.0.norm1.gamma
    temporal_vae.decoder.block_res_blocks.1.0.conv3.conv.weight  temporal_vae.decoder.up.1.block.0.nin_shortcut.weight
    temporal_vae.decoder.conv_blocks.1.conv.weight               temporal_vae.decoder.up.2.upsample.conv.weight

The tensors `scale` and `shift` there, which normalise the latents, are part of the config here. The spatial half has
diffusers' names there and latent diffusion's here: `mg.models.image_vae.weights` knows both.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from mg.checkpoints import CheckpointError, rename, rename_back
from mg.models import naming
from mg.models.image_vae import weights as image_vae
from mg.models.naming import Layer, conv3d, norm

ORIGINAL = "VideoAutoencoderPipeline"  # Open-Sora's class
BUFFERS = ("scale", "shift")
_SPATIAL, _THEIR_SPATIAL = "spatial_vae.", "spatial_vae.module."


def spatial_config(config: Mapping) -> dict:
    """The config of the spatial half, an image VAE, in the keys of `mg.models.image_vae`.

    Raises:
        ValueError: widths that aren't multiples of the first.
    """
    widths = config["spatial_block_out_channels"]
    if not widths or any(type(width) is not int or width <= 0 or width % widths[0] for width in widths):
        raise ValueError(
            f"temporal_vae config: spatial_block_out_channels is {widths}; it must be whole numbers above 0, multiples "
            "of the first"
        )
    return {
        "z_channels": config["spatial_latent_channels"],
        "in_channels": config["in_channels"],
        "out_ch": config["in_channels"],
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config["spatial_layers_per_block"],
        "norm_num_groups": config["norm_num_groups"],
        "scaling_factor": config["spatial_scaling_factor"],
        "shift_factor": 0.0,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
    }


def from_open_sora(state: Mapping[str, np.ndarray], config: Mapping) -> dict[str, np.ndarray]:
    """Open-Sora's names -> ours, without `scale` and `shift`; our own names, and unknown ones, are kept."""
    spatial, rest = {}, {}
    for name, value in state.items():
        if name.startswith(_SPATIAL):
            spatial[name.removeprefix(_THEIR_SPATIAL).removeprefix(_SPATIAL)] = value
        elif name not in BUFFERS:
            rest[name] = value
    spatial = image_vae.translate(spatial, spatial_config(config))
    temporal = rename(rest, naming.original_names(temporal_layers(config)))
    return {f"{_SPATIAL}{name}": value for name, value in spatial.items()} | temporal


def to_open_sora(state: Mapping[str, np.ndarray], config: Mapping) -> dict[str, np.ndarray]:
    """Our names -> Open-Sora's, and the config's scale and shift.

    Raises:
        CheckpointError: a parameter is missing.
    """
    ours = {name.removeprefix(_SPATIAL): value for name, value in state.items() if name.startswith(_SPATIAL)}
    spatial = image_vae.to_diffusers(ours, spatial_config(config))
    temporal = rename_back(state, naming.original_names(temporal_layers(config)))
    buffers = {name: np.float32(config[name]) for name in BUFFERS}
    return (
        {name: value.reshape(1, -1, 1, 1, 1) if value.ndim else value for name, value in buffers.items()}
        | {f"{_THEIR_SPATIAL}{name}": value for name, value in spatial.items()}
        | temporal
    )


def buffers_of(state: Mapping[str, np.ndarray]) -> dict:
    """The config keys that Open-Sora stores in its weights; {} if they are missing."""
    # The shortest decimal with the same float32 value, so that the config reads as it was written.
    shortest = np.vectorize(lambda value: float(str(np.float32(value))), otypes=[float])
    return {name: shortest(np.squeeze(state[name])).tolist() for name in BUFFERS if name in state}


def parameter_shapes(config: Mapping) -> dict[str, tuple[int, ...]]:
    """Our name of every parameter -> its shape."""
    spatial = image_vae.image_vae_shapes(spatial_config(config))
    temporal = naming.parameter_shapes(temporal_layers(config))
    return {f"{_SPATIAL}{name}": shape for name, shape in spatial.items()} | temporal


def temporal_layers(config: Mapping) -> Iterator[Layer]:
    """The layers of the temporal half, in forward order."""
    channels, latents = config["spatial_latent_channels"], config["latent_channels"]
    widths = [config["filters"] * multiplier for multiplier in config["channel_multipliers"]]
    halves, count = config["temporal_downsample"], config["num_res_blocks"]

    part, width = "temporal_vae.encoder", widths[0]
    yield conv3d(f"{part}.conv_in", f"{part}.conv_in.conv", channels, width, bias=False)
    for i, next_width in enumerate(widths):
        yield from _blocks(f"{part}.down.{i}.block", f"{part}.block_res_blocks.{i}", width, next_width, count)
        width = next_width
        if i < len(halves) and halves[i]:
            yield conv3d(f"{part}.down.{i}.downsample", f"{part}.conv_blocks.{i}.conv", width, width)
    yield from _blocks(f"{part}.mid", f"{part}.res_blocks", width, width, count)
    yield norm(f"{part}.norm_out", f"{part}.norm1", width)
    yield conv3d(f"{part}.conv_out", f"{part}.conv2.conv", width, 2 * latents, 1)

    yield conv3d("temporal_vae.quant_conv", "temporal_vae.quant_conv.conv", 2 * latents, 2 * latents, 1)
    yield conv3d("temporal_vae.post_quant_conv", "temporal_vae.post_quant_conv.conv", latents, latents, 1)

    part = "temporal_vae.decoder"
    yield conv3d(f"{part}.conv_in", f"{part}.conv1.conv", latents, width)
    yield from _blocks(f"{part}.mid", f"{part}.res_blocks", width, width, count)
    for i in reversed(range(len(widths))):
        yield from _blocks(f"{part}.up.{i}.block", f"{part}.block_res_blocks.{i}", width, widths[i], count)
        width = widths[i]
        if i > 0 and halves[i - 1]:
            yield conv3d(f"{part}.up.{i}.upsample.conv", f"{part}.conv_blocks.{i - 1}.conv", width, 2 * width)
    yield norm(f"{part}.norm_out", f"{part}.norm1", width)
    yield conv3d(f"{part}.conv_out", f"{part}.conv_out.conv", width, channels)


def _blocks(name: str, original: str, width: int, next_width: int, count: int) -> Iterator[Layer]:
    for i in range(count):
        ours, theirs = f"{name}.{i}", f"{original}.{i}"
        yield norm(f"{ours}.norm1", f"{theirs}.norm1", width)
        yield conv3d(f"{ours}.conv1", f"{theirs}.conv1.conv", width, next_width, bias=False)
        yield norm(f"{ours}.norm2", f"{theirs}.norm2", next_width)
        yield conv3d(f"{ours}.conv2", f"{theirs}.conv2.conv", next_width, next_width, bias=False)
        if width != next_width:
            yield conv3d(f"{ours}.nin_shortcut", f"{theirs}.conv3.conv", width, next_width, 1, bias=False)
        width = next_width


# Configs. Open-Sora's doesn't contain the sizes of the two halves, which are always the released ones. Different sizes
# go into the same two sections, under diffusers' and the original's names.

_SPATIAL_KEYS = {
    "block_out_channels": "spatial_block_out_channels",
    "layers_per_block": "spatial_layers_per_block",
    "latent_channels": "spatial_latent_channels",
    "in_channels": "in_channels",
    "scaling_factor": "spatial_scaling_factor",
    "micro_batch_size": "micro_batch_size",
}
_TEMPORAL_KEYS = {
    "latent_embed_dim": "latent_channels",
    "filters": "filters",
    "num_res_blocks": "num_res_blocks",
    "channel_multipliers": "channel_multipliers",
    "temporal_downsample": "temporal_downsample",
    "num_groups": "norm_num_groups",
}
_OWN_KEYS = ("micro_frame_size", *BUFFERS)


def config_from_open_sora(config: Mapping) -> dict:
    """Our config from a VideoAutoencoderPipeline's.

    Raises:
        CheckpointError: its halves are other classes.
    """
    sections: dict[str, dict] = {}
    for section, kinds, keys in (
        ("vae_2d", ("VideoAutoencoderKL",), _SPATIAL_KEYS),
        ("vae_temporal", ("VAE_Temporal_SD", "VAE_Temporal"), _TEMPORAL_KEYS),
    ):
        found = config.get(section) or {}
        if not isinstance(found, Mapping) or found.get("type", kinds[0]) not in kinds:
            raise CheckpointError(f"{section} is {found}; only {' or '.join(kinds)} can be read")
        sections |= {ours: found[theirs] for theirs, ours in keys.items() if theirs in found}
    return sections | {key: config[key] for key in _OWN_KEYS if key in config}


def config_to_open_sora(config: Mapping, released: Mapping) -> dict:
    """A VideoAutoencoderPipeline's config from ours; it includes only sizes that differ from the released ones."""

    def section(keys: Mapping[str, str]) -> dict:
        return {theirs: config[ours] for theirs, ours in keys.items() if config[ours] != released[ours]}

    return {
        "architectures": [ORIGINAL],
        "model_type": ORIGINAL,
        "vae_2d": {
            "type": "VideoAutoencoderKL",
            "from_pretrained": "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers",
            "subfolder": "vae",
            "micro_batch_size": config["micro_batch_size"],
            **section(_SPATIAL_KEYS),
        },
        "vae_temporal": {"type": "VAE_Temporal_SD", "from_pretrained": None, **section(_TEMPORAL_KEYS)},
        **{key: config[key] for key in _OWN_KEYS},
    }
