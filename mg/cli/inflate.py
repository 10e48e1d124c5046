"""Inflate an image VAE (SD3.5's or a similar one) to a TAE that equals it on every image.

    mg-inflate --src sd3.5_vae/diffusion_pytorch_model.safetensors --target models/tae_vae2d.ckpt

The config.json next to the source describes its architecture; without one SD3.5's is assumed. The config of the TAE is
written next to the target, X.json next to X.ckpt.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mg.checkpoints import (
    CheckpointError,
    LoadReport,
    StateDict,
    atomic_write,
    check_finite,
    open_state_dict,
    read_config,
    write_state_dict,
)
from mg.config import parse_config, run_command_line
from mg.models import stored_config
from mg.models.tae.inflation import config_from_image_vae, inflate
from mg.models.tae.tae import TAE_CONFIG
from mg.plain_text import write_text


@dataclass
class Options:
    """What to inflate.

    Attributes:
        src: image VAE: a safetensors, PyTorch or MindSpore file, or a folder.
        target: .ckpt or .safetensors file to write.
        dtype: precision of the weights in the target.
        report: text file for the full list of used, missing and unused names.
        verbose: print the full list too.
    """

    src: str
    target: str
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    report: str | None = None
    verbose: bool = False


def main() -> None:
    options = parse_config(Options, "Inflate an image VAE to a TAE that equals it on every image.")
    target = Path(options.target)
    if target.suffix not in (".ckpt", ".safetensors"):
        raise ValueError(f"--target {target} must end in .ckpt or .safetensors")
    if target.resolve() == Path(options.src).resolve():
        raise ValueError(f"--target {target} is the source itself")

    with open_state_dict(options.src) as image:
        described_by = image.config_file
        config = read_tae_config(image) if described_by else TAE_CONFIG
        try:
            state, report = inflate(image, config)
        except CheckpointError as error:
            tell(error.report, options, failed=True)
            hint = "" if described_by else "; if it doesn't have SD3.5's architecture, put its config.json next to it"
            raise CheckpointError(f"{options.src} {error}{hint}") from error

    check_finite(options.src, state)
    write_state_dict(target, state, options.dtype)
    with atomic_write(target.with_suffix(".json")) as file:
        file.write_text(json.dumps({"model": "tae", **config}, indent=2) + "\n")
    tell(report, options)
    print(f"{target}: {len(state)} tensors, {sum(array.size for array in state.values()):,} parameters")


def read_tae_config(image: StateDict) -> dict:
    """The config of the TAE to make, from the one next to the image VAE or to the model that it is part of.

    Raises:
        CheckpointError: it describes another model, or an image VAE that cannot be inflated to a TAE.
    """
    ours = stored_config(image, "image_vae")
    described = read_config(str(image.config_file))
    return config_from_image_vae(described if "block_out_channels" in described else ours)


def tell(report: LoadReport | None, options: Options, failed: bool = False) -> None:
    """Write every name to the report file, and print the unused ones, or all if `verbose`."""
    if report is None:
        return
    if options.report:
        with atomic_write(options.report) as file:
            write_text(file, report.details() + "\n")
    if options.verbose:
        print(report.details())
    elif not failed:
        print(replace(report, used=[]).details() or "every name was used")
    if not failed:
        print(report.summary())


def run() -> None:
    run_command_line(main)


if __name__ == "__main__":
    run()
