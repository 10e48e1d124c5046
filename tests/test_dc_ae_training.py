"""Both stages of Video DC-AE from the command line, by the shipped configs at tiny sizes: stage 1 learns the
quickstart's clips, stage 2 does not undo it. (Stage 2 resumes to the bit: tests/test_adversarial_training.py.)"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from training_runs import read_records

from mg.config import parse_config
from mg.data.synthetic import ClipSettings, make_clips
from mg.inference.reconstruction import InferenceConfig, reconstruct_csv
from mg.models import create_model

ROOT = Path(__file__).parents[1]
WIDTHS, DEPTHS = [16, 16, 32, 32, 32, 32], [1] * 6
TINY = {f"{part}_width_list": WIDTHS for part in ("encoder", "decoder")}
TINY |= {f"{part}_depth_list": DEPTHS for part in ("encoder", "decoder")} | {"latent_channels": 32}
OPTIONS = """
    --loss.perceptual_weight 0 --data.buckets {"64px_ar1:1":{"4":[1.0,1]}} --data.num_workers 1 --data.image_ratio 0
    --optim.ema_decay 0.9 --model.dtype fp32 --device cpu
""".split()


def train(config: str, data: Path, output: Path, *options: object) -> Path:
    """Train by a shipped config; returns the weights."""
    command = [sys.executable, ROOT / "scripts" / "train_vae.py", "--config"]
    command += [ROOT / "configs" / "dc_ae" / "train" / f"{config}.yaml", "--dataset.data_path", data]
    command += ["--output_path", output, "--model.config", json.dumps(TINY), *OPTIONS, *options]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"weights: {output}/dc_ae.ckpt\n"
    return output / "dc_ae.ckpt"


def psnr(weights: Path, data: Path) -> float:
    """The mean over the clips, in dB."""
    argv = ["--ckpt_path", weights, "--csv_path", data, "--save_dir", weights.with_suffix(""), "--num_frames", "4"]
    argv += ["--image_size", "64", "--save_videos", "false", "--device", "cpu"]
    return reconstruct_csv(parse_config(InferenceConfig, "", [*map(str, argv)])).means()["reconstruction"][0]


@pytest.mark.full
def test_two_stages_learn(tmp_path):
    make_clips(tmp_path / "clips", ClipSettings(train_clips=3, test_clips=0))
    data = tmp_path / "clips" / "train.csv"
    untrained = tmp_path / "untrained.ckpt"
    create_model("dc_ae", **TINY).save_weights(untrained)

    first = tmp_path / "stage_1"
    options = ["--max_steps=150", "--ckpt_save_steps=40", "--optim.lr=1e-3"]
    learned = train("video_dc_ae", data, first, *options)
    records = read_records(first)
    assert [record["step"] for record in records] == list(range(150)) and records[-1]["skipped"] == 0
    losses = [record["loss"] for record in records]
    assert np.mean(losses[-30:]) < 0.85 * np.mean(losses[:30])
    after_first = psnr(learned, data)
    assert after_first > psnr(untrained, data) + 1.5

    second = tmp_path / "stage_2"
    options = ["--max_steps=16", "--ckpt_save_steps=16", "--discriminator.ndf=8"]
    options += ["--model.from_pretrained", first / "checkpoints" / "step_000150"]
    sharpened = train("video_dc_ae_disc", data, second, *options)
    records = read_records(second)
    assert len(records) == 16 and records[-1]["skipped"] == records[-1]["disc_skipped"] == 0
    assert all(0 < record["adaptive_weight"] <= 1e4 for record in records)
    assert (second / "checkpoints" / "step_000016" / "discriminator.safetensors").is_file()
    assert abs(psnr(sharpened, data) - after_first) < 1
