"""Reads a row's clip or image, randomly chosen and cropped, as a tensor. This is the costly part of loading; which row
comes when is decided elsewhere.

Every random choice depends only on the clip's key and its file, so any process may read it. Each frame is scaled down
as it is decoded: at full size 32 frames of 1080p are 200 MB, which the kernel hands out in 60,000 pages, cleared under
a lock that the threads of a process share.
"""

from collections import OrderedDict
from collections.abc import Hashable
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from mg.data import transforms
from mg.data.decoding import VideoReader
from mg.data.errors import VideoError, reading
from mg.data.index import IndexRow
from mg.data.probe import Facts
from mg.data.timeline import Timeline, clip_length
from mg.data.video import is_image, open_video, read_image

if TYPE_CHECKING:
    from mg.data.loader import DataConfig

IMAGE_CACHE_BYTES = 512 * 2**20
_FACTS_KEPT = 256  # files
_SAME_SIZE = 0.05  # how much a side may differ from the index, relative: coded sizes are multiples of 16


class ClipReader:
    """Reads rows according to a config. Thread-safe.

    Args:
        config: how rows become clips.
        cache_bytes: size of the cache of decoded images.
        decoder: of videos: auto | decord | av, see `mg.data.video.open_video`.
    """

    def __init__(self, config: "DataConfig", cache_bytes: int = IMAGE_CACHE_BYTES, decoder: str = "auto"):
        self.config, self._decoder = config, decoder
        self._cache = _ImageCache(cache_bytes)
        self._facts = _FactsCache(_FACTS_KEPT)

    def read(self, row: IndexRow, num_frames: int, size: tuple[int, int], key: tuple[int, ...]) -> np.ndarray:
        """A clip of a row as a tensor, float32 (3, T, H, W) in [-1, 1]; T = 1 for an image.

        Args:
            size: H and W.
            key: the random seed: the same key gives the same clip.

        Raises:
            VideoError: the file cannot be read, or is too short.
        """
        rng = np.random.default_rng(key)
        with reading(row.path):
            if is_image(row.path):
                frames = self._cache.read(row.path)[None]  # (1, H, W, 3)
                height, width = frames.shape[1:3]
                self._check_index(row, height, width)
                frames = transforms.resize_to_cover(frames, *self._covered(height, width, size, rng))
            else:
                with self._open(row) as video:
                    self._check_index(row, video.height, video.width)
                    frames = self._draw(video, num_frames, size, rng)  # (T, h, w, 3)
            return self._cut(frames, size, rng)

    def size_in_index(self, row: IndexRow) -> tuple[int, int, int] | None:
        """What `measure` would return, if the index has it; else None."""
        config = self.config
        if not (row.height and row.width):
            return None
        if is_image(row.path):
            return 1, row.height, row.width
        if not row.num_frames or (row.fps is None and config.fps_max is not None):
            return None
        return clip_length(row.num_frames, row.fps or 0, config.fps_max, config.sample_stride), row.height, row.width

    def measure(self, row: IndexRow) -> tuple[int, int, int]:
        """How many frames a clip of a row's file could have, and the file's height and width.

        Raises:
            VideoError: the file cannot be read.
        """
        if is_image(row.path):
            height, width = read_image(row.path).shape[:2]
            return 1, height, width
        with self._open(row) as video:
            length = video.listed().length(self.config.fps_max, self.config.sample_stride)
            return length, video.height, video.width

    def frame_rate(self, row: IndexRow) -> float:
        """Frames per second of a row's file, before strides; 0 for an image.

        Raises:
            VideoError: the file cannot be read.
        """
        if is_image(row.path):
            return 0.0
        if row.fps is not None:
            return row.fps
        with self._open(row) as video:
            return video.listed().fps

    def _open(self, row: IndexRow) -> VideoReader:
        """The video of a row; facts about a file are cached until the file changes."""
        status = row.path.stat() if row.path.is_file() else None
        key = (row.path, status.st_size, status.st_mtime_ns) if status else None
        config = self.config
        video = open_video(row.path, self._decoder, config.square_pixels, config.allow_partial, self._facts.get(key))
        self._facts.put(key, video.facts)
        return video

    def _check_index(self, row: IndexRow, height: int, width: int) -> None:
        """Buckets trust the index's sizes, which may be those from before a phone's video is turned upright."""
        if self.config.buckets is None or not (row.height and row.width):
            return
        if abs(height / row.height - 1) > _SAME_SIZE or abs(width / row.width - 1) > _SAME_SIZE:
            raise VideoError(
                f"{row.path}: the index says {row.width} x {row.height}, but its frames are {width} x {height}; "
                "correct the columns width and height, or leave them out"
            )

    def _draw(self, video: VideoReader, length: int, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        """A clip from a random position in a video -> uint8 (T, h, w, 3).

        If a file's description is wrong, the clip ends early and is drawn again from a more reliable timeline.
        """
        config, timeline = self.config, None
        for timeline in video.timelines():
            starts = timeline.starts(length, timeline.step(config.fps_max, config.sample_stride))
            if starts == 0:
                continue
            step = timeline.step(config.fps_max, self._stride(timeline, length, rng))
            start = int(rng.integers(timeline.starts(length, step)))
            covered = self._covered(video.height, video.width, size, rng)
            covering = transforms.covering_size(video.height, video.width, *covered)
            frames = list(islice(video.clip(timeline, start, step, covering), length))
            if len(frames) == length:
                return np.stack(frames)
        found, needed = timeline.shortage(length, config.fps_max, config.sample_stride)
        raise VideoError(f"{video.path}: too short: {found}, {needed} needed")

    def _stride(self, timeline: Timeline, length: int, rng: np.random.Generator) -> int:
        config = self.config
        if config.max_sample_stride is None or length == 1:
            return config.sample_stride
        strides = range(config.sample_stride, config.max_sample_stride + 1)
        fitting = sum(timeline.starts(length, timeline.step(config.fps_max, stride)) > 0 for stride in strides)
        return int(rng.integers(config.sample_stride, config.sample_stride + fitting))

    def _covered(self, height: int, width: int, size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int]:
        """The height and width that frames of height x width should cover before they are cropped to `size`."""
        config = self.config
        if config.covers_size:
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
    """An LRU cache of decoded images by path. Thread-safe."""

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


class _FactsCache:
    """An LRU cache of the facts of videos. Thread-safe."""

    def __init__(self, max_files: int):
        self._max_files = max_files
        self._facts: OrderedDict[Hashable, Facts] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable) -> Facts | None:
        with self._lock:
            if key in self._facts:
                self._facts.move_to_end(key)
            return self._facts.get(key)

    def put(self, key: Hashable, facts: Facts) -> None:
        with self._lock:
            self._facts[key] = facts
            while len(self._facts) > self._max_files:
                self._facts.popitem(last=False)
