"""Names of the Open-Sora 1.2 VAE's parameters and its config in Open-Sora's checkpoints.

    Open-Sora                                                   here
    spatial_vae.module.encoder.down_blocks.0.resnets.0.norm1.weight  spatial_vae.encoder.down.0.block.0.norm1.gamma
    temporal_vae.encoder.block_res_blocks.0.0.conv1.conv.weight  temporal_vae.encoder.down.0.block.0.conv1.weight
    temporal_vae.encoder.conv_blocks.1.conv.weight               temporal_vae.encoder.down.1.downsample.weight
    temporal_vae.encoder.res_blocks.0.norm1.weight               temporal_vae.encoder.mid.0.norm1.gamma
    temporal_vae.decoder.block_res_blocks.1.0.conv3.conv.weight  temporal_vae.decoder.up.1.block.0.nin_shortcut.weight
    temporal_vae.decoder.conv_blocks.1.conv.weight               temporal_vae.decoder.up.2.upsample.conv.weight

The tensors `scale` and `shift` there, which normalise the latents, are part of the config here. The spatial half has
diffusers' names there and latent diffusion's here.
"""

from collections.abc import Mapping

import numpy as np

from mg.checkpoints import CheckpointError
from mg.models import naming
from mg.models.naming import Rule

ORIGINAL = "VideoAutoencoderPipeline"  # Open-Sora's class
BUFFERS = ("scale", "shift")


def spatial_config(config: Mapping) -> dict:
    """The config of the spatial half, an image VAE, in the keys of `mg.models.image_vae`."""
    widths = config["spatial_block_out_channels"]
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


def open_sora_rules(config: Mapping) -> tuple[Rule, ...]:
    """The rules that turn our names into Open-Sora's."""
    spatial = naming.diffusers_rules(len(config["spatial_block_out_channels"]))
    temporal = (
        (r"\.(down|up)\.(\d+)\.block\.", r".block_res_blocks.\2."),
        (r"\.down\.(\d+)\.downsample\.", r".conv_blocks.\1.conv."),
        (r"\.up\.(\d+)\.upsample\.conv\.", lambda found: f".conv_blocks.{int(found[1]) - 1}.conv."),
        (r"\.mid\.", ".res_blocks."),
        (r"\.norm_out\.", ".norm1."),
        (r"\.nin_shortcut\.", ".conv3."),
        (r"(conv[123]|quant_conv|encoder\.conv_in|decoder\.conv_out)\.", r"\1.conv."),
        (r"^encoder\.conv_out\.", "encoder.conv2.conv."),
        (r"^decoder\.conv_in\.", "decoder.conv1.conv."),
    )
    return (
        naming.within("spatial_vae.", spatial, "spatial_vae.module."),
        naming.within("temporal_vae.", temporal),
    )


def config_tensors(config: Mapping) -> dict[str, np.ndarray]:
    """The config's scale and shift as Open-Sora stores them, (1, z, 1, 1, 1), or () for all channels."""
    values = {name: np.float32(config[name]) for name in BUFFERS}
    return {name: value.reshape(1, -1, 1, 1, 1) if value.ndim else value for name, value in values.items()}


def buffers_of(state: Mapping[str, np.ndarray]) -> dict:
    """The config keys that Open-Sora stores in its weights; {} if they are missing."""
    # The shortest decimal with the same float32 value, so that the config reads as it was written.
    shortest = np.vectorize(lambda value: float(str(np.float32(value))), otypes=[float])
    return {name: shortest(np.squeeze(state[name])).tolist() for name in BUFFERS if name in state}


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
