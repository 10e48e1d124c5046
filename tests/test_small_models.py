"""The small models in assets/ reconstruct what they have not seen."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from arrays import psnr
from mindspore import Tensor

import mg
from mg import runtime
from mg.data.synthetic import TEST_PHOTOGRAPHS, ClipSettings, draw_clip
from mg.evaluation.baseline import area_trilinear_baseline

ASSETS = Path(__file__).parents[1] / "assets"


@cache
def clip() -> np.ndarray:
    frames, _ = draw_clip(TEST_PHOTOGRAPHS, 0, ClipSettings(size=64, num_frames=16))  # (T, H, W, 3)
    return (frames.transpose(3, 0, 1, 2)[None] / 127.5 - 1).astype(np.float32)


@pytest.mark.parametrize("name, margin", [("tae", 2), ("temporal_vae", 3), ("dc_ae", -2)])
def test_a_shipped_model_is_that_much_better_than_the_plain_average(name, margin):
    assert sum(file.stat().st_size for file in (ASSETS / name).iterdir()) < 8e6
    runtime.setup("cpu", "pynative")
    model, x = mg.from_pretrained(ASSETS / name), clip()
    found = np.clip(model.decode(model.encode(Tensor(x)).mean).asnumpy(), -1, 1)
    assert found.shape == x.shape
    assert psnr(found, x) > psnr(area_trilinear_baseline(x), x) + margin
