"""Which file in a folder holds the weights, which one describes them, and where to get released weights."""

import os
import re
from pathlib import Path

from mg.checkpoints.report import CheckpointError

WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_NAMES = (  # the first one found is used
    "model.safetensors",
    "model.ckpt",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
    "pytorch_model.pt",  # Tencent's
    "pytorch_model.bin",
)
_BESIDE = re.compile(r"optim|sched|random_states|scaler|running_states")  # what training saves next to the weights
_BELOW = ("model", "vae")  # in an Open-Sora training checkpoint, in a diffusers pipeline

# The last component of a path used in shipped configs and documents -> where to get it.
_RELEASED = {
    "F32T4C128_AE.safetensors": "get it from hpcai-tech/Open-Sora-v2-Video-DC-AE on Hugging Face",
    "OpenSora-VAE-v1.2": "get it from hpcai-tech/OpenSora-VAE-v1.2 on Hugging Face",
    "hunyuan_vae.safetensors": "get it from hpcai-tech/Open-Sora-v2 on Hugging Face",
    "sdxl_vae": "get the folder vae of PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers on Hugging Face",
    "sd3.5_vae": "get the folder vae of stabilityai/stable-diffusion-3.5-large on Hugging Face",
    "sd-vae-ft-ema": "get stabilityai/sd-vae-ft-ema from Hugging Face, and give its folder",
    "OpenSora-v1-HQ-16x256x256.pth": "get it from hpcai-tech/Open-Sora on Hugging Face",
    "OpenSora-v1-HQ-16x512x512.pth": "get it from hpcai-tech/Open-Sora on Hugging Face",
    "OpenSora-STDiT-v2-stage3": "get hpcai-tech/OpenSora-STDiT-v2-stage3 from Hugging Face, and give its folder",
    "OpenSora-STDiT-v3": "get hpcai-tech/OpenSora-STDiT-v3 from Hugging Face, and give its folder",
    "DiT-XL-2-256x256.pt": "get it from github.com/facebookresearch/DiT",
    "t5-v1_1-xxl": "get DeepFloyd/t5-v1_1-xxl from Hugging Face, spiece.model with it, and give its folder",
    "clip-vit-base-patch32": "get openai/clip-vit-base-patch32 from Hugging Face, and give its folder",
    "OpenSora-STDiT-v2-stage2": "get it from hpcai-tech/OpenSora-STDiT-v2-stage2 on Hugging Face",
    "PixArt-XL-2-512x512.pth": "get it from PixArt-alpha/PixArt-alpha on Hugging Face",
    "tae_vae2d.ckpt": "make it with mg-inflate from the folder vae of stabilityai/stable-diffusion-3.5-large",
}


def where_from(path: str | os.PathLike) -> str:
    """How to get the released weights that a path names, as the end of a sentence; "" for other paths."""
    hint = _RELEASED.get(Path(path).name)
    return f"; {hint}" if hint else ""


def weights_in(path: Path) -> Path:
    """The weight file, or the index of its shards, that a path refers to.

    In a folder this is a file with a usual name, else any `*.index.json`, else the only weight file; in the folder
    itself, or in `model` or `vae` below it.

    Raises:
        CheckpointError: `path` does not exist, or has no weights or several weight files.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder{where_from(path)}")
    if not path.is_dir():
        return path
    folders = [folder for folder in (path, *(path / name for name in _BELOW)) if folder.is_dir()]
    for folder in folders:
        named = [folder / name for name in _NAMES if (folder / name).is_file()]
        if named or _indexes(folder):
            return [*named, *_indexes(folder)][0]
    for folder in folders:
        files = sorted(file for file in folder.iterdir() if file.suffix in WEIGHT_SUFFIXES and file.is_file())
        files = [file for file in files if not _BESIDE.search(file.name)]
        if len(files) > 1:
            names = ", ".join(file.name for file in files[:3]) + (", ..." if len(files) > 3 else "")
            raise CheckpointError(f"{folder}: holds several weight files ({names}); name the one to use")
        if files:
            return files[0]
    raise CheckpointError(
        f"{path}: holds no weights; looked for {_NAMES[0]}, {_NAMES[1]}, an index *.index.json or a single weight file "
        f"({', '.join(WEIGHT_SUFFIXES)}), there and in {' and '.join(_BELOW)} below it"
    )


def config_of(path: Path, weights: Path) -> Path | None:
    """The JSON file that describes the model of `weights`, which were found at `path`: X.json next to X.ckpt, else
    config.json there, else config.json in the folder `path`."""
    beside = [weights.with_suffix(".json"), weights.with_name("config.json"), path / "config.json"]
    return next((file for file in beside if file != weights and file.is_file()), None)


def _indexes(folder: Path) -> list[Path]:
    """Indexes of weight shards, safetensors first, plain names before variants."""
    found = [file for file in folder.glob("*.index.json") if not _BESIDE.search(file.name) and file.is_file()]
    return sorted(found, key=lambda file: (".safetensors" not in file.name, len(file.name), file.name))
