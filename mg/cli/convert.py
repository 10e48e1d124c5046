"""Convert a model's weights from the original's names to ours, or back with --to original.

    mg-convert --src F32T4C128_AE.safetensors --target models/dc_ae.ckpt
    mg-convert --model temporal_vae --src OpenSora-VAE-v1.2 --target models/temporal_vae.ckpt
    mg-convert --model hunyuan_vae --src hunyuan_vae.safetensors --target models/hunyuan_vae.ckpt
    mg-convert --model image_vae --src sd3.5_vae --target models/image_vae.ckpt
    mg-convert --model image_vae --src outputs/image_vae/image_vae.ckpt \
        --target assets/image_vae --to original --dtype fp16

A target that ends in .ckpt or .safetensors is one file with its config beside it, X.json for X.ckpt; any other is a
folder, with config.json and the weights under the name that the original's library looks for. The config beside the
source says what its sizes are; without one they are taken for the released checkpoint's. There and back, every tensor
is the same to the last bit. The spatial half of an Open-Sora 1.2 VAE is an image VAE: --model image_vae takes it out of
the whole.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mg.checkpoints import (
    CheckpointError,
    atomic_write,
    check_finite,
    compare_names,
    find_config,
    read_state_dict,
    write_state_dict,
)
from mg.config import parse_config, run_command_line
from mg.models import VideoAutoencoder, model_class, model_name, stored_config
from mg.models.autoencoder import merge_config


@dataclass
class Options:
    """What to convert.

    Attributes:
        src: .safetensors, .pt, .pth, .bin or .ckpt file, or folder, in the original's names or in ours.
        target: .safetensors or .ckpt file, or folder, to write.
        model: whose weights they are, by default what the source's config or its tensors say: dc_ae (the original is
            Open-Sora 2.0's Video DC-AE), hunyuan_vae (diffusers' AutoencoderKLHunyuanVideo, Open-Sora 2.0's and
            Tencent's files of it), image_vae (diffusers' AutoencoderKL), tae (mindone's TAE) or temporal_vae (Open-Sora
            1.2's VideoAutoencoderPipeline).
        to: whose names the target has.
        dtype: precision of the weights in the target.
    """

    src: str
    target: str
    model: str | None = None
    to: Literal["ours", "original"] = "ours"
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"


def main() -> None:
    options = parse_config(Options, "Convert a model's weights between the original's names and ours.")
    model = model_class(options.model or model_name(options.src))
    weights_file, config_file = target_files(options, model)
    config = source_config(options.src, model)
    state = fitting_weights(options.src, model, config)
    if options.to == "original":
        state, described = model.original_weights(state, config), model.original_config(config)
    else:
        described = {"model": model.name, **config}

    write_state_dict(weights_file, state, options.dtype)
    with atomic_write(config_file) as file:
        file.write_text(json.dumps(described, indent=2) + "\n")
    print(f"{options.target}: {len(state)} tensors, {sum(array.size for array in state.values()):,} parameters")


def target_files(options: Options, model: type[VideoAutoencoder]) -> tuple[Path, Path]:
    """The files to write: weights and config.

    Raises:
        ValueError: the target is the source or lies in it, or has the suffix of a format that is only read.
    """
    target, source = Path(options.target), Path(options.src).resolve()
    if target.suffix in (".pt", ".pth", ".bin"):
        raise ValueError(f"--target {target}: weights are written to .safetensors or .ckpt files, or to a folder")
    if target.suffix in (".ckpt", ".safetensors"):
        weights, config = target, target.with_suffix(".json")
    else:
        weights = target / (model.original_file if options.to == "original" else "model.safetensors")
        config = target / "config.json"
    if source in (target.resolve(), weights.resolve(), weights.resolve().parent):
        raise ValueError(f"--target {target} would be written over the source, {options.src}")
    return weights, config


def source_config(src: str, model: type[VideoAutoencoder]) -> dict:
    """The config beside the source, in our keys, laid over the released checkpoint's.

    Raises:
        CheckpointError: it is another model's.
    """
    stored = stored_config(src, model.name)
    try:
        return merge_config(model.default_config, stored, model.name)
    except ValueError as error:
        raise CheckpointError(f"{find_config(src)}: {error}") from error


def fitting_weights(src: str, model: type[VideoAutoencoder], config: dict) -> dict:
    """The source's weights in our names: all that a model of this config has, and nothing else.

    Raises:
        CheckpointError: some are missing or of another shape; the first are named.
    """
    state = model.translate_weights(read_state_dict(src), config)
    shapes = model.weight_shapes(config)
    report = compare_names(shapes, {name: array.shape for name, array in state.items()})
    if not report.complete:
        hint = "if its sizes differ, put its config beside it (config.json, or X.json for X.ckpt)"
        raise CheckpointError(f"{src} does not fit this {model.name}: {report.summary()}; {hint}", report)
    if report.unexpected:
        print(f"{src}: {report.summary()}")
    check_finite(src, {name: state[name] for name in shapes})
    return {name: state[name] for name in shapes}


def run() -> None:
    run_command_line(main)


if __name__ == "__main__":
    run()
