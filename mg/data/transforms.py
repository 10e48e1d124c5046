"""Resizing, cropping and colour changes of uint8 frames (T, H, W, C), and conversion to and from a video tensor."""

import cv2
import numpy as np


def resize_short_side(frames: np.ndarray, size: int) -> np.ndarray:
    """Scale (T, H, W, C) so that the shorter side is `size`; area-averaged downwards, cubic upwards."""
    return resize_to_cover(frames, size, size)


def resize_to_cover(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale (T, H, W, C) so that it just covers height x width; area-averaged downwards, cubic upwards."""
    size = covering_size(frames.shape[1], frames.shape[2], height, width)
    return frames if size == frames.shape[1:3] else np.stack([resize(frame, *size) for frame in frames])


def covering_size(old_height: int, old_width: int, height: int, width: int) -> tuple[int, int]:
    """The height and width of a picture scaled so that it just covers height x width."""
    if height * old_width >= width * old_height:  # at least as wide as the target
        return height, max(width, round(old_width * height / old_height))
    return max(height, round(old_height * width / old_width)), width


def resize(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale (H, W, C) to height x width; area-averaged if a side shrinks, else cubic."""
    old_height, old_width = picture.shape[:2]
    if (height, width) == (old_height, old_width):
        return picture
    shrinks = height < old_height or width < old_width
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return cv2.resize(picture, (width, height), interpolation=interpolation)


def center_crop(frames: np.ndarray, height: int, width: int | None = None) -> np.ndarray:
    """The central height x width of (T, H, W, C); height x height without a width."""
    width = height if width is None else width
    top, left = (frames.shape[1] - height) // 2, (frames.shape[2] - width) // 2
    return _crop(frames, top, left, height, width)


def random_crop(frames: np.ndarray, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """A random height x width window of (T, H, W, C), at the same position in every frame."""
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
    """Shuffle the channels of (T, H, W, 3), scale each one's contrast by 0.6 to 1 and invert all of them half the time.

    Strong on purpose: it makes a few photographs go far when colours carry no meaning, as for an autoencoder.
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
    x /= np.float32(127.5)  # in place: large clips take many megabytes
    x -= np.float32(1)
    return x


def to_uint8_frames(video: np.ndarray) -> np.ndarray:
    """float (C, T, H, W) in [-1, 1] (values outside are clipped) -> uint8 (T, H, W, C)."""
    levels = np.rint((np.clip(np.asarray(video, np.float32), -1, 1) + 1) * 127.5)
    return np.ascontiguousarray(levels.transpose(1, 2, 3, 0).astype(np.uint8))
