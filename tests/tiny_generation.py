"""Networks, text encoders and configs for mg-generate, small enough for tests, with random weights."""

from pathlib import Path

import numpy as np
import yaml
from commands import run_here
from tiny_models import randomized
from tiny_text import clip_folder, t5_folder

from mg.data.video import write_image, write_video
from mg.diffusion.networks import create_denoiser
from mg.generation.samples import read_rows

AUTOENCODER = Path(__file__).parent / "data" / "generation" / "video_autoencoder_kl"
SIZES = {"hidden_size": 24, "depth": 1, "num_heads": 2}
HEIGHT, WIDTH, FRAMES = 16, 24, 8


def denoiser_folder(folder: Path, type: str = "STDiT2-XL/2", **config) -> Path:
    """A network with random weights, none of which is zero."""
    text = {"caption_channels": 16, "model_max_length": 4}
    randomized(create_denoiser(type, **{**text, **SIZES, **config})).save_pretrained(folder)
    return folder


class Workplace:
    """A folder with everything the command needs."""

    def __init__(self, folder: Path, monkeypatch):
        self.folder, self._monkeypatch = folder, monkeypatch
        self.samples = folder / "samples"
        self.frames: dict[str, np.ndarray] = {}  # of the videos written, by name, before H.264 had them

        def write(path, frames, fps):
            self.frames[path.stem] = frames
            write_video(path, frames, fps)

        monkeypatch.setattr("mg.generation.generate.write_video", write)

    def config(self, type: str = "STDiT2-XL/2", scheduler: str = "iddpm", text: str = "t5", **settings) -> Path:
        """A config file of a tiny model."""
        model: dict = {"type": type, "from_pretrained": str(self.folder / type.replace("/", "_"))}
        own: dict = {}
        if type.startswith(("DiT", "STDiT-")):  # made for one size
            own["input_size"] = [settings.get("num_frames", FRAMES), HEIGHT // 8, WIDTH // 8]
        if type.startswith("DiT"):
            own["input_size"] = [settings.get("num_frames", FRAMES), 2, 2]
            own["condition"] = model["condition"] = "label_10" if text == "classes" else "text"
        encoder: dict = {"type": text, "model_max_length": 4}
        if text == "classes":
            encoder = {"type": text, "num_classes": 10}
        else:
            make = {"t5": t5_folder, "clip": clip_folder}[text]
            encoder["from_pretrained"] = str(make(self.folder / text))
        denoiser_folder(Path(model["from_pretrained"]), type, **own)
        content = {
            "num_frames": FRAMES,
            "image_size": [HEIGHT, WIDTH],
            "fps": 24,
            "frame_interval": 3,
            "model": model,
            "vae": {"type": "VideoAutoencoderKL", "from_pretrained": str(AUTOENCODER), "micro_batch_size": 4},
            "text_encoder": encoder,
            "scheduler": {"type": scheduler, "num_sampling_steps": 2, "cfg_scale": 7.0},
            "dtype": "fp32",
            "device": "cpu",
            "mode": "pynative",
            "verbose": 0,
            "save_dir": str(self.samples),
            **settings,
        }
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return path

    def run(self, config: Path, *arguments: object) -> int:
        """scripts/inference.py, as the guide calls it."""
        return run_here(self._monkeypatch, "scripts/inference.py", "--config", config, *arguments)

    def rows(self) -> dict:
        return read_rows(self.samples)

    def image(self, name: str = "image.png", seed: int = 0) -> Path:
        """A picture of another shape than the clips."""
        rng = np.random.default_rng(seed)
        write_image(self.folder / name, rng.integers(0, 256, (20, 48, 3), np.uint8))
        return self.folder / name

    def video(self, name: str = "video.mp4", frames: int = 12, seed: int = 1) -> Path:
        rng = np.random.default_rng(seed)
        picture = rng.integers(0, 256, (2, 3, 3), np.uint8).repeat(16, 0).repeat(16, 1)  # (32, 48, 3)
        moving = np.stack([np.roll(picture, 2 * number, axis=1) for number in range(frames)])
        write_video(self.folder / name, moving, 8)
        return self.folder / name
