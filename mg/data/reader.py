"""A clip or an image of a row, drawn, cut to size and as a tensor: what loading costs, and nothing of which row comes
when.

All that is drawn of a clip is drawn from its key, so any process may read it. Frames are scaled down a few at a time,
as they are decoded: at full size 32 frames of 1080p are 200 MB, which the system hands out in 60,000 pages, cleared
under a lock that the threads of a process share.
"""

from collections import OrderedDict
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from mg.data import transforms
from mg.data.index import IndexRow
from mg.data.video import VideoError, clip_length, frame_interval, is_image, open_video, read_image

if TYPE_CHECKING:
    from mg.data.loader import DataConfig

IMAGE_CACHE_BYTES = 512 * 2**20


class ClipReader:
    """Reads rows as a config says; safe to use from several threads.

    Args:
        config: how rows become clips.
        cache_bytes: of decoded images that are kept.
        decoder: of videos: auto | decord | av, see `mg.data.video.open_video`.
    """

    def __init__(self, config: "DataConfig", cache_bytes: int = IMAGE_CACHE_BYTES, decoder: str = "auto"):
        self.config, self._decoder = config, decoder
        self._cache = _ImageCache(cache_bytes)

    def read(self, row: IndexRow, num_frames: int, size: tuple[int, int], key: tuple[int, ...]) -> np.ndarray:
        """A clip of a row as a tensor, float32 (3, T, H, W) in [-1, 1]; of an image T = 1.

        Args:
            size: H and W.
            key: of what is drawn: the same key gives the same clip.

        Raises:
            VideoError: a file that cannot be read, or is too short.
        """
        rng = np.random.default_rng(key)
        if is_image(row.path):
            frames = self._cache.read(row.path)[None]  # (1, H, W, 3)
            height, width = frames.shape[1:3]
            frames = transforms.resize_to_cover(frames, *self._covered(height, width, size, rng))
        else:
            with open_video(row.path, self._decoder) as video:
                indices = self._clip_indices(row, video, num_frames, rng)
                covered = self._covered(video.height, video.width, size, rng)
                frames = video.read(indices, lambda some: transforms.resize_to_cover(some, *covered))  # (T, h, w, 3)
        return self._cut(frames, size, rng)

    def size_in_index(self, row: IndexRow) -> tuple[int, int, int] | None:
        """What `measure` would find, where the index says it; else None."""
        config = self.config
        if not (row.height and row.width):
            return None
        if is_image(row.path):
            return 1, row.height, row.width
        if not row.num_frames or (row.fps is None and config.fps_max is not None):
            return None
        return clip_length(row.num_frames, row.fps or 0, config.fps_max, config.sample_stride), row.height, row.width

    def measure(self, row: IndexRow) -> tuple[int, int, int]:
        """How many frames a clip of a row's file could have, its height and width.

        Raises:
            VideoError: a file that cannot be read.
        """
        if is_image(row.path):
            height, width = read_image(row.path).shape[:2]
            return 1, height, width
        with open_video(row.path, self._decoder) as video:
            length = clip_length(video.num_frames, video.fps, self.config.fps_max, self.config.sample_stride)
            return length, video.height, video.width

    def _clip_indices(self, row: IndexRow, video, length: int, rng: np.random.Generator) -> list[int]:
        stride = self.config.sample_stride
        interval = frame_interval(video.fps, self.config.fps_max)
        needed = (length - 1) * stride * interval + 1
        if video.num_frames < needed:
            raise VideoError(f"{row.path}: too short: {video.num_frames} frames, {needed} needed")
        if self.config.max_sample_stride is not None and length > 1:
            longest = (video.num_frames - 1) // (length - 1) // interval
            stride = int(rng.integers(stride, min(self.config.max_sample_stride, longest) + 1))
        step = stride * interval
        start = int(rng.integers(video.num_frames - (length - 1) * step))
        return [start + step * i for i in range(length)]

    def _covered(self, height: int, width: int, size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int]:
        """The height and width that frames of height x width are to cover before they are cut to `size`."""
        config = self.config
        if config.buckets is not None:
            return size
        short = config.image_size
        if config.random_scale is not None:
            short = round(config.crop_size * rng.uniform(*config.random_scale))
            short = max(config.crop_size, min(short, height, width))
        return short, short

    def _cut(self, frames: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        config = self.config
        if config.random_crop:
            frames = transforms.random_crop(frames, *size, rng)
        else:
            frames = transforms.center_crop(frames, *size)
        if config.flip and rng.random() < 0.5:
            frames = transforms.horizontal_flip(frames)
        if config.color_jitter:
            frames = transforms.jitter_colors(frames, rng)
        return transforms.to_video_tensor(frames)


class _ImageCache:
    """Decoded images by path, the least recently used dropped first; safe to use from several threads."""

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._images: OrderedDict[Path, np.ndarray] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    def read(self, path: Path) -> np.ndarray:
        with self._lock:
            if path in self._images:
                self._images.move_to_end(path)
                return self._images[path]
        image = read_image(path)
        with self._lock:
            if path not in self._images:
                self._images[path] = image
                self._bytes += image.nbytes
            while self._bytes > self._max_bytes:
                self._bytes -= self._images.popitem(last=False)[1].nbytes
        return image
