"""The files that the documents' commands read, under the names that they have there, tiny and with random content."""

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import mg  # noqa: F401  # isort: skip  # before MindSpore

import numpy as np
from denoisers import pixart_weights
from image_vaes import TINY, image_vae
from lpips_weights import write_random_weights
from tiny_generation import AUTOENCODER, SIZES, denoiser_folder
from tiny_models import DC_AE, HUNYUAN_VAE, SMALL_TAE, TEMPORAL_VAE, randomized
from tiny_text import t5_folder

from mg.checkpoints import write_state_dict
from mg.config import config_file
from mg.data.video import write_image, write_video
from mg.inference.encode import EncodeConfig, encode_csv
from mg.inference.loading import ModelSection
from mg.models import create_model, model_class

ROOT = Path(__file__).parents[1]
CONFIGS = {
    "tae": {**SMALL_TAE, "ch": 8, "norm_num_groups": 4},
    "dc_ae": DC_AE,
    "temporal_vae": TEMPORAL_VAE,
    "hunyuan_vae": HUNYUAN_VAE,
}
# As the spatial half of TEMPORAL_VAE.
CONFIGS["image_vae"] = {
    "ch": 32, "ch_mult": [1, 1, 1, 2], "num_res_blocks": 1, "z_channels": 4, "use_quant_conv": True,
    "use_post_quant_conv": True,
}  # fmt: skip
CAPTIONS = ("a cat, it sits", "a dog, it runs")
CLIPS = ("a.mp4", "b.mp4")
FRAMES = 18
_OUTPUTS = r"--?(output[_-](path|dir)|save[_-]dir|outputs|target)[ =]\S+"


def provide(folder: Path, text: str) -> None:
    """Write the files that a command or snippet reads, itself or in the config that it names, and that are missing."""
    text = re.sub(_OUTPUTS, "", text)
    for config in re.findall(r"configs/[\w./-]+\.yaml", text):
        text += Path(config_file(config)).read_text(encoding="utf-8")
    for name, make in FILES.items():
        path = folder / name
        if re.search(rf"(?<![\w/.-]){re.escape(name)}(?![\w.-]|/\w)", text) and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            make(path)


@cache
def frames(seed: int) -> np.ndarray:
    """A moving picture, (18, 32, 48, 3)."""
    picture = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    return np.stack([np.roll(picture, number, axis=1) for number in range(FRAMES)])


def video(path: Path) -> None:
    write_video(path, frames(0), 24)


def image(path: Path) -> None:
    write_image(path, frames(0)[0])


def clips(path: Path) -> None:
    """A folder of two."""
    path.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(CLIPS):
        write_video(path / name, frames(seed), 24)


def index(path: Path) -> None:
    """A CSV and, next to it, its clips."""
    clips(path.parent)
    rows = [f'{name},"{caption}"' for name, caption in zip(CLIPS, CAPTIONS)]
    path.write_text("\n".join(["video,caption", *rows]) + "\n")


def prompts(path: Path) -> None:
    path.write_text("a cat,\n" + "".join(f"a cat {number}\n" for number in range(1, 12)))


def losses(path: Path) -> None:
    path.write_text(
        "".join(json.dumps({"step": step, "loss": 1 / (1 + step), "baseline": 1}) + "\n" for step in (0, 1))
    )


def autoencoder(name: str, original: bool = False) -> Callable[[Path], None]:
    """A file, or a folder where the path has no suffix, in our names or the original's."""

    def write(path: Path) -> None:
        model = randomized(create_model(name, **CONFIGS[name]))
        state = {key: parameter.asnumpy() for key, parameter in model.named_weights()}
        if path.suffix in (".ckpt", ".safetensors"):
            weights, config = path, path.with_suffix(".json")
        else:
            path.mkdir()
            weights, config = path / "model.safetensors", path / "config.json"
        write_state_dict(weights, model_class(name).original_weights(state, model.config) if original else state)
        config.write_text(json.dumps({"model": name, **model.config}))

    return write


def sd_vae(path: Path) -> None:
    """A folder, or a file in one, in diffusers' layout."""
    folder = path.parent if path.suffix == ".safetensors" else path
    folder.mkdir(exist_ok=True)
    write_state_dict(folder / "diffusion_pytorch_model.safetensors", image_vae())
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", **TINY}))


def denoiser(type: str, **config) -> Callable[[Path], None]:
    """A file, or a folder where the path has no suffix of one."""

    def write(path: Path) -> None:
        if path.suffix not in (".ckpt", ".pt", ".pth"):
            denoiser_folder(path, type, **config)
            return
        folder = path.with_name(f"{path.name}.folder")
        denoiser_folder(folder, type, **config)
        (folder / "model.safetensors").rename(path)  # read by its content, not its name
        (folder / "config.json").rename(path.with_suffix(".json"))
        folder.rmdir()

    return write


def pixart(path: Path) -> None:
    """A start of an STDiT2, to train on."""
    config = {"caption_channels": 16, "model_max_length": 200, **SIZES}
    write_state_dict(path.with_suffix(".safetensors"), pixart_weights("stdit2", config))
    path.with_suffix(".safetensors").rename(path)
    path.with_suffix(".json").write_text(json.dumps({"model": "stdit2", **config}))


def latents(path: Path) -> None:
    """A folder of a tiny TAE's."""
    source = path.with_name(f"source_of_{path.name}")
    index(source / "train.csv")
    autoencoder("tae")(source / "tae.ckpt")
    model = ModelSection(from_pretrained=str(source / "tae.ckpt"))
    encode_csv(
        EncodeConfig(
            csv_path=str(source / "train.csv"), model=model, num_frames=4, image_size=16, output_path=str(path)
        )
    )


def lpips(net: str) -> Callable[[Path], None]:
    return lambda path: write_random_weights(path, net)


def copy_of(folder: Path) -> Callable[[Path], object]:
    """A copy, since some commands write to the folder."""
    return lambda path: shutil.copytree(folder, path)


_MAKERS: list[tuple[Callable[[Path], object], str]] = [
    (index, "train.csv test.csv clips/train.csv clips/test.csv outputs/quickstart/clips/test.csv"),
    (index, "outputs/clips/train.csv outputs/clips/test.csv outputs/clips/small_train.csv"),
    (index, "outputs/photographs/images.csv outputs/test_clips/real_test.csv"),
    (index, "datasets/mixkit-100videos/video_caption_train.csv datasets/mixkit-100videos/video_caption_test.csv"),
    (clips, "videos datasets/mixkit-100videos/mixkit"),
    (clips, "samples/temporal_vae_ori samples/temporal_vae_rec samples/vae_ori samples/vae_rec"),
    (video, "sea.mp4 references/drive.mp4"),
    (image, "shore.png low.png high.png references/shore.png"),
    (prompts, "prompts.txt"),
    (losses, "outputs/train/validation.jsonl"),
    # Autoencoders.
    (copy_of(ROOT / "assets" / "tae"), "assets/tae"),
    (copy_of(ROOT / "assets" / "image_vae"), "assets/image_vae"),
    (autoencoder("tae"), "tae.ckpt models/tae.ckpt path/to/tae.ckpt models/tae_vae2d.ckpt"),
    (autoencoder("tae"), "outputs/quickstart/train/tae.ckpt outputs/tae_small/tae.ckpt outputs/inflated.ckpt"),
    (autoencoder("tae"), "outputs/run_5/tae.ckpt outputs/run_6/tae.ckpt"),
    (copy_of(ROOT / "assets" / "dc_ae"), "assets/dc_ae"),
    (copy_of(ROOT / "assets" / "temporal_vae"), "assets/temporal_vae"),
    (autoencoder("dc_ae"), "models/dc_ae.ckpt outputs/video_dc_ae/checkpoints/step_090000"),
    (autoencoder("dc_ae"), "outputs/dc_ae_small/dc_ae.ckpt"),
    (autoencoder("dc_ae", original=True), "models/F32T4C128_AE.safetensors F32T4C128_AE.safetensors"),
    (autoencoder("temporal_vae"), "models/temporal_vae.ckpt outputs/temporal_vae_stage1/temporal_vae.ckpt"),
    (autoencoder("temporal_vae"), "outputs/temporal_vae_stage2/temporal_vae.ckpt"),
    (autoencoder("temporal_vae"), "outputs/temporal_vae_small/temporal_vae.ckpt"),
    (autoencoder("temporal_vae", original=True), "models/OpenSora-VAE-v1.2 OpenSora-VAE-v1.2"),
    (autoencoder("hunyuan_vae"), "models/hunyuan_vae.ckpt tencent/model.safetensors"),
    (autoencoder("hunyuan_vae", original=True), "models/hunyuan_vae.safetensors hunyuan_vae.safetensors"),
    (autoencoder("hunyuan_vae", original=True), "hunyuan_video_vae_bf16.safetensors"),
    (autoencoder("image_vae"), "models/sdxl_vae outputs/image_vae/image_vae.ckpt"),
    (sd_vae, "sd3.5_vae sd3.5_vae/diffusion_pytorch_model.safetensors"),
    (copy_of(AUTOENCODER), "models/sd-vae-ft-ema"),
    (latents, "outputs/latents"),
    # Denoisers and text encoders.
    (denoiser("STDiT-XL/2", input_size=[4, 2, 3]), "OpenSora-v1-HQ-16x256x256.pth"),
    (denoiser("STDiT2-XL/2", model_max_length=200), "models/OpenSora-STDiT-v2-stage3"),
    (denoiser("STDiT2-XL/2", model_max_length=200), "outputs/opensora-v1-1-stage1/checkpoints/step_010000"),
    (denoiser("STDiT3-XL/2", model_max_length=300), "models/OpenSora-STDiT-v3 OpenSora-STDiT-v3"),
    (denoiser("STDiT3-XL/2", model_max_length=20, in_channels=16), "outputs/quickstart_generation/train/stdit3.ckpt"),
    (denoiser("DiT-XL/2", input_size=[1, 2, 2], condition="label_1000"), "models/DiT-XL-2-256x256.pt"),
    (pixart, "PixArt-XL-2-512x512.pth models/PixArt-XL-2-512x512.pth models/PixArt-Sigma-XL-2-512-MS.pth"),
    (t5_folder, "t5-v1_1-xxl models/t5-v1_1-xxl outputs/quickstart_generation/text_encoder"),
    # Distances.
    (lpips("vgg"), "models/lpips_vgg.safetensors"),
    (lpips("alex"), "models/lpips_alex.safetensors"),
]
FILES = {name: make for make, names in _MAKERS for name in names.split()}
