"""Given frames: masks per frame, as numpy arrays in sampling and tensors in training."""

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, ops


def checked_frame_mask(frame_mask, shape: tuple[int, ...]) -> np.ndarray | None:
    """A mask (B, T) in fp32 for latents of a shape (B, C, T, H, W); None if it is all 1, so that nothing is kept.

    Raises:
        ValueError: the wrong shape, or values outside [0, 1].
    """
    if frame_mask is None:
        return None
    mask = np.asarray(frame_mask.asnumpy() if isinstance(frame_mask, Tensor) else frame_mask, np.float32)
    if mask.shape != (shape[0], shape[2]):
        raise ValueError(
            f"a frame mask must be (B, T), {(shape[0], shape[2])} for these latents; this one is {mask.shape}"
        )
    if not ((mask >= 0) & (mask <= 1)).all():
        raise ValueError("a frame mask's values must be between 0 (keep) and 1 (generate)")
    return None if (mask == 1).all() else mask


def over_frames(values: np.ndarray) -> np.ndarray:
    """(B, T) -> (B, 1, T, 1, 1), to broadcast over latents."""
    return values[:, None, :, None, None]


def mean_over_frames(values: Tensor, x_mask: Tensor | None) -> Tensor:
    """Each sample's mean over its True frames, (B, C, T, H, W) -> (B,); 0 if it has none."""
    frames = mint.mean(mint.mean(values, (3, 4)), 1)  # (B, T); a single sum over everything would lose digits in fp32
    if x_mask is None:
        return mint.mean(frames, 1)
    kept = x_mask.astype(ms.float32)
    return mint.sum(frames * kept, 1) / ops.maximum(mint.sum(kept, 1), Tensor(1.0, ms.float32))
