"""Plain baselines that a video autoencoder has to beat: an area average with trilinear interpolation back, and a
discrete cosine transform with as many values as the TAE's latents."""

import numpy as np

DCT_CELL = (8, 8)  # frames, and pixels of height and width
# Which cosines are kept, (t, y, x, colour) in half periods per block: the constant, then those with the largest share
# of a clip's energy, all clips weighted equally, over both kinds of the quickstart's training clips at 128 pixels
# (107 clips of 16 frames). Colour 0 is brightness, 1 red against blue, 2 green against both.
DCT_PLACES = (
    (0, 0, 0, 0),
    (0, 0, 0, 1),
    (0, 1, 0, 0),
    (0, 0, 1, 0),
    (0, 0, 2, 0),
    (1, 0, 0, 0),
    (0, 2, 0, 0),
    (0, 1, 1, 0),
    (0, 0, 0, 2),
    (1, 1, 0, 0),
    (1, 0, 1, 0),
    (0, 0, 3, 0),
    (0, 2, 1, 0),
    (0, 1, 2, 0),
    (0, 3, 0, 0),
    (1, 2, 0, 0),
)


def area_trilinear_baseline(x: np.ndarray, temporal: int = 8, spatial: int = 8) -> np.ndarray:
    """Average a video over cells of `temporal` x `spatial` x `spatial` and interpolate it back to its size.

    The last frames, rows and columns are repeated up to a whole cell. The way back interpolates linearly between cell
    centres and clamps beyond the outermost ones.

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


def dct_baseline(x: np.ndarray) -> np.ndarray:
    """Keep the 16 values at `DCT_PLACES` of the cosine transform of each block of 8 frames x 8x8 pixels x 3 colours.

    That is as many values as the TAE's latents have. The transform is orthonormal along all four axes, so the
    squared error is exactly the energy dropped. The last frames, rows and columns are repeated up to a whole block.

    Args:
        x: RGB floats (3, T, H, W), in any range.

    Returns:
        Array of the shape and dtype of `x`.

    Raises:
        ValueError: `x` has another shape or is not floating.
    """
    if x.ndim != 4 or x.shape[0] != 3 or not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"the DCT baseline needs floats (3, T, H, W), got {x.dtype} {x.shape}")
    sizes = (DCT_CELL[0], DCT_CELL[1], DCT_CELL[1])
    padding = [(0, 0), *((0, -size % block) for size, block in zip(x.shape[1:], sizes))]
    padded = np.pad(x, padding, mode="edge")
    t, h, w = (size // block for size, block in zip(padded.shape[1:], sizes))
    blocks = padded.reshape(3, t, sizes[0], h, sizes[1], w, sizes[2])
    kept = _kept_cosines(sizes).astype(x.dtype)  # (16, 3, 8, 8, 8)
    values = np.einsum("kcijl,ctihjwl->kthw", kept, blocks, optimize=True)
    blocks = np.einsum("kcijl,kthw->ctihjwl", kept, values, optimize=True)
    frames, height, width = x.shape[1:]
    return np.ascontiguousarray(blocks.reshape(padded.shape)[:, :frames, :height, :width])


def _kept_cosines(sizes: tuple[int, int, int]) -> np.ndarray:
    """The basis blocks of the kept values, each of unit norm -> (16, colours, frames, rows, columns)."""
    along_t, along_y, along_x, along_colours = (_cosines(size) for size in (*sizes, 3))
    products = [
        np.einsum("c,i,j,l->cijl", along_colours[colour], along_t[t], along_y[y], along_x[x])
        for t, y, x, colour in DCT_PLACES
    ]
    return np.stack(products)


def _cosines(size: int) -> np.ndarray:
    """The orthonormal DCT-II matrix: a row for each number of half periods."""
    half_periods, places = np.arange(size)[:, None], np.arange(size) + 0.5
    rows = np.sqrt(2 / size) * np.cos(np.pi / size * half_periods * places)
    rows[0] = np.sqrt(1 / size)
    return rows


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
