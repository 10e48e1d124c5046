"""A tiny Video DC-AE learns the quickstart's clips in stage 1, and stage 2 does not undo it."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from mg import runtime
from mg.config import parse_config
from mg.data.synthetic import ClipSettings, make_clips
from mg.evaluation.reconstruction import InferenceConfig, reconstruct_csv
from mg.models import create_model
from mg.training.trainer import TrainConfig, train

ROOT = Path(__file__).parents[1]
TINY = {
    "encoder_width_list": [16, 16, 32, 32, 32, 32],
    "encoder_depth_list": [1] * 6,
    "decoder_width_list": [16, 16, 32, 32, 32, 32],
    "decoder_depth_list": [1] * 6,
    "latent_channels": 32,
}
RECIPE = """
    --model.dtype fp32 --loss.perceptual_weight 0 --data.sample_n_frames 4 --data.image_size 64 --data.crop_size 64
    --data.num_workers 1 --data.image_ratio 0 --optim.ema_decay 0.9 --device cpu
""".split()
STAGE_1 = 200  # updates
STAGE_2 = 30


def run_stage(name: str, data: Path, output: Path, *options: str) -> tuple[Path, list[dict]]:
    """Train by a shipped config at tiny sizes; returns the weights and the log."""
    shipped = ROOT / "configs" / "dc_ae" / "train" / f"{name}.yaml"
    argv = ["--config", shipped, "--data_path", data, "--output_path", output, "--model.config", json.dumps(TINY)]
    weights = train(parse_config(TrainConfig, "", [*map(str, argv), *RECIPE, *options]))
    return weights, [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def psnr(weights: Path, data: Path, output: Path) -> float:
    """The mean over the clips, in dB."""
    argv = ["--ckpt_path", weights, "--csv_path", data, "--save_dir", output, "--num_frames", "4"]
    argv += ["--image_size", "64", "--save_videos", "false", "--device", "cpu"]
    return reconstruct_csv(parse_config(InferenceConfig, "", [*map(str, argv)])).means()["reconstruction"][0]


@pytest.mark.slow
def test_both_stages_on_the_quickstarts_clips(tmp_path):
    runtime.setup("cpu", "graph", seed=0)
    make_clips(tmp_path / "clips", ClipSettings(train_clips=3, test_clips=0))
    data = tmp_path / "clips" / "train.csv"
    with open(data, newline="") as file:
        assert len(list(csv.DictReader(file))) == 3
    untrained = tmp_path / "untrained.ckpt"
    create_model("dc_ae", **TINY).save_weights(untrained)
    before = psnr(untrained, data, tmp_path / "0")

    steps = ["--max_steps", str(STAGE_1), "--optim.lr", "1e-3"]
    first, log = run_stage("video_dc_ae", data, tmp_path / "stage_1", *steps)
    after_first = psnr(first, data, tmp_path / "1")
    losses = [record["loss"] for record in log]
    assert np.mean(losses[-20:]) < 0.7 * np.mean(losses[:20])
    assert after_first > before + 3

    steps = ["--max_steps", str(STAGE_2), "--model.from_pretrained", str(first), "--discriminator.ndf", "8"]
    second, log = run_stage("video_dc_ae_disc", data, tmp_path / "stage_2", *steps)
    assert abs(psnr(second, data, tmp_path / "2") - after_first) < 1
    assert all(0 < record["adaptive_weight"] < 1e4 and record["disc_skipped"] == 0 for record in log)
