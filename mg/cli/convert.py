"""Convert a model's weights from the original's names to ours, or to other formats with --to.

    mg-convert --src F32T4C128_AE.safetensors --target models/dc_ae.ckpt
    mg-convert --model temporal_vae --src OpenSora-VAE-v1.2 --target models/temporal_vae.ckpt
    mg-convert --model hunyuan_vae --src hunyuan_vae.safetensors --target models/hunyuan_vae.ckpt
    mg-convert --model image_vae --src sd3.5_vae --target models/image_vae.ckpt
    mg-convert --model image_vae --src outputs/image_vae/image_vae.ckpt \
        --target assets/image_vae --to original --dtype fp16
    mg-convert --src hunyuan_video_vae_bf16.safetensors --target hunyuan_tencent --to tencent --dtype bf16
    mg-convert --src OpenSora-STDiT-v3 --target models/stdit3.ckpt
    mg-convert --model stdit2 --src PixArt-XL-2-512x512.pth --target models/stdit2_start.ckpt

A target that ends in .ckpt or .safetensors is one file with its config next to it, X.json for X.ckpt; any other is a
folder, with config.json and the weights under the file name that the original's library expects. The config next to the
source gives its sizes; without one those of the released checkpoint are assumed. Converting there and back is
bit-exact. The spatial half of an Open-Sora 1.2 VAE is an image VAE: --model image_vae extracts it. PixArt and DiT files
are starting points for training denoisers: weights that they lack get their initial values and are listed.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mg import runtime
from mg.checkpoints import (
    CheckpointError,
    StateDict,
    atomic_write,
    check_finite,
    open_state_dict,
    write_state_dict,
)
from mg.config import parse_config, run_command_line
from mg.diffusion.networks import DENOISERS
from mg.models import AUTOENCODERS
from mg.models.registry import Registry
from mg.models.stored import Format, StoredModel, described_here

MODELS: Registry[StoredModel] = Registry(AUTOENCODERS, DENOISERS)


@dataclass
class Options:
    """What to convert.

    Attributes:
        src: safetensors, PyTorch or MindSpore file (detected by its content), or folder, with the original's names,
            another format's or ours.
        target: .safetensors or .ckpt file, or folder, to write.
        model: the model of the weights, by default read from the source's config or tensors: dc_ae (the original is
            Open-Sora 2.0's Video DC-AE), hunyuan_vae (diffusers' AutoencoderKLHunyuanVideo, and its files by
            Open-Sora 2.0, Tencent and ComfyUI), image_vae (diffusers' AutoencoderKL), tae (mindone's TAE),
            temporal_vae (Open-Sora 1.2's VideoAutoencoderPipeline), or a denoiser: stdit, stdit2, stdit3
            (Open-Sora 1.0's, 1.1's and 1.2's) or dit.
        to: format of the target: ours, original, or by name: open_sora (dc_ae, hunyuan_vae, temporal_vae),
            diffusers (hunyuan_vae, image_vae), tencent (hunyuan_vae), comfyui (hunyuan_vae), latent_diffusion
            (image_vae), mindone (tae).
        dtype: precision of the weights in the target.
        key: which of several state dicts in a PyTorch file, such as ema.
    """

    src: str
    target: str
    model: str | None = None
    to: str = "ours"
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    key: str | None = None


def main() -> None:
    options = parse_config(Options, "Convert a model's weights between the original's names and ours.")
    with open_state_dict(options.src, options.key) as source:
        model = MODELS.model_class(options.model or MODELS.model_name(source))
        written = target_format(options.to, model)
        files = target_files(options.target, written, options.src)
        config = whole_config(source, model)
        state = written.weights(fitting_weights(source, model, config), config)

    write_target(files, state, written, config, options.dtype)
    print(f"{options.target}: {len(state)} tensors, {sum(array.size for array in state.values()):,} parameters")


def target_format(name: str, model: type[StoredModel]) -> Format:
    """The format that --to names.

    Raises:
        ValueError: the model has no format of that name.
    """
    ours = Format("mg", "model.safetensors", described_here(model.name))
    original = Format(model.name, "model.safetensors", model.original_config)  # of a denoiser, whose names are ours
    formats = {"ours": ours, "original": next(iter(model.formats.values()), original), **model.formats}
    if name not in formats:
        listed = ["ours", "original", *(f"{key} ({formats[key].reader})" for key in model.formats)]
        raise ValueError(f"--to is {name!r}; {model.name} can be written as {', '.join(listed)}")
    return formats[name]


def target_files(path: str, written: Format, *sources: str) -> tuple[Path, Path]:
    """The files to write: weights and config.

    Raises:
        ValueError: the target is a source or inside one, or has the suffix of a read-only format.
    """
    target = Path(path)
    if target.suffix in (".pt", ".pth", ".bin"):
        raise ValueError(f"--target {target}: weights are written to .safetensors or .ckpt files, or to a folder")
    if target.suffix in (".ckpt", ".safetensors"):
        weights, config = target, target.with_suffix(".json")
    else:
        weights = target / written.file
        config = target / "config.json"
    for source in sources:
        if Path(source).resolve() in (target.resolve(), weights.resolve(), weights.resolve().parent):
            raise ValueError(f"--target {target} would overwrite the source, {source}")
    return weights, config


def write_target(files: tuple[Path, Path], state: dict, written: Format, config: dict, dtype: str) -> None:
    """Write weights that already have the format's names, and the config in its words."""
    weights_file, config_file = files
    write_state_dict(weights_file, state, dtype, exact=tuple(written.tensors(config)))
    with atomic_write(config_file) as file:
        file.write_text(json.dumps(written.config(config), indent=2) + "\n")


def whole_config(source: StateDict, model: type[StoredModel]) -> dict:
    """The config stored with a checkpoint, completed by the model's defaults."""
    return {**model.default_config, **MODELS.stored_config(source, model)}


def fitting_weights(source: StateDict, model: type[StoredModel], config: dict) -> dict:
    """The source's weights in our names, exactly those that a model with this config has. Weights missing from a source
    that is only a starting point get their initial values.

    Raises:
        CheckpointError: weights are missing or have another shape; the first are named.
    """
    state, report = model.fit(source, config, model.weight_shapes(config))
    if not report.complete:
        hint = "if its sizes differ, put its config next to it (config.json, or X.json for X.ckpt)"
        raise CheckpointError(f"{source} does not fit this {model.name}: {report.summary()}; {hint}", report)
    if report.unexpected or report.new:
        print(f"{source}: {report.summary()}")
    check_finite(str(source), state)
    new: dict = {}
    if report.new:
        runtime.setup("cpu")
        first = dict(model(config).named_weights())
        new = {name: first[name].asnumpy() for name in report.new}
    return {**state, **new}


def run() -> None:
    run_command_line(main)


if __name__ == "__main__":
    run()
