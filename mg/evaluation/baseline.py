"""The plain baseline that a video autoencoder has to beat: area average, then trilinear interpolation."""

import numpy as np


def area_trilinear_baseline(x: np.ndarray, temporal: int = 8, spatial: int = 8) -> np.ndarray:
    """Reduce a video to cells of `temporal` x `spatial` x `spatial` and bring it back to its own size.

    Each cell keeps its average, the last frames, rows and columns being repeated up to a whole cell; the way back
    interpolates linearly between cell centres and holds the outermost ones beyond them.

    Args:
        x: floats (C, T, H, W) or (B, C, T, H, W), in any range.

    Returns:
        Array of the shape and dtype of `x`.

    Raises:
        ValueError: `x` has another number of axes or is not floating.
    """
    if x.ndim not in (4, 5) or not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"baseline needs floats (C, T, H, W) or (B, C, T, H, W), got {x.dtype} {x.shape}")
    size = x.shape
    factors = {-3: temporal, -2: spatial, -1: spatial}
    for axis, factor in factors.items():
        x = _average(x, factor, axis)
    for axis, factor in factors.items():
        x = _interpolate(x, factor, size[axis], axis)
    return x


def _average(x: np.ndarray, factor: int, axis: int) -> np.ndarray:
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % factor)
    x = np.moveaxis(np.pad(x, padding, mode="edge"), axis, -1)
    cells = x.reshape(*x.shape[:-1], -1, factor)
    return np.moveaxis(cells.mean(-1), -1, axis)


def _interpolate(x: np.ndarray, factor: int, size: int, axis: int) -> np.ndarray:
    last = x.shape[axis] - 1
    position = np.clip((np.arange(size) + 0.5) / factor - 0.5, 0, last)  # in cells, 0 = centre of the first
    before = position.astype(int)
    after = np.minimum(before + 1, last)
    weight = (position - before).astype(x.dtype).reshape(-1, *[1] * (-1 - axis))
    return x.take(before, axis) * (1 - weight) + x.take(after, axis) * weight
