"""tools/convert_checkpoint.py: to the original's names and back, bit for bit; one line and exit code 2 for mistakes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from mg.checkpoints import read_state_dict
from mg.models.image_vae.image_vae import ImageAutoencoder

ROOT = Path(__file__).parents[1]
CONFIG = {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "norm_num_groups": 8, "z_channels": 4}


def convert(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "tools" / "convert_checkpoint.py", "--model", "image_vae", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_round_trip_is_bit_equal_and_carries_the_config(tmp_path):
    model = ImageAutoencoder(CONFIG)
    model.save_weights(tmp_path / "ours.ckpt")
    assert convert("--src", tmp_path / "ours.ckpt", "--target", tmp_path / "hub", "--to", "original").returncode == 0
    described = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert described["_class_name"] == "AutoencoderKL"
    assert described["block_out_channels"] == [32, 32]
    assert "encoder.down_blocks.0.resnets.0.conv1.weight" in read_state_dict(tmp_path / "hub")

    assert convert("--src", tmp_path / "hub", "--target", tmp_path / "again.safetensors").returncode == 0
    assert json.loads((tmp_path / "again.json").read_text()) == {"model": "image_vae", **model.config}
    again, ours = read_state_dict(tmp_path / "again.safetensors"), read_state_dict(tmp_path / "ours.ckpt")
    assert again.keys() == ours.keys()
    assert all(np.array_equal(again[name], ours[name]) for name in ours)


def test_missing_source_is_one_line(tmp_path):
    run = convert("--src", tmp_path / "none.ckpt", "--target", tmp_path / "x.ckpt")
    assert run.returncode == 2
    assert run.stderr.strip().count("\n") == 0 and "none.ckpt" in run.stderr
    assert list(tmp_path.iterdir()) == []
