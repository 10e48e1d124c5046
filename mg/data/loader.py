"""Batches of clips and images from an index: deterministic, resumable at any step, the same for any number of workers.

The batch of global step s on rank r is a pure function of (seed, s, r, world_size): nothing depends on what was read
before or by which process. Each step is an image step or a video step on all ranks, and all its clips have the same
number of frames. Steps 0 .. s-1 contain exactly floor(s * image_ratio) image steps, evenly spread, so the ratio holds
on any number of devices.

Video steps draw from the videos, image steps from the images and from random frames of the videos. Each of these two
pools has its own epochs: a seeded permutation in which every row occurs once over all ranks, and which wraps around to
fill the last global batch.

With buckets (mg/data/buckets.py) each step has one bucket and one size on all ranks. In every epoch a place is drawn
for each row from the seed and the epoch, and the row occurs there once over all ranks; the batches of all places are
shuffled.
"""

import logging
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import partial
from itertools import count
from typing import Any, Literal, NamedTuple

import numpy as np

from mg.data import aspects
from mg.data.buckets import Assignment, BucketSchedule, Groups, Sources, computed_sizes, read_buckets
from mg.data.errors import DataError, VideoError
from mg.data.index import IndexRow
from mg.data.reader import ClipReader
from mg.data.versions import check_versions
from mg.data.video import is_image
from mg.data.workers import ReaderPool
from mg.overlap import read_ahead
from mg.plain_text import one_line
from mg.settings import require

_logger = logging.getLogger(__name__)

# The options that buckets override.
REPLACED_BY_BUCKETS = ("sample_n_frames", "image_size", "crop_size", "batch_size", "image_batch_size")
# The names that other commands have for options of the section `data`.
DATA_ALIASES = {"data.num_frames": "data.sample_n_frames", "data.frame_stride": "data.sample_stride"}


@dataclass
class DataConfig:
    """How rows of the index become batches.

    Attributes:
        buckets: resolution -> frames -> [keep_prob, batch_size], see mg.data.buckets; replaces sample_n_frames,
            image_size, crop_size, batch_size and image_batch_size.
        sample_n_frames: frames per clip on a video step.
        random_frames: draw the number of frames of each video step from 1 to sample_n_frames, the same for all its
            clips; videos need to be no longer than that.
        sample_stride: take every n-th frame of the file.
        max_sample_stride: if set, the stride is drawn from sample_stride to this, as far as the video is long enough.
        fps_max: frame rate above which a video is thinned to every n-th frame, n = ceil(fps / fps_max); strides count
            the frames that are left. By default no video is thinned. For a varying rate both count in seconds: frames
            are at least 1 / fps_max apart.
        image_size: the shorter side is resized to this many pixels before the crop.
        crop_size: height and width that the model sees.
        random_crop: crop anywhere instead of in the middle.
        flip: mirror half of the clips left to right.
        random_scale: if set, (lo, hi): the shorter side is resized to crop_size * uniform(lo, hi) instead of
            image_size, but never enlarged beyond what the crop needs.
        color_jitter: shuffle the channels, scale and invert them at random.
        batch_size: clips per step and rank.
        image_ratio: share of the steps that are image steps (T = 1), by default 0.2. With buckets, share of the steps
            whose clips are cut to a single video frame, by default 0: images have their own buckets.
        image_batch_size: images per image step and rank; by default batch_size.
        square_pixels: scale videos with non-square pixels (anamorphic ones) to square pixels, as players do.
        allow_partial: use the frames that decode of a video that is cut short or damaged; else it counts as unreadable.
        num_workers: processes that read ahead, one batch each; 0 reads in the calling process, on demand.
        max_bad_share: the run stops when more than this share of the files could not be read.
    """

    buckets: dict[str, Any] | None = None
    sample_n_frames: int = 16
    random_frames: bool = False
    sample_stride: int = 1
    max_sample_stride: int | None = None
    fps_max: float | None = None
    image_size: int = 256
    crop_size: int = 256
    random_crop: bool = False
    flip: bool = False
    random_scale: tuple[float, float] | None = None
    color_jitter: bool = False
    batch_size: int = 1
    image_ratio: float | None = None
    image_batch_size: int | None = None
    square_pixels: bool = True
    allow_partial: bool = True
    num_workers: int = 4
    max_bad_share: float = 0.1

    def __post_init__(self):
        for name in ("sample_n_frames", "sample_stride", "image_size", "crop_size", "batch_size"):
            require(getattr(self, name) >= 1, self, name, "at least 1")
        require(self.image_batch_size is None or self.image_batch_size >= 1, self, "image_batch_size", "at least 1")
        least, most = self.sample_stride, self.max_sample_stride
        require(most is None or most >= least, self, "max_sample_stride", f"at least sample_stride, {least}")
        require(self.fps_max is None or self.fps_max > 0, self, "fps_max", "above 0")
        require(self.num_workers >= 0, self, "num_workers", "at least 0")
        require(self.image_ratio is None or 0 <= self.image_ratio <= 1, self, "image_ratio", "from 0 to 1")
        require(0 <= self.max_bad_share <= 1, self, "max_bad_share", "from 0 to 1")
        if self.random_scale is None:
            require(self.crop_size <= self.image_size, self, "crop_size", f"at most image_size, {self.image_size}")
        else:
            right = len(self.random_scale) == 2 and 1 <= self.random_scale[0] <= self.random_scale[1]
            require(right, self, "random_scale", "two numbers (lo, hi) with 1 <= lo <= hi")
        if self.buckets is not None:
            read_buckets(self.buckets)
            require(not self.random_frames, self, "random_frames", "false with buckets, which say how many")
            require(self.random_scale is None, self, "random_scale", "null with buckets, which say how large")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of clips when there are no buckets."""
        return self.crop_size, self.crop_size

    @property
    def covers_size(self) -> bool:
        """Whether frames are scaled to just cover the crop."""
        return self.buckets is not None

    def sizes_by_shape(self, resolution: str, grid: int) -> dict[float, tuple[int, int]]:
        """The sizes (height, width) of a bucket's resolution, by height / width."""
        return computed_sizes(resolution, grid)


@dataclass
class OpenSoraDataConfig(DataConfig):
    """DataConfig with the sizes that Open-Sora 1.x trains on.

    Attributes:
        frame_size: height and width of clips without buckets, instead of image_size and crop_size.
        bucket_sizes: the sizes of buckets: open-sora, from its tables, in which 240p at 9:16 is 240 x 426; or computed,
            multiples of the autoencoder's compression.
    """

    frame_size: list[int] | None = None
    bucket_sizes: Literal["open-sora", "computed"] = "open-sora"

    def __post_init__(self):
        super().__post_init__()
        pair = self.frame_size is None or (len(self.frame_size) == 2 and min(self.frame_size) >= 1)
        require(pair, self, "frame_size", "height and width, each at least 1")
        if self.buckets is not None:
            for resolution in self.buckets:
                self.sizes_by_shape(str(resolution).lower(), 1)

    @property
    def size(self):
        return tuple(self.frame_size) if self.frame_size is not None else super().size

    @property
    def covers_size(self):
        return super().covers_size or self.frame_size is not None

    def sizes_by_shape(self, resolution, grid):
        if self.bucket_sizes == "computed":
            return super().sizes_by_shape(resolution, grid)
        try:
            return aspects.sizes_by_shape(resolution)
        except ValueError as error:
            raise DataError(f"bucket {resolution}: {error}; or set bucket_sizes to computed") from None


class Batch(NamedTuple):
    """One step's data: `x`, float32 (B, 3, T, H, W) in [-1, 1], T = 1 on an image step, unless a custom reader returns
    something else; the rows' names, the rows, and the number of frames and size of the clips."""

    step: int
    epoch: int
    x: np.ndarray
    names: list[str]
    rows: Sequence[IndexRow] = ()
    num_frames: int = 0
    size: tuple[int, int] = (0, 0)


class _Part(NamedTuple):
    """What all ranks draw at a step.

    Attributes:
        pool: indices of the rows to draw from.
        starts: position in the pool at which to look for each clip, over all ranks.
        batch_size: clips per rank.
        num_frames: of each clip.
        size: height and width of each clip.
    """

    pool: np.ndarray
    starts: np.ndarray
    batch_size: int
    num_frames: int
    size: tuple[int, int]


class ClipLoader:
    """Batches of the rows of an index, for one rank of `world_size`.

    `bad_files` maps the name of each file that could not be read, in the batches returned so far, to the reason. The
    next readable row of the pool replaces it. With buckets, files whose size the index doesn't have are opened at once,
    and those that cannot be opened are in `bad_files` from the beginning.

    Args:
        rows: the index.
        config: how rows become batches.
        seed: of the order and of every random draw.
        rank, world_size: this process and the number of processes.
        grid: bucket sizes are multiples of this, a model's `spatial_compression`.
        reader: reads clips instead of a `ClipReader`, in this process.
        groups: where each row belongs, instead of buckets.

    Raises:
        DataError: there is no row, or none that the requested steps could use.
    """

    def __init__(
        self,
        rows: Sequence[IndexRow],
        config: DataConfig,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        grid: int = 1,
        reader: Any = None,
        groups: Groups | None = None,
    ):
        if not rows:
            raise DataError("there is no row to load")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; it must be from 0 to world_size - 1 = {world_size - 1}")
        self.config, self.seed, self.rank, self.world_size = config, seed, rank, world_size
        self.bad_files: dict[str, str] = {}
        check_versions()
        self._num_files = len({row.path for row in rows})
        self._reader = reader or ClipReader(config)
        self._workers = config.num_workers if reader is None else 0
        self._rows, self._schedule = rows, None
        assignment: Assignment | Groups | None = groups
        if groups is None and config.buckets is not None:
            self._rows, sources = self._measure(rows)
            assignment = Assignment(config.buckets, grid, sources, config.sizes_by_shape)
        if assignment is not None:
            self._schedule = BucketSchedule(assignment, seed, world_size)
            if rank == 0:
                self._log_buckets()
        self._videos = np.array([i for i, row in enumerate(self._rows) if not is_image(row.path)], int)
        self._images = np.arange(len(self._rows))  # a video serves as an image by one of its frames
        ratio = config.image_ratio
        if ratio is None:
            ratio = 0.2 if self._schedule is None else 0.0
        # Exact arithmetic: the count of image steps before step s must not drift with rounding.
        self._image_ratio = Fraction(ratio).limit_denominator(10**6) if len(self._videos) else Fraction(1)
        if self._schedule is None and self._image_ratio == 0 and len(self._videos) < len(rows):
            _logger.warning("image_ratio is 0: the %d images of the index are not used", len(rows) - len(self._videos))

    @property
    def batch_size(self) -> int | None:
        """Clips per video step and rank; None if buckets decide it."""
        return self.config.batch_size if self._schedule is None else None

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every video occurs once (every row, if all steps are image steps). With buckets, the steps of
        the first epoch: other epochs may have more or fewer if rows are kept by chance."""
        if self._schedule is not None:
            return self._schedule.first_step(epoch=1)
        if self._image_ratio == 1:
            return self._pool_steps(images=True)
        return -(-self._pool_steps(images=False) // (1 - self._image_ratio))  # rounded up

    @property
    def shapes(self) -> set[tuple[int, int, int, int, int]]:
        """With buckets, all shapes (B, 3, T, H, W) that batches can have: one for each bucket and each of its sizes
        that a row can get, plus one with T = 1 for each if image_ratio is above 0."""
        cuts = {self._image_ratio > 0, self._image_ratio == 1}
        return {
            (bucket.batch_size, 3, 1 if cut else bucket.num_frames, *size)
            for bucket, size in self._schedule.reachable()
            for cut in cuts
        }

    def is_image_step(self, step: int) -> bool:
        """Whether image_ratio makes the global step's clips single frames; the same on every rank."""
        return self._image_steps_before(step + 1) > self._image_steps_before(step)

    def num_frames(self, step: int) -> int:
        """Frames per clip of the global step; the same on every rank."""
        if self.is_image_step(step):
            return 1
        if self._schedule is not None:
            return self._schedule.turn(step).place.bucket.num_frames
        if not self.config.random_frames:
            return self.config.sample_n_frames
        # The extra number keeps this seed distinct from those of the clips, which have four numbers.
        rng = np.random.default_rng((self.seed, step, 0, 0, 1))
        return int(rng.integers(1, self.config.sample_n_frames + 1))

    def batches(self, start_step: int = 0) -> Generator[Batch, None, None]:
        """The batches of steps start_step, start_step + 1, ... without end, read ahead by `num_workers` processes.

        Closing the iterator ends the processes.

        Raises:
            DataError: more than `max_bad_share` of the files could not be read, or none of them could; or a process
                was killed from outside.
        """
        steps = count(start_step)
        if self._workers == 0:
            for step in steps:
                yield self._finish(step, *self._load(self._reader, step))
        with closing(ReaderPool(self.config)) as pool:
            for step, loaded in read_ahead(partial(pool.submit, self._load), steps, self._workers):
                yield self._finish(step, *loaded.result())

    def peek(self, step: int) -> tuple[np.ndarray | None, list[str]]:
        """A step's `x` and `names`, out of order: bad files are not counted, and x is None if there are too many."""
        x, rows, _ = self._load(self._reader, step)
        return x, [row.name for row in rows]

    def frame_rate(self, row: IndexRow) -> float:
        """Frames per second of a row's file, before strides; 0 for an image."""
        return self._reader.frame_rate(row)

    def _image_steps_before(self, step: int) -> int:
        return int(step * self._image_ratio)

    def _pool(self, images: bool) -> tuple[np.ndarray, int]:
        """The rows that an image or video step draws from, and how many each rank takes."""
        if images:
            return self._images, self.config.image_batch_size or self.config.batch_size
        return self._videos, self.config.batch_size

    def _pool_steps(self, images: bool) -> int:
        pool, batch_size = self._pool(images)
        return -(-len(pool) // (batch_size * self.world_size))

    def _log_buckets(self) -> None:
        for field in fields(self.config):
            value = getattr(self.config, field.name)
            replaced = self.config.buckets is not None and field.name in REPLACED_BY_BUCKETS
            if replaced and value != field.default:
                _logger.warning("data.%s is %s, but data.buckets overrides it", field.name, value)
        self._schedule.log()

    def _measure(self, rows: Sequence[IndexRow]) -> tuple[list[IndexRow], Sources]:
        """The rows whose size is known from the index or the file, and the possible clip length and size of each."""
        measured: list = [self._reader.size_in_index(row) for row in rows]
        unknown = [number for number, found in enumerate(measured) if found is None]
        if self.config.num_workers == 0 or not unknown:
            for number in unknown:
                measured[number] = _measure(self._reader, rows[number])
        else:
            with closing(ReaderPool(self.config)) as pool:
                futures = [pool.submit(_measure, rows[number]) for number in unknown]
                for number, future in zip(unknown, futures):
                    measured[number] = future.result()
        failed = {row.name: one_line(found) for row, found in zip(rows, measured) if isinstance(found, VideoError)}
        kept = [(row, found) for row, found in zip(rows, measured) if not isinstance(found, VideoError)]
        self._count_bad(failed, none_left=not kept)
        length, height, width = np.array([found for _, found in kept]).T  # (3, N)
        still = np.array([is_image(row.path) for row, _ in kept])
        return [row for row, _ in kept], Sources(length, height, width, still)

    def _part(self, step: int) -> _Part:
        length, size = self.num_frames(step), self.config.size
        if self._schedule is not None:
            turn = self._schedule.turn(step)
            pool, order, batch_size, size = turn.rows, None, turn.place.bucket.batch_size, turn.place.size
            step_in_epoch = turn.batch
        else:
            images = self.is_image_step(step)
            pool, batch_size = self._pool(images)
            pool_step = self._image_steps_before(step) if images else step - self._image_steps_before(step)
            epoch, step_in_epoch = divmod(pool_step, self._pool_steps(images))
            order = np.random.default_rng((self.seed, int(images), epoch)).permutation(len(pool))
        clips = batch_size * self.world_size
        starts = np.arange(step_in_epoch * clips, (step_in_epoch + 1) * clips) % len(pool)
        return _Part(pool, starts if order is None else order[starts], batch_size, length, size)

    def _load(self, reader: ClipReader, step: int) -> tuple[np.ndarray | None, list[IndexRow], dict[str, str]]:
        """Read the batch of a step: x (None if too many files are bad), rows, and the files that could not be read."""
        part = self._part(step)
        clips, rows = [], []
        failed: dict[str, str] = {}
        for i in range(part.batch_size):
            slot = self.rank * part.batch_size + i  # over all ranks
            start, key = int(part.starts[slot]), (self.seed, step, slot)
            clip, row = self._load_first_readable(reader, part, start, key, failed)
            if clip is None:
                return None, [], failed
            clips.append(clip)
            rows.append(row)
        return np.stack(clips), rows, failed  # (B, 3, T, H, W)

    def _load_first_readable(
        self, reader: ClipReader, part: _Part, start: int, key: tuple[int, ...], failed: dict[str, str]
    ) -> tuple[np.ndarray | None, IndexRow | None]:
        """The row at `start`, or else the next one that can be read; (None, None) if too many in a row cannot.

        Bad rows are not remembered: otherwise the order of reading would influence the batch.
        """
        for attempt in range(len(part.pool)):
            row = self._rows[part.pool[(start + attempt) % len(part.pool)]]
            try:
                return reader.read(row, part.num_frames, part.size, (*key, attempt)), row
            except VideoError as error:
                failed[row.name] = one_line(error)
                if len(failed) > self.config.max_bad_share * self._num_files:
                    break
        return None, None

    def _finish(self, step: int, x: np.ndarray | None, rows: list[IndexRow], failed: dict[str, str]) -> Batch:
        """Count a batch's bad files when it is returned, so that a run stops at the same step for any num_workers."""
        self._count_bad(failed, none_left=x is None)
        epoch = step // self.steps_per_epoch if self._schedule is None else self._schedule.turn(step).epoch
        size = self.config.size if self._schedule is None else self._schedule.turn(step).place.size
        return Batch(step, epoch, x, [row.name for row in rows], rows, self.num_frames(step), size)

    def _count_bad(self, failed: dict[str, str], none_left: bool = False) -> None:
        for name, reason in failed.items():
            if name not in self.bad_files:
                self.bad_files[name] = reason
                _logger.warning("skipped a file that cannot be used: %s", reason)
        bad, total, share = len(self.bad_files), self._num_files, self.config.max_bad_share
        if none_left or bad > share * total:
            some = "; ".join(list(self.bad_files.values())[:3]) + ("; ..." if bad > 3 else "")
            limit = f"more than max_bad_share = {share} allows" if bad > share * total else "and none is left"
            raise DataError(f"{bad} of {total} files could not be used, {limit}: {some}")


def _measure(reader: ClipReader, row: IndexRow) -> tuple[int, int, int] | VideoError:
    """The result of `reader.measure`, or its error."""
    try:
        return reader.measure(row)
    except VideoError as error:
        return error
