"""A video's way to latents and back takes the same memory whatever its length."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from training_runs import TwoConvs

from mg.benchmark.latent_memory import MemoryConfig, format_table, measure_memory, moving_picture, peak_memory

ROOT = Path(__file__).parents[1]


def test_the_peak_is_that_of_the_process_that_ran(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    module = tmp_path / "take.py"
    module.write_text("import sys\nx = b'1' * (int(sys.argv[1]) * 2**20)\ndel x\n")
    small, large = (peak_memory(["take", megabytes], tmp_path / "peak") / 2**20 for megabytes in (1, 200))
    assert 190 < large - small < 210
    module.write_text("raise ValueError('no room')")
    with pytest.raises(ValueError, match="take failed: ValueError: no room"):
        peak_memory(["take"], tmp_path / "peak")


def test_pictures_move_and_do_not_depend_on_the_pieces():
    whole = np.concatenate(list(moving_picture(9, 16)))
    np.testing.assert_array_equal(np.concatenate(list(moving_picture(9, 16, piece=4))), whole)
    assert whole.shape == (9, 16, 16, 3) and np.abs(np.diff(whole.astype(int), axis=0)).mean() > 1


@pytest.mark.full
def test_five_times_the_frames_take_no_more_memory(tmp_path, monkeypatch):
    for command in ("encode_latents", "decode_latents"):  # the real ones, with a model that takes no time
        (tmp_path / f"small_{command}.py").write_text(
            f"import training_runs\nfrom mg.cli.{command} import run\nrun()\n"
        )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "tests", tmp_path))))
    TwoConvs({}).save_weights(tmp_path / "two_convs.ckpt")
    config = MemoryConfig(
        frames=[64, 320],
        size=192,
        ckpt_path=str(tmp_path / "two_convs.ckpt"),
        tile=8,
        mode="pynative",
        output_path=str(tmp_path / "out"),
    )
    found = measure_memory(config, "small_encode_latents", "small_decode_latents")
    assert found["holds"], format_table(found)
    held = (320 - 64) * 3 * 192 * 192 * 4  # bytes, of frames as the model takes them
    for command, (short, _) in found["peaks"].items():
        assert held > 0.13 * short, f"{command}: a video that is held would hardly show"
    assert json.loads((tmp_path / "out" / "memory.json").read_text()) == found
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["memory.json"]
