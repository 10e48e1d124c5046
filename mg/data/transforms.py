"""Resizing, cropping and colour changes of uint8 frames (T, H, W, C), and the way to and from a video tensor."""

import cv2
import numpy as np


def resize_short_side(frames: np.ndarray, size: int) -> np.ndarray:
    """Scale (T, H, W, C) so that the shorter side is `size`; area-averaged downwards, cubic upwards."""
    return resize_to_cover(frames, size, size)


def resize_to_cover(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale (T, H, W, C) so that it just covers height x width; area-averaged downwards, cubic upwards."""
    old_height, old_width = frames.shape[1:3]
    if height * old_width >= width * old_height:  # frames at least as wide as what they are to cover
        target = (max(width, round(old_width * height / old_height)), height)  # cv2: (width, height)
    else:
        target = (width, max(height, round(old_height * width / old_width)))
    if target == (old_width, old_height):
        return frames
    shrinks = target[0] < old_width or target[1] < old_height
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return np.stack([cv2.resize(frame, target, interpolation=interpolation) for frame in frames])


def center_crop(frames: np.ndarray, height: int, width: int | None = None) -> np.ndarray:
    """The middle height x width of (T, H, W, C); height x height without a width."""
    width = height if width is None else width
    top, left = (frames.shape[1] - height) // 2, (frames.shape[2] - width) // 2
    return _crop(frames, top, left, height, width)


def random_crop(frames: np.ndarray, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """A height x width window of (T, H, W, C), in the same place in every frame."""
    top = int(rng.integers(max(frames.shape[1] - height, 0) + 1))
    left = int(rng.integers(max(frames.shape[2] - width, 0) + 1))
    return _crop(frames, top, left, height, width)


def _crop(frames: np.ndarray, top: int, left: int, height: int, width: int) -> np.ndarray:
    if frames.shape[1] < height or frames.shape[2] < width:
        raise ValueError(f"cannot crop {height} x {width} out of frames of {frames.shape[1]} x {frames.shape[2]}")
    return frames[:, top : top + height, left : left + width]


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
    x = np.array(frames.transpose(3, 0, 1, 2), np.float32, order="C")
    x /= np.float32(127.5)  # in place: large frames are many megabytes
    x -= np.float32(1)
    return x


def to_uint8_frames(video: np.ndarray) -> np.ndarray:
    """float (C, T, H, W) in [-1, 1] (values outside are clipped) -> uint8 (T, H, W, C)."""
    levels = np.rint((np.clip(np.asarray(video, np.float32), -1, 1) + 1) * 127.5)
    return np.ascontiguousarray(levels.transpose(1, 2, 3, 0).astype(np.uint8))
