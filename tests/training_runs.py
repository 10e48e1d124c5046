"""What the tests of training runs share: a model of two convolutions, a data set, and short runs of both.

python tests/training_runs.py --csv_path ... --output_path ... is scripts/train_tae.py with that model.
"""

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mg  # noqa: F401  # isort: skip  # before MindSpore

import numpy as np
import pytest
from mindspore import nn

from mg.codec import Geometry
from mg.config import parse_config, run_command_line
from mg.data.video import write_image, write_video
from mg.models import register_model
from mg.models.autoencoder import VideoAutoencoder
from mg.models.layers.conv import SpatialConv
from mg.training import trainer
from mg.training.autoencoder import TrainConfig
from mg.training.trainer import train


class OneConv(nn.Cell):
    """A decoder whose only convolution is its last."""

    def __init__(self, latent_channels: int):
        super().__init__()
        self.last_conv = SpatialConv(latent_channels, 3)

    def construct(self, z):
        return self.last_conv(z)

    def features(self, z):
        return z

    def picture(self, h):
        return self.last_conv(h)


@register_model
class TwoConvs(VideoAutoencoder):
    """An encoder and a decoder of one convolution each; a latent per pixel. It compiles in a second."""

    name = "two_convs"
    default_config = {"in_channels": 3, "z_channels": 2}

    def __init__(self, config, pretrained=None, use_recompute=False, dtype="fp32"):
        super().__init__(config)
        self.geometry = Geometry(3, self.config["z_channels"], spatial=1, temporal=1)
        self.encoder = SpatialConv(3, 2 * self.latent_channels)
        self.decoder = OneConv(self.latent_channels)
        self.finish(dtype, use_recompute, pretrained)


def write_data(folder: Path, videos: int = 3, frames: int = 12) -> list[str]:
    """Moving pictures of 32 x 40 pixels, an image, and their CSV; returns the options that name them."""
    y, x = np.mgrid[:32, :40]
    for index in range(videos):
        clip = [
            np.stack([128 + 100 * np.sin((x + t + index) / 5 + c) * np.cos(y / 7) for c in range(3)], axis=-1)
            for t in range(frames)
        ]
        write_video(folder / "videos" / f"{index}.mp4", np.stack(clip).astype(np.uint8), 8)
    write_image(folder / "videos" / "still.png", clip[0].astype(np.uint8))
    names = [f"{index}.mp4" for index in range(videos)] + ["still.png"]
    (folder / "train.csv").write_text("video,caption\n" + "".join(f"{name},moving\n" for name in names))
    return ["--csv_path", str(folder / "train.csv"), "--video_folder", str(folder / "videos")]


SHORT = (
    "--model.name two_convs --loss.perceptual_weight 0 --optim.lr 1e-2 --data.image_size 16 --data.crop_size 16 "
    "--data.sample_n_frames 4 --data.num_workers 1 --device cpu --mode pynative --epochs 20"
).split()


def short_run(output: Path, *options: str) -> list[dict]:
    """Train the model of two convolutions in this process; returns the records of its log."""
    train(parse_config(TrainConfig, "", [*SHORT, "--output_path", str(output), *map(str, options)]))
    return read_records(output)


class Stop(Exception):
    """A run ends here, as if it were killed."""


@contextmanager
def stopped_at(step: int) -> Iterator[None]:
    """A run within ends where it would save its checkpoint of a step: what it did since the last is lost."""

    def save(root, model, train_step, run, keep, save=trainer.save_checkpoint):
        if run["step"] == step:
            raise Stop
        save(root, model, train_step, run, keep)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(trainer, "save_checkpoint", save)
        yield


def read_records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def kill_after(process: subprocess.Popen, output: Path, lines: int) -> None:
    """SIGKILL once log.jsonl has that many lines."""
    log = output / "log.jsonl"
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and log.read_bytes().count(b"\n") >= lines:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def assert_same_weights(found: dict, wanted: dict):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


if __name__ == "__main__":
    run_command_line(lambda: train(parse_config(TrainConfig, "")) and None)
