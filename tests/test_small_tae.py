"""The TAE in assets/tae reconstructs what it has not seen, better than a plain average of the same blocks."""

from pathlib import Path

import numpy as np
from mindspore import Tensor

import mg
from mg import runtime
from mg.data.synthetic import TEST_PHOTOGRAPHS, ClipSettings, draw_clip
from mg.evaluation.baseline import area_trilinear_baseline

TAE = Path(__file__).parents[1] / "assets" / "tae"


def psnr(found: np.ndarray, wanted: np.ndarray) -> float:
    return 10 * np.log10(4 / np.mean(np.square(found - wanted)))


def test_the_shipped_tae_beats_the_plain_average_on_photographs_that_it_has_not_seen():
    assert sum(file.stat().st_size for file in TAE.iterdir()) < 8e6
    runtime.setup("cpu", "pynative")
    tae = mg.from_pretrained(TAE)
    frames, _ = draw_clip(TEST_PHOTOGRAPHS, 0, ClipSettings(size=64, num_frames=16))  # (T, H, W, 3)
    x = (frames.transpose(3, 0, 1, 2)[None] / 127.5 - 1).astype(np.float32)
    found = np.clip(tae.decode(tae.encode(Tensor(x)).mean).asnumpy(), -1, 1)
    assert found.shape == x.shape
    assert psnr(found, x) > psnr(area_trilinear_baseline(x), x) + 2
