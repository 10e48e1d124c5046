"""scripts/inference_vae.py with Video DC-AE's shipped config, on a tiny model: every frame comes back, tiled or not."""

import csv
import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from commands import run_here
from tiny_models import DC_AE as TINY

from mg.data.clips import load_clip
from mg.data.video import open_video, read_image, write_image, write_video
from mg.inference.loading import ModelSection
from mg.inference.reconstruction import InferenceConfig, score
from mg.models import create_model, from_pretrained
from mg.tiling import TilingConfig

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "dc_ae" / "inference" / "video_dc_ae.yaml"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "dc_ae.safetensors"
    create_model("dc_ae", **TINY).save_weights(path)
    return path


@pytest.fixture
def index(tmp_path):
    """24 frames at 24 frames per second, so 12 at fps_max 16; an image; a clip too short."""
    folder = tmp_path / "videos"
    t, y, x = np.meshgrid(np.arange(24), np.arange(64), np.arange(80), indexing="ij")
    frames = np.stack([128 + 90 * np.sin((x + 2 * t) / 9 + c) * np.cos(y / 11 - c) for c in range(3)], axis=-1)
    frames = frames.astype(np.uint8)
    write_video(folder / "moving.mp4", frames, fps=24)
    write_video(folder / "short.mp4", frames[:5], fps=24)
    write_image(folder / "still.png", frames[0])
    (folder / "index.csv").write_text("path\nmoving.mp4\nshort.mp4\nstill.png\n")
    return folder / "index.csv"


def run_script(monkeypatch, checkpoint, index, folder, *options) -> tuple[int, dict]:
    """The exit code and the metrics, by name, of the command of the specification at tiny sizes."""
    arguments = ["--config", CONFIG, "--save_dir", folder, "--ckpt_path", checkpoint, "--data_path", index]
    sizes = {"image_size": 64, "num_frames": 8, "model.spatial_tile_size": 32, "model.temporal_tile_size": 4}
    overrides = [f"--{name}={value}" for name, value in sizes.items()]
    code = run_here(monkeypatch, "scripts/inference_vae.py", *arguments, *overrides, *options)
    with open(folder / "metrics.csv", newline="") as file:
        return code, {row["name"]: row for row in csv.DictReader(file)}


@pytest.mark.full
def test_the_shipped_config_reconstructs_in_tiles(tmp_path, checkpoint, index, monkeypatch):
    code, rows = run_script(monkeypatch, checkpoint, index, tmp_path / "out")
    assert code == 1  # a clip failed
    assert [rows["moving.mp4"][key] for key in ("frames", "height", "width")] == ["8", "64", "64"]
    assert [rows["still.png"][key] for key in ("frames", "height", "width")] == ["1", "64", "64"]
    assert "the video has 5 frames; 15 are needed" in rows["short.mp4"]["error"]
    written = open_video(tmp_path / "out" / "reconstruction" / "moving.mp4")
    assert (written.num_frames, written.height, written.width, written.fps) == (8, 64, 64, 12)

    summary = json.loads((tmp_path / "out" / "metrics.json").read_text())
    model = from_pretrained(checkpoint, dtype=summary["config"]["model"]["dtype"])
    assert summary["config"]["model"]["dtype"] == "bf16"
    model.enable_tiling(**vars(TilingConfig(4, 0, 4, 0, 32, 0, "short")))  # a quarter of one latent is none
    config = InferenceConfig(ModelSection(str(checkpoint)), str(index), image_size=64, num_frames=8, fps_max=16)
    x = load_clip(index.parent / "moving.mp4", config)[0]
    y = np.clip(model(ms.Tensor(x[None])).asnumpy()[0], -1, 1)
    assert float(rows["moving.mp4"]["psnr"]) == pytest.approx(score(x, y)[0], abs=1e-3)
    assert read_image(tmp_path / "out" / "reconstruction" / "still.png").shape == (64, 64, 3)


@pytest.mark.parametrize("frames", [1, pytest.param(6, marks=pytest.mark.full)])
def test_images_and_short_clips_are_reconstructed(tmp_path, checkpoint, index, monkeypatch, frames):
    options = ["--num_frames", frames, "--model.dtype", "fp32", "--sample_posterior"]
    code, rows = run_script(monkeypatch, checkpoint, index, tmp_path / "out", *options)
    assert code == (frames > 1)  # the short one has 3
    assert rows["moving.mp4"]["frames"] == str(frames)
    assert open_video(tmp_path / "out" / "reconstruction" / "moving.mp4").num_frames == frames


@pytest.mark.full
@pytest.mark.parametrize("frames", [52, 76])
def test_lengths_that_the_original_cuts_are_returned_whole(tmp_path, checkpoint, monkeypatch, frames):
    grey = np.repeat(np.arange(frames, dtype=np.uint8)[:, None, None, None] * 3, 3, axis=3)
    write_video(tmp_path / "long.mp4", np.broadcast_to(grey, (frames, 32, 32, 3)), fps=16)
    (tmp_path / "index.csv").write_text("path\nlong.mp4\n")
    options = ["--num_frames=null", "--image_size=32", "--model.temporal_tile_size=32", "--model.dtype=fp32"]
    code, rows = run_script(monkeypatch, checkpoint, tmp_path / "index.csv", tmp_path / "out", *options)
    assert code == 0 and rows["long.mp4"]["frames"] == str(frames)
    assert open_video(tmp_path / "out" / "reconstruction" / "long.mp4").num_frames == frames


def test_the_models_own_tiles_are_what_the_config_says(tmp_path, checkpoint):
    model = from_pretrained(checkpoint)
    model.enable_tiling()
    said = TilingConfig.from_tile_sizes(model.temporal_compression, model.spatial_compression)
    for axes in ("encode_axes", "decode_axes"):
        assert getattr(model.tiling, axes)(4, 32) == getattr(said, axes)(4, 32)
