"""Names of the image VAE's parameters and its config in other software's files.

Ours are latent diffusion's names. diffusers numbers the decoder's levels from the coarsest and stores the attention's
1x1 convolutions as linear layers.
"""

from collections.abc import Mapping

from mg.checkpoints import CheckpointError
from mg.models.naming import Rule

_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

# diffusers' files until 2023.
SPELLINGS: tuple[Rule, ...] = tuple(
    (rf"(\.attentions\.\d+)\.{old}\.", rf"\1.{new}.") for old, new in _OLD_ATTENTION.items()
)


def config_from_diffusers(config_json: Mapping) -> dict:
    """Our config of the image VAE that a `config.json` of diffusers' AutoencoderKL describes.

    Raises:
        CheckpointError: it describes another class, or an unsupported AutoencoderKL.
    """
    widths = config_json.get("block_out_channels", [64])
    if not isinstance(widths, (list, tuple)) or not widths or not all(type(w) is int and w > 0 for w in widths):
        raise CheckpointError(f"block_out_channels is {widths}; it must be a list of whole numbers above 0")
    levels = len(widths)
    wanted = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "mid_block_add_attention": True,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "latents_mean": None,
        "latents_std": None,
    }
    for key, value in wanted.items():
        found = config_json.get(key, value)
        if (list(found) if isinstance(found, tuple) else found) != value:
            raise CheckpointError(f"{key} is {found}; the image VAE only supports {value}")
    groups = _whole(config_json, "norm_num_groups", 32)
    if any(width % widths[0] or width % groups for width in widths):
        raise CheckpointError(f"block_out_channels is {widths}; each must be a multiple of the first and of {groups}")
    return {
        "z_channels": _whole(config_json, "latent_channels", 4),
        "in_channels": _whole(config_json, "in_channels", 3),
        "out_ch": _whole(config_json, "out_channels", 3),
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": _whole(config_json, "layers_per_block", 1),
        "norm_num_groups": groups,
        "scaling_factor": _real(config_json, "scaling_factor", 0.18215),
        "shift_factor": _real(config_json, "shift_factor", None) or 0.0,
        "use_quant_conv": bool(config_json.get("use_quant_conv", True)),
        "use_post_quant_conv": bool(config_json.get("use_post_quant_conv", True)),
    }


def config_to_diffusers(config: Mapping) -> dict:
    """The `config.json` that diffusers' AutoencoderKL reads, from ours.

    Raises:
        CheckpointError: a value of the wrong kind.
    """
    width, multipliers = _whole(config, "ch", 128), config["ch_mult"]
    if not isinstance(multipliers, (list, tuple)) or not all(type(m) is int for m in multipliers):
        raise CheckpointError(f"ch_mult is {multipliers}; it must be a list of whole numbers")
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [width * multiplier for multiplier in multipliers],
        "down_block_types": ["DownEncoderBlock2D"] * len(multipliers),
        "up_block_types": ["UpDecoderBlock2D"] * len(multipliers),
        "layers_per_block": _whole(config, "num_res_blocks", 2),
        "norm_num_groups": _whole(config, "norm_num_groups", 32),
        "latent_channels": _whole(config, "z_channels", 16),
        "in_channels": _whole(config, "in_channels", 3),
        "out_channels": _whole(config, "out_ch", 3),
        "sample_size": _whole(config, "resolution", 256),
        "scaling_factor": _real(config, "scaling_factor", 1.0),
        "shift_factor": _real(config, "shift_factor", 0.0),
        "use_quant_conv": bool(config.get("use_quant_conv", False)),
        "use_post_quant_conv": bool(config.get("use_post_quant_conv", False)),
    }


def _whole(given: Mapping, key: str, default: int) -> int:
    value = given.get(key, default)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{key} is {value}; it must be a whole number above 0")
    return value


def _real(given: Mapping, key: str, default: float | None) -> float | None:
    value = given.get(key, default)
    if value is not default and type(value) not in (int, float):
        raise CheckpointError(f"{key} is {value}; it must be a number")
    return value
