"""Convert a model's weights from the original's names to ours, or back with --to original.

    python tools/convert_checkpoint.py --model image_vae --src sd3.5_vae --target models/image_vae.ckpt
    python tools/convert_checkpoint.py --model image_vae --src outputs/image_vae/image_vae.ckpt \
        --target assets/image_vae --to original --dtype fp16

A target that ends in .ckpt or .safetensors is one file with its config beside it; any other is a folder, with
config.json and the weights under the names that the original's library looks for.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mg.checkpoints import atomic_write, find_config, read_config, read_state_dict, write_state_dict
from mg.config import parse_config, run_command_line
from mg.models.image_vae.image_vae import IMAGE_VAE_CONFIG
from mg.models.image_vae.weights import config_from_diffusers, config_to_diffusers, from_diffusers, to_diffusers

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass
class Options:
    """What to convert.

    Attributes:
        model: whose weights they are; the original of image_vae is diffusers' AutoencoderKL.
        src: .safetensors, .pt, .pth, .bin or .ckpt file, or folder.
        target: file or folder to write.
        to: whose names the target has.
        dtype: precision of the weights in the target.
    """

    model: Literal["image_vae"]
    src: str
    target: str
    to: Literal["ours", "original"] = "ours"
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"


def main() -> None:
    options = parse_config(Options, "Convert a model's weights between the original's names and ours.")
    config = {**IMAGE_VAE_CONFIG, **image_vae_config(options.src)}
    state = from_diffusers(read_state_dict(options.src), config)
    if options.to == "original":
        state, described, weights = to_diffusers(state, config), config_to_diffusers(config), DIFFUSERS_WEIGHTS
    else:
        described, weights = {"model": options.model, **config}, "model.safetensors"

    target = Path(options.target)
    is_file = target.suffix in (".ckpt", ".safetensors")
    write_state_dict(target if is_file else target / weights, state, options.dtype)
    with atomic_write(target.with_suffix(".json") if is_file else target / "config.json") as file:
        file.write_text(json.dumps(described, indent=2) + "\n")
    print(f"{target}: {len(state)} tensors, {sum(array.size for array in state.values()):,} parameters")


def image_vae_config(src: str) -> dict:
    """The config beside the source, in our keys; {} without one, which means SD3.5's."""
    path = find_config(src)
    if path is None:
        return {}
    config = read_config(path)
    if "block_out_channels" in config:
        return config_from_diffusers(config)
    return {key: value for key, value in config.items() if key in IMAGE_VAE_CONFIG}


if __name__ == "__main__":
    run_command_line(main)
