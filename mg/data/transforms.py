"""Resizing, cropping and colour changes of uint8 frames (T, H, W, C), and the way to and from a video tensor."""

import cv2
import numpy as np


def resize_short_side(frames: np.ndarray, size: int) -> np.ndarray:
    """Scale (T, H, W, C) so that the shorter side is `size`; area-averaged downwards, cubic upwards."""
    height, width = frames.shape[1:3]
    short = min(height, width)
    if short == size:
        return frames
    target = (max(size, round(width * size / short)), max(size, round(height * size / short)))  # cv2: (width, height)
    interpolation = cv2.INTER_AREA if size < short else cv2.INTER_CUBIC
    return np.stack([cv2.resize(frame, target, interpolation=interpolation) for frame in frames])


def center_crop(frames: np.ndarray, size: int) -> np.ndarray:
    """The middle size x size of (T, H, W, C)."""
    top, left = (frames.shape[1] - size) // 2, (frames.shape[2] - size) // 2
    return _crop(frames, top, left, size)


def random_crop(frames: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A size x size window of (T, H, W, C), in the same place in every frame."""
    top = int(rng.integers(max(frames.shape[1] - size, 0) + 1))
    left = int(rng.integers(max(frames.shape[2] - size, 0) + 1))
    return _crop(frames, top, left, size)


def _crop(frames: np.ndarray, top: int, left: int, size: int) -> np.ndarray:
    if min(frames.shape[1:3]) < size:
        raise ValueError(f"cannot crop {size} x {size} out of frames of {frames.shape[1]} x {frames.shape[2]}")
    return frames[:, top : top + size, left : left + size]


def horizontal_flip(frames: np.ndarray) -> np.ndarray:
    """Mirror (T, H, W, C) left to right."""
    return frames[:, :, ::-1]


def jitter_colors(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shuffle the channels of (T, H, W, 3), scale each one's contrast by 0.6 to 1 and invert them all half the time.

    Strong on purpose: it makes few photographs go far where colours carry no meaning, as for an autoencoder.
    """
    order = rng.permutation(3)
    levels = np.arange(256)[:, None] * rng.uniform(0.6, 1.0, size=3)  # (256, 3)
    if rng.random() < 0.5:
        levels = 255 - levels
    levels = np.rint(levels).astype(np.uint8)
    return np.stack([levels[:, c][frames[..., order[c]]] for c in range(3)], axis=-1)


def to_video_tensor(frames: np.ndarray) -> np.ndarray:
    """uint8 (T, H, W, C) -> float32 (C, T, H, W) in [-1, 1]."""
    return np.ascontiguousarray(frames.transpose(3, 0, 1, 2), np.float32) / np.float32(127.5) - np.float32(1)


def to_uint8_frames(video: np.ndarray) -> np.ndarray:
    """float (C, T, H, W) in [-1, 1] (values outside are clipped) -> uint8 (T, H, W, C)."""
    levels = np.rint((np.clip(np.asarray(video, np.float32), -1, 1) + 1) * 127.5)
    return np.ascontiguousarray(levels.transpose(1, 2, 3, 0).astype(np.uint8))
