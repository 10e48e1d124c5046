"""Buckets: which resolution, number of frames and aspect ratio each video or image is converted to.

    {"480p": {16: [1.0, 8]}, "720p": {16: [0.5, 4]}}     resolution -> frames -> [keep_prob, batch_size]

A resolution stands for a number of pixels. A video goes to the largest resolution it has at least 0.8 of the pixels
for, and there to the bucket with the most frames that it is long enough for. It stays with probability keep_prob, else
it moves on to the next lower resolution. So [0.0, null] is a stop sign: a video long enough for it is sent on, even if
that resolution has shorter buckets. keep_prob may be a pair, (to stay at this resolution, to stay at this number of
frames): a video that the second one rejects tries fewer frames first. Images use only the buckets of 1 frame, videos
all the others.

A name may end in _ar1:1, a single aspect ratio (width to height) instead of all, or in _max, the one with the most
pixels. `4K` and `4k` are the same.

Follows Open-Sora's opensora/datasets/bucket.py and aspect.py: the assignment and pairs of v1.2, the sizes of v2.0.
Sizes are computed from the number of pixels for any model's grid; v1.2's tables are in `mg.data.aspects`.
"""

import difflib
import itertools
import logging
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from numbers import Real
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from mg.data.errors import DataError

_logger = logging.getLogger(__name__)

ENOUGH_PIXELS = 0.8  # share of a resolution's pixels that a video needs to enter it
RESOLUTIONS = (
    "144p", "256px", "256", "240p", "360p", "512px", "512", "480p", "768px", "720p", "1024px", "1024", "1080p", "2k",
    "2048", "2880", "4k",
)  # fmt: skip
_BY_NAME = {"240p": 240 * 426, "480p": 480 * 854, "2k": 1440 * 2560, "4k": 2160 * 3840}
_RATIOS = ("2.39:1", "2:1", "16:9", "1.85:1", "5:8", "3:2", "4:3", "1:1")  # width to height, and their inverses

# Why a row has no place, and what would help; the lowest of several reasons counts.
TOO_SMALL, NO_LENGTH, STOPPED, NOT_KEPT = -1, -2, -3, -4
REASONS = {
    TOO_SMALL: f"less than {ENOUGH_PIXELS} of the pixels of the lowest resolution (add a lower one)",
    NO_LENGTH: "no bucket of its length (add one with fewer frames, or 1 frame for images)",
    STOPPED: "sent on by a keep_prob of 0, and no lower resolution takes it (add one)",
    NOT_KEPT: "not kept by chance (raise keep_prob)",
}


@dataclass(frozen=True)
class Bucket:
    """A resolution and a number of frames.

    Attributes:
        resolution: its name.
        num_frames: frames per clip.
        batch_size: clips per step and rank; 0 if no clip may enter.
        keep_prob: probability to stay at this resolution.
        frames_prob: probability to stay at this number of frames.
    """

    resolution: str
    num_frames: int
    batch_size: int
    keep_prob: float
    frames_prob: float


class Place(NamedTuple):
    """Where rows end up: a bucket and a size (height, width)."""

    bucket: Bucket
    size: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.bucket.resolution}, {self.bucket.num_frames} x {self.size[0]} x {self.size[1]}"


def read_buckets(config: Mapping[str, Any]) -> list[Bucket]:
    """The buckets of a config, sorted by resolution and then number of frames, largest first.

    Raises:
        DataError: an invalid name, number of frames, probability or batch size; the message names the bucket.
    """
    example = 'buckets in the form {"256px": {16: [1.0, 4]}}: resolution, frames, [keep_prob, batch_size]'
    if not isinstance(config, Mapping) or not config:
        raise DataError(f"buckets is {config!r}; it must hold {example}")
    buckets = {}
    for name, by_frames in config.items():
        resolution = str(name).lower()
        count_pixels(resolution)
        if not isinstance(by_frames, Mapping) or not by_frames:
            raise DataError(f"bucket {name}: it is {by_frames!r}; it must hold frames, as {example}")
        for frames, entry in by_frames.items():
            bucket = _read_bucket(resolution, frames, entry)
            if (resolution, bucket.num_frames) in buckets:
                raise DataError(f"bucket {name}, {frames} frames: it is given twice; leave one out")
            buckets[resolution, bucket.num_frames] = bucket
    if not any(bucket.batch_size for bucket in buckets.values()):
        raise DataError("buckets: every keep_prob is 0; at least one must be above 0, or nothing is left")
    places = {
        resolution: place for place, (resolution, _) in enumerate(reversed(buckets))
    }  # ties keep the config's order
    order = {name: (count_pixels(name), place) for name, place in places.items()}
    return sorted(buckets.values(), key=lambda b: (order[b.resolution], b.num_frames), reverse=True)


def _read_bucket(resolution: str, frames: Any, entry: Any) -> Bucket:
    def check(holds: bool, what: str, value: Any, wanted: str) -> None:
        if not holds:
            raise DataError(f"bucket {resolution}, {frames} frames: {what} is {value!r}; it must be {wanted}")

    number = int(frames) if str(frames).isdecimal() else 0
    check(number >= 1, "the number of frames", frames, "a whole number of at least 1")
    is_pair = isinstance(entry, list | tuple) and len(entry) == 2
    check(is_pair, "the entry", entry, "[keep_prob, batch_size], such as [1.0, 4]")
    given, batch_size = entry
    probabilities = tuple(given) if isinstance(given, list | tuple) else (given, 1.0)
    right = len(probabilities) == 2 and all(_is_number(p) and 0 <= p <= 1 for p in probabilities)
    check(right, "keep_prob", given, "from 0 to 1, or two such numbers, for the resolution and for the frames")
    open_to_some = min(probabilities) > 0
    right = isinstance(batch_size, int) and not isinstance(batch_size, bool) and batch_size >= 1
    check(right or (batch_size is None and not open_to_some), "the batch size", batch_size, "at least 1")
    return Bucket(resolution, number, batch_size if open_to_some else 0, *map(float, probabilities))


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def count_pixels(resolution: str) -> int:
    """The number of pixels that a resolution's name stands for: 256px and 256 are 256 x 256, 720p is 720 x 1280.

    Raises:
        DataError: an unknown name; the message suggests the nearest one.
    """
    name, underscore, setting = resolution.lower().partition("_")
    if underscore and setting not in ("max", *(f"ar{ratio}" for ratio in _all_ratios())):
        ratios = ", ".join(_all_ratios())
        raise DataError(f"bucket {resolution}: _{setting} must be _max or _ar with one of the ratios {ratios}")
    form = re.fullmatch(r"([1-9]\d*)(px|p|)", name)
    if name in _BY_NAME:
        return _BY_NAME[name]
    if form is None:
        nearest = difflib.get_close_matches(name, RESOLUTIONS, 1, cutoff=0)[0]
        raise DataError(f"bucket {resolution}: there is no resolution {name!r}; did you mean {nearest!r}?")
    height = int(form[1])
    return height * height * 16 // 9 if form[2] == "p" else height * height


def bucket_sizes(resolution: str, grid: int) -> dict[str, tuple[int, int]]:
    """The sizes (height, width) of a resolution by aspect ratio (width to height): multiples of `grid` with about the
    number of pixels that the name stands for.

    Raises:
        DataError: an unknown name, or fewer pixels than one grid cell.
    """
    pixels, (_, _, setting) = count_pixels(resolution), resolution.lower().partition("_")
    if pixels < grid * grid:
        raise DataError(f"bucket {resolution}: it has {pixels} pixels; the model needs at least {grid} x {grid}")
    sizes = {ratio: _size(pixels, _ratio(ratio), grid) for ratio in _RATIOS}
    sizes |= {_turned(ratio): size[::-1] for ratio, size in sizes.items()}
    if setting == "max":
        return dict([max(sizes.items(), key=lambda item: item[1][0] * item[1][1])])
    return {ratio: size for ratio, size in sizes.items() if setting in ("", f"ar{ratio}")}


def computed_sizes(resolution: str, grid: int) -> dict[float, tuple[int, int]]:
    """`bucket_sizes` by height / width."""
    return {1 / _ratio(ratio): size for ratio, size in bucket_sizes(resolution, grid).items()}


def _size(pixels: int, ratio: float, grid: int) -> tuple[int, int]:
    """Open-Sora 2.0's rule: round both sides down, then move one of them by a cell if that is closer to `pixels`."""
    width = max(grid, int(math.sqrt(pixels * ratio) // grid) * grid)
    height = max(grid, int(pixels / width // grid) * grid)
    nearby = [(0, 0), (-grid, 0), (grid, 0), (0, -grid), (0, grid)]
    sizes = [(height + up, width + wider) for up, wider in nearby if height + up and width + wider]
    return min(sizes, key=lambda size: abs(size[0] * size[1] - pixels))


def _ratio(name: str) -> float:
    width, height = map(float, name.split(":"))
    return width / height


def _turned(name: str) -> str:
    return ":".join(reversed(name.split(":")))


def _all_ratios() -> list[str]:
    return list(dict.fromkeys([*_RATIOS, *map(_turned, _RATIOS)]))


class Sources(NamedTuple):
    """What N files contain, as arrays (N,): `length`, how many frames a clip could have after thinning and strides;
    `height` and `width` in pixels; `still`, whether the file is an image."""

    length: np.ndarray
    height: np.ndarray
    width: np.ndarray
    still: np.ndarray


class Assignment:
    """Which rows of `sources` may go where. `places` are all pairs of a bucket and a size, `draw` picks among them.

    Args:
        config: the buckets.
        grid: sizes are multiples of this, a model's `spatial_compression`.
        sources: the rows.
        sizes_by_shape: maps a resolution and a grid to sizes, height / width -> (height, width); by default
            `computed_sizes`.

    Raises:
        DataError: the config is invalid.
    """

    def __init__(self, config: Mapping, grid: int, sources: Sources, sizes_by_shape: Callable | None = None):
        self.places: list[Place] = []
        self._count = len(sources.length)
        self._resolutions = []  # for each: the rows large enough, and the buckets with their rows long enough
        pixels, ratios = sources.height * sources.width, sources.height / sources.width
        for resolution, buckets in groupby(read_buckets(config), key=lambda bucket: bucket.resolution):
            by_shape = (sizes_by_shape or computed_sizes)(resolution, grid)
            sizes = list(dict.fromkeys(by_shape.values()))
            distances = np.abs(ratios - np.array([[shape] for shape in by_shape]))  # (shapes, N)
            number = np.array([sizes.index(size) for size in by_shape.values()])[distances.argmin(0)]
            large_enough = pixels >= ENOUGH_PIXELS * count_pixels(resolution)
            options = []
            for bucket in buckets:
                takes = sources.still if bucket.num_frames == 1 else ~sources.still
                options.append((bucket, takes & (sources.length >= bucket.num_frames), len(self.places) + number))
                self.places += [Place(bucket, size) for size in sizes]
            self._resolutions.append((large_enough, options))

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """For each row the index of its place in `places`, or a negative reason why it has none: (N,)."""
        found = np.full(self._count, TOO_SMALL)
        for large_enough, options in self._resolutions:
            here = np.flatnonzero(large_enough & (found < 0))
            found[here] = np.minimum(found[here], NO_LENGTH)
            for bucket, fits, place in options:
                settled = fits[here]
                offered = here[settled]
                stays = _happens(bucket.frames_prob, len(offered), rng)
                kept = stays & _happens(bucket.keep_prob, len(offered), rng)
                reason = NOT_KEPT if bucket.batch_size else STOPPED
                found[offered] = np.where(kept, place[offered], np.minimum(found[offered], reason))
                settled[settled] = stays
                here = here[~settled]
        return found

    def reachable(self) -> list[Place]:
        """The places that a row can get."""
        reached, looking = set(), np.full(self._count, True)
        for large_enough, options in self._resolutions:
            here = looking & large_enough
            goes_on = ~here
            for bucket, fits, place in options:
                offered = here & fits
                if bucket.batch_size:
                    reached |= set(place[offered].tolist())
                if bucket.keep_prob < 1:
                    goes_on |= offered
                if bucket.frames_prob == 1:
                    here &= ~offered
            looking &= goes_on | here
        return [self.places[number] for number in sorted(reached)]


class Groups:
    """A stand-in for `Assignment` in which each row has a fixed place.

    Args:
        places: the place of each row.
    """

    def __init__(self, places: Sequence[Place]):
        self.places = list(dict.fromkeys(places))
        numbers = {place: number for number, place in enumerate(self.places)}
        self._found = np.array([numbers[place] for place in places])

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        return self._found.copy()

    def reachable(self) -> list[Place]:
        return self.places


def _happens(probability: float, count: int, rng: np.random.Generator) -> np.ndarray:
    return rng.random(count) < probability if 0 < probability < 1 else np.full(count, probability == 1)


class Turn(NamedTuple):
    """One step: its epoch and place, the indices of all rows of that place in the epoch's order, and which global batch
    of them it is."""

    epoch: int
    place: Place
    rows: np.ndarray
    batch: int


class BucketSchedule:
    """Which place each step of a run takes its global batch from; a function of (seed, step, world_size).

    In an epoch each place has as many steps as its rows fill. The last one is filled by wrapping around; a place whose
    rows don't fill even one step has none. The steps of all places are shuffled. Thread-safe.

    Raises:
        DataError: no row is left for the first epoch; the message says why.
    """

    def __init__(self, assignment: Assignment | Groups, seed: int, world_size: int):
        self._assignment, self._seed, self._world_size = assignment, seed, world_size
        self._clips = np.array([place.bucket.batch_size for place in assignment.places]) * world_size
        self._first_steps = [0]  # of each epoch
        self._epochs: dict[int, tuple[list[np.ndarray], np.ndarray]] = {}  # the last two: see _plan
        self._lock = Lock()
        if not self.first_step(1):
            raise DataError(f"data.buckets: nothing is left: {self._left_out(self._draw(0)[0])}")

    def first_step(self, epoch: int) -> int:
        """The step at which an epoch begins."""
        while len(self._first_steps) <= epoch:
            steps = self._steps(self._draw(len(self._first_steps) - 1)[0])
            self._first_steps.append(self._first_steps[-1] + int(steps.sum()))
        return self._first_steps[epoch]

    def turn(self, step: int) -> Turn:
        """What a step draws from."""
        with self._lock:
            while self._first_steps[-1] <= step:
                self.first_step(len(self._first_steps))
            epoch = bisect_right(self._first_steps, step) - 1
            if epoch not in self._epochs:
                self._epochs = dict(list(self._epochs.items())[-1:])
                self._epochs[epoch] = self._plan(epoch)
            rows, turns = self._epochs[epoch]
        place, batch = turns[step - self._first_steps[epoch]]
        return Turn(epoch, self._assignment.places[place], rows[place], int(batch))

    def reachable(self) -> list[Place]:
        """The places that a row can get."""
        return self._assignment.reachable()

    def log(self) -> None:
        """Log what the first epoch consists of and what it leaves out."""
        found, _ = self._draw(0)
        counts = self._counts(found)
        for number in np.flatnonzero(self._steps(found)):
            place, steps = self._assignment.places[number], -(-counts[number] // self._clips[number])
            clips = f"{place.bucket.batch_size} x {self._world_size}"
            _logger.info("bucket %s: %d samples, %d steps of %s", place, counts[number], steps, clips)
        if left_out := self._left_out(found):
            _logger.warning("buckets leave out of %d rows, in the first epoch: %s", len(found), left_out)

    def _left_out(self, found: np.ndarray) -> str:
        """How many rows an epoch leaves out, by reason."""
        counts = self._counts(found)
        parts = [f"{(found == code).sum()}: {reason}" for code, reason in REASONS.items() if (found == code).any()]
        for number in np.flatnonzero((counts > 0) & (counts < self._clips)):
            place, clips = self._assignment.places[number], self._clips[number]
            parts.append(f"{counts[number]}: fewer than the {clips} of a step of bucket {place} (lower batch_size)")
        return "; ".join(parts)

    def _draw(self, epoch: int) -> tuple[np.ndarray, np.random.Generator]:
        # The extra number keeps this seed distinct from those of the loader's clips, which have four numbers.
        rng = np.random.default_rng((self._seed, epoch, 0, 0, 2))
        return self._assignment.draw(rng), rng

    def _counts(self, found: np.ndarray) -> np.ndarray:
        return np.bincount(found[found >= 0], minlength=len(self._clips))

    def _steps(self, found: np.ndarray) -> np.ndarray:
        """The number of steps of each place."""
        counts, clips = self._counts(found), np.maximum(self._clips, 1)
        return np.where(counts >= clips, -(-counts // clips), 0)

    def _plan(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """The rows of each place in order, and for each step its place and its batch number there."""
        found, rng = self._draw(epoch)
        steps, order = self._steps(found), rng.permutation(len(found))
        by_place = order[np.argsort(found[order], kind="stable")]
        ends = np.searchsorted(found[by_place], np.arange(len(steps) + 1))
        rows = [by_place[start:end] for start, end in itertools.pairwise(ends)]
        turns = [(place, number) for place in np.flatnonzero(steps) for number in range(steps[place])]
        return rows, rng.permutation(np.array(turns))
