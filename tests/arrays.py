"""Random videos, and how far apart two results are."""

import numpy as np
from mindspore import Tensor


def video(*shape: int, seed: int = 0) -> Tensor:
    """Uniform in [-1, 1]."""
    return Tensor(np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32))


def relative_error(found: Tensor, wanted: np.ndarray) -> float:
    """The largest difference, of the output's scale."""
    assert tuple(found.shape) == tuple(wanted.shape)
    return float(np.abs(found.asnumpy() - wanted).max() / np.abs(wanted).max())


def psnr(found: np.ndarray, wanted: np.ndarray) -> float:
    """In dB, of values in [-1, 1]."""
    return 10 * np.log10(4 / np.mean(np.square(found - wanted)))
