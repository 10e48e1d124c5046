"""Clips as the model sees them: the frames of a video, scaled and cropped, read in pieces or ahead by threads.

A clip that cannot be read, for any reason, is reported to `on_error`, and the others continue.
"""

import contextlib
import json
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from mg.config import require
from mg.data.buckets import REASONS, Assignment, Place, Sources, read_buckets
from mg.data.decoding import VideoReader
from mg.data.errors import NoRoom, VideoError, reading
from mg.data.index import IndexRow
from mg.data.timeline import Timeline
from mg.data.transforms import center_crop, covering_size, resize, to_video_tensor
from mg.data.video import is_image, open_video, read_image
from mg.memory import available_memory
from mg.overlap import read_ahead
from mg.plain_text import name_bytes

T = TypeVar("T")

GRID = 32  # pixels: a multiple that every model accepts without padding
_BYTES_READ = 3 * (1 + 4)  # per pixel: uint8 as read plus float32 as the model sees it


@dataclass(kw_only=True)
class ClipOptions:
    """How clips are read, and which device they run on.

    Args:
        video_folder: folder that the paths in the CSV are relative to; by default the CSV's folder.
        device: auto picks the first available of ascend, gpu and cpu.
        mode: graph compiles once per shape, pynative runs op by op; auto is pynative on a CPU, graph elsewhere.
        num_frames: frames of a clip, from the beginning; by default the whole video. Images are accepted at any value.
        frame_stride: take every n-th frame.
        fps_max: frame rate above which a video is first thinned, to every ceil(fps / fps_max)-th frame. With a variable
            frame rate, this and frame_stride count in seconds.
        image_size: short side after resizing, in pixels; 0 keeps the size of the video.
        crop: crop the middle to a square; otherwise the aspect ratio is kept.
        buckets: resolution -> frames -> [keep_prob, batch_size], see mg.data.buckets: each clip gets its bucket's
            frames (from the beginning), size and batch size instead of num_frames, image_size, crop and batch_size. A
            file that fits no bucket counts as unreadable. The keep_prob draw depends only on the file's path.
        square_pixels: scale videos with non-square pixels (anamorphic ones) to square pixels, as players do.
        allow_partial: use the frames that decode from a truncated or damaged video; otherwise it is unreadable.
        num_workers: threads that read ahead.
        max_memory: GB that running a clip may use; by default what is free when clips of its size first come.

    Raises:
        ValueError: a setting is out of range.
    """

    video_folder: str | None = None
    device: Literal["auto", "ascend", "gpu", "cpu"] = "auto"
    mode: Literal["auto", "graph", "pynative"] = "auto"
    num_frames: int | None = None
    frame_stride: int = 1
    fps_max: float | None = None
    image_size: int = 256
    crop: bool = True
    buckets: dict[str, Any] | None = None
    square_pixels: bool = True
    allow_partial: bool = False
    num_workers: int = 2
    max_memory: float | None = None

    def __post_init__(self):
        for name in ("num_frames", "frame_stride", "num_workers"):
            require(getattr(self, name) is None or getattr(self, name) >= 1, self, name, "at least 1")
        require(self.fps_max is None or self.fps_max > 0, self, "fps_max", "above 0")
        require(self.image_size >= 0, self, "image_size", "at least 1, or 0")
        require(self.max_memory is None or self.max_memory > 0, self, "max_memory", "above 0")
        if self.buckets is not None:
            read_buckets(self.buckets)

    def describe(self) -> dict[str, Any]:
        """All settings that the clips depend on, as JSON values."""
        names = ["frame_stride", "fps_max", "square_pixels", "allow_partial"]
        names += ["num_frames", "image_size", "crop"] if self.buckets is None else ["buckets"]
        return json.loads(json.dumps({name: getattr(self, name) for name in names}))


@dataclass
class Clip:
    """A video as the model sees it, `x` (3, T, H, W) in [-1, 1]. `index` is the number of its row; `batch_size` is its
    bucket's, if there are buckets."""

    index: int
    x: np.ndarray
    fps: float
    still: bool
    batch_size: int | None = None


def load_clip(path: Path, config: ClipOptions) -> tuple[np.ndarray, float]:
    """Read a video or image as the model sees it.

    Returns:
        x (3, T, H, W), float32 in [-1, 1], and its frame rate.

    Raises:
        VideoError: the file cannot be decoded or has too few frames.
    """
    with open_clip(path, config) as clip:
        return clip.read(0, clip.num_frames), clip.fps


@contextlib.contextmanager
def open_clip(path: Path, config: ClipOptions, grid: int = GRID) -> Iterator["OpenClip"]:
    """Open a video or image to be read in pieces, as the model sees it; raises the same errors as `load_clip`.

    Args:
        grid: bucket sizes are multiples of this: the model's `spatial_compression`.
    """
    if is_image(path):
        image = read_image(path)  # (H, W, C)
        height, width, _ = image.shape
        place = _place(path, config, grid, 1, height, width, still=True)
        size = _covering(config, place, height, width)
        yield OpenClip(path, lambda: iter([resize(image, *size)]), 1, 1.0, size, True, config, place)
        return
    with open_video(path, square_pixels=config.square_pixels, allow_partial=config.allow_partial) as video:
        length = 0 if config.buckets is None else video.listed().length(config.fps_max, config.frame_stride)
        place = _place(path, config, grid, length, video.height, video.width, still=False)
        timeline = _timeline(video, config, place.bucket.num_frames if place else config.num_frames)
        num_frames, fps = timeline.from_start(
            place.bucket.num_frames if place else config.num_frames, config.fps_max, config.frame_stride
        )
        size = _covering(config, place, video.height, video.width)
        step = timeline.step(config.fps_max, config.frame_stride)
        yield OpenClip(path, lambda: video.clip(timeline, 0, step, size), num_frames, fps, size, False, config, place)


def _timeline(video: VideoReader, config: ClipOptions, num_frames: int | None) -> Timeline:
    """The frames as far as they have to be known: all that decode, or just enough for a clip of `num_frames`."""
    if num_frames is None:
        return video.decoded()
    for timeline in video.timelines():
        if timeline.starts(num_frames, timeline.step(config.fps_max, config.frame_stride)):
            return timeline
    found, needed = timeline.shortage(num_frames, config.fps_max, config.frame_stride)
    raise VideoError(f"{video.path}: the video has {found}; {needed} are needed")


def _covering(config: ClipOptions, place: Place | None, height: int, width: int) -> tuple[int, int]:
    """The size that frames are scaled to before cropping."""
    if place:
        return covering_size(height, width, *place.size)
    return covering_size(height, width, config.image_size, config.image_size) if config.image_size else (height, width)


def _place(
    path: Path, config: ClipOptions, grid: int, length: int, height: int, width: int, still: bool
) -> Place | None:
    """The bucket and size of a file; None without buckets."""
    if config.buckets is None:
        return None
    assignment = Assignment(
        config.buckets, grid, Sources(*(np.array([each]) for each in (length, height, width, still)))
    )
    (number,) = assignment.draw(np.random.default_rng(zlib.crc32(name_bytes(path.as_posix()))))
    if number < 0:
        raise VideoError(f"{path}: no bucket takes its {length} frames of {height} x {width}: {REASONS[int(number)]}")
    return assignment.places[number]


class OpenClip:
    """An open clip: `num_frames`, `fps`, whether it is `still`, its bucket's `batch_size`, the `size` of its frames as
    the model sees them, and `read`.

    Args:
        path: the file.
        begin: returns an iterator over the clip's frames from the first on, uint8 (H, W, C), already scaled.
        num_frames, fps: of the clip.
        scaled: height and width of the frames from `begin`.
        config: how they are cropped.
        place: the clip's bucket and size, if there are buckets.
    """

    def __init__(
        self,
        path: Path,
        begin: Callable[[], Iterator[np.ndarray]],
        num_frames: int,
        fps: float,
        scaled: tuple[int, int],
        still: bool,
        config: ClipOptions,
        place: Place | None = None,
    ):
        self.num_frames, self.fps, self.still = num_frames, fps, still
        self.batch_size = place.bucket.batch_size if place else None
        self.size = place.size if place else (min(scaled),) * 2 if config.crop else scaled
        self._path, self._begin, self._num_workers = path, begin, config.num_workers
        self._frames = begin()
        self._next = 0  # number of the next frame in it
        self._last: np.ndarray | None = None  # the frames returned last
        self._end = 0  # end of their range

    def read(self, start: int, stop: int) -> np.ndarray:
        """Frames [start, stop) -> (3, stop - start, H, W), float32 in [-1, 1].

        Frames shared with the previous piece are not decoded again. When reading in order, only one piece is held.

        Raises:
            VideoError: frames do not decode, or (as NoRoom) do not fit into memory.
        """
        self._check_memory(stop - start)
        kept = self._end - start if self._last is not None and self._end - len(self._last) <= start < self._end else 0
        with reading(self._path):
            parts = [self._last[-kept:]] if kept else []
            if start + kept < stop:
                parts.append(self._decode(start + kept, stop))
            frames = (np.concatenate(parts) if len(parts) > 1 else parts[0])[: stop - start]
            self._last, self._end = frames, stop
            return to_video_tensor(frames)

    def _decode(self, start: int, stop: int) -> np.ndarray:
        """Frames [start, stop), uint8 (T, H, W, C), each cropped as it is decoded to hold no more than the clip."""
        if start < self._next:
            self._frames, self._next = self._begin(), 0
        frames, count = np.empty((stop - start, *self.size, 3), np.uint8), 0
        for frame in islice(self._frames, start - self._next, stop - self._next):
            frames[count] = center_crop(frame[None], *self.size)[0]
            count += 1
        self._next = stop
        if start + count < stop:
            raise VideoError(f"{self._path}: the video ends after {start + count} of {self.num_frames} frames")
        return frames

    def _check_memory(self, frames: int) -> None:
        """Raise NoRoom if `frames` frames, as the model sees them, don't fit into memory with those read ahead."""
        height, width = self.size
        needed, free = frames * height * width * _BYTES_READ, available_memory()
        if free is not None and needed * (self._num_workers + 1) > free:
            raise NoRoom(
                f"{self._path}: {frames} frames of {height}x{width} take {needed / 1e9:.1f} GB before the model even "
                f"runs, and {free / 1e9:.1f} GB of memory are free: take fewer (--num_frames, --frame_stride) or "
                "smaller ones (--image_size)"
            )


def open_clips(
    rows: list[IndexRow],
    config: ClipOptions,
    first: int,
    on_error: Callable[[int, Exception], None],
    grid: int = GRID,
) -> Iterator[tuple[int, OpenClip]]:
    """Clips in the order of the index, to be read in pieces; threads open them and read their `first` frames ahead.

    Args:
        on_error: called with the number of a row that cannot be opened; the others continue.
        grid: bucket sizes are multiples of this.

    Yields:
        A row's number and its clip, which is closed when the next one is requested.
    """

    def begin(row: IndexRow) -> tuple[OpenClip, contextlib.ExitStack]:
        with contextlib.ExitStack() as stack:
            clip = stack.enter_context(open_clip(row.path, config, grid))
            clip.read(0, min(first, clip.num_frames))
            return clip, stack.pop_all()

    for index, (clip, stack) in _ahead(begin, rows, config.num_workers, on_error):
        with stack:
            yield index, clip


def read_clips(
    rows: list[IndexRow], config: ClipOptions, on_error: Callable[[int, Exception], None], grid: int = GRID
) -> Iterator[Clip]:
    """Clips in the order of the index, read ahead by threads."""

    def load(row: IndexRow) -> tuple[np.ndarray, float, bool, int | None]:
        with open_clip(row.path, config, grid) as clip:
            return clip.read(0, clip.num_frames), clip.fps, clip.still, clip.batch_size

    for index, loaded in _ahead(load, rows, config.num_workers, on_error):
        yield Clip(index, *loaded)


def _ahead(
    job: Callable[[IndexRow], T], rows: list[IndexRow], num_workers: int, on_error: Callable[[int, Exception], None]
) -> Iterator[tuple[int, T]]:
    """The results of `job` for the rows, in order, computed by threads up to `num_workers` rows ahead."""
    with ThreadPoolExecutor(num_workers) as pool:
        for index, future in read_ahead(lambda index: pool.submit(job, rows[index]), range(len(rows)), num_workers):
            try:
                done = future.result()
            except Exception as error:  # a bad file may raise anything
                on_error(index, error)
                continue
            yield index, done
