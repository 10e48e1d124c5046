"""Both stages of Video DC-AE from the command line, by the shipped configs at tiny sizes: stage 1 learns the quickstart's
clips, stage 2 does not undo it; killed, it resumes to the bit."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from training_runs import assert_same_weights, kill_after, read_records

from mg.checkpoints import read_state_dict
from mg.config import parse_config
from mg.data.synthetic import ClipSettings, make_clips
from mg.evaluation.reconstruction import InferenceConfig, reconstruct_csv
from mg.models import create_model

ROOT = Path(__file__).parents[1]
WIDTHS, DEPTHS = [16, 16, 32, 32, 32, 32], [1] * 6
TINY = {f"{part}_{key}_list": values for part in ("encoder", "decoder") for key, values in
        (("width", WIDTHS), ("depth", DEPTHS))} | {"latent_channels": 32}  # fmt: skip
OPTIONS = """
    --loss.perceptual_weight 0 --data.buckets {"64px_ar1:1":{"4":[1.0,1]}} --data.num_workers 1 --data.image_ratio 0
    --optim.ema_decay 0.9 --model.dtype fp32 --device cpu
""".split()


def start(config: str, data: Path, output: Path, *options: object) -> subprocess.Popen:
    """Train by a shipped config."""
    command = [sys.executable, ROOT / "scripts" / "train_vae.py", "--config"]
    command += [ROOT / "configs" / "dc_ae" / "train" / f"{config}.yaml", "--dataset.data_path", data]
    command += ["--output_path", output, "--model.config", json.dumps(TINY), *OPTIONS, *options]
    return subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen, output: Path) -> Path:
    """Wait for a run to end well; returns its weights."""
    said, mistakes = process.communicate()
    assert process.returncode == 0, mistakes
    assert said == f"weights: {output}/dc_ae.ckpt\n"
    return output / "dc_ae.ckpt"


def psnr(weights: Path, data: Path) -> float:
    """The mean over the clips, in dB."""
    argv = ["--ckpt_path", weights, "--csv_path", data, "--save_dir", weights.with_suffix(""), "--num_frames", "4"]
    argv += ["--image_size", "64", "--save_videos", "false", "--device", "cpu"]
    return reconstruct_csv(parse_config(InferenceConfig, "", [*map(str, argv)])).means()["reconstruction"][0]


@pytest.mark.slow
def test_two_stages_learn_and_the_second_is_killed_and_resumed(tmp_path):
    make_clips(tmp_path / "clips", ClipSettings(train_clips=3, test_clips=0))
    data = tmp_path / "clips" / "train.csv"
    untrained = tmp_path / "untrained.ckpt"
    create_model("dc_ae", **TINY).save_weights(untrained)

    first = tmp_path / "stage_1"
    options = ["--max_steps=150", "--ckpt_save_steps=40", "--optim.lr=1e-3"]
    learned = finish(start("video_dc_ae", data, first, *options), first)
    records = read_records(first)
    assert [record["step"] for record in records] == list(range(150)) and records[-1]["skipped"] == 0
    losses = [record["loss"] for record in records]
    assert np.mean(losses[-30:]) < 0.85 * np.mean(losses[:30])
    after_first = psnr(learned, data)
    assert after_first > psnr(untrained, data) + 1.5

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = ["--max_steps=16", "--ckpt_save_steps=4", "--discriminator.ndf=8"]
    options += ["--model.from_pretrained", first / "checkpoints" / "step_000150"]
    undisturbed, doomed = (start("video_dc_ae_disc", data, output, *options) for output in (whole, killed))
    kill_after(doomed, killed, lines=6)
    sharpened = finish(undisturbed, whole)
    finish(start("video_dc_ae_disc", data, killed, *options, "--resume"), killed)
    records = read_records(whole)
    assert read_records(killed) == records
    assert len(records) == 16 and records[-1]["skipped"] == records[-1]["disc_skipped"] == 0
    assert all(0 < record["adaptive_weight"] <= 1e4 for record in records)
    for name in ("model", "discriminator", "state"):
        file = f"checkpoints/step_000016/{name}.safetensors"
        assert_same_weights(read_state_dict(killed / file), read_state_dict(whole / file))
    assert abs(psnr(sharpened, data) - after_first) < 1
