"""How fast a run trains, how much of the time it waits for data, and how much memory it uses.

The speed is averaged over the last `WINDOW` updates. Updates with the first batch of a shape are excluded: they compile
the step or load kernels, which says nothing about later ones. The time between updates, when logs and checkpoints are
written, does not count either.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from mg import runtime
from mg.data.loader import Batch

WINDOW = 50
WAITS = 0.2  # share of the time spent waiting for data above which a run warns


class _Update(NamedTuple):
    """Seconds that an update took, seconds of them spent waiting for batches, and frames of all workers."""

    seconds: float
    waiting: float
    frames: int


class SpeedMeter:
    """Times the updates of a run.

        for ...:
            meter.begin()
            for batch in meter.timed(batches):
                ...
            meter.end()

    Each worker waits for its own data; if others wait longer, that counts as its compute time.

    Args:
        world_size: workers that share the batches; the frames are those of all.
        clock: returns seconds, from any starting point.
    """

    def __init__(self, world_size: int = 1, clock: Callable[[], float] = time.perf_counter):
        self.world_size, self._clock = world_size, clock
        self._recent: deque[_Update] = deque(maxlen=WINDOW)
        self._shapes: set[tuple[int, ...]] = set()
        self._has_warned = False
        self.begin()

    def begin(self) -> None:
        """Start an update."""
        self._begun, self._waiting, self._frames, self._typical = self._clock(), 0.0, 0, True

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches of the update, counting the time until each of them arrives, and its frames."""
        batches = iter(batches)
        while True:
            asked = self._clock()
            batch = next(batches, None)
            if batch is None:
                return
            self._waiting += self._clock() - asked
            clips, _, frames, *_ = batch.x.shape
            self._frames += clips * frames * self.world_size
            self._typical &= batch.x.shape in self._shapes
            self._shapes.add(batch.x.shape)
            yield batch

    def end(self) -> None:
        """Finish the update."""
        if self._typical:
            self._recent.append(_Update(self._clock() - self._begun, self._waiting, self._frames))

    def scalars(self) -> dict[str, float]:
        """frames_per_second, steps_per_second (updates), data_wait (share of the time) and peak_memory_gb (of the
        device, or on a CPU of the process); anything not known yet, or not available on this machine, is missing."""
        scalars = {}
        if self._recent:
            seconds, waiting, frames = map(sum, zip(*self._recent))
            scalars = {
                "frames_per_second": frames / seconds,
                "steps_per_second": len(self._recent) / seconds,
                "data_wait": waiting / seconds,
            }
        if peak := runtime.peak_memory():
            scalars["peak_memory_gb"] = peak[0] / 1e9
        return scalars

    def describe(self) -> str:
        """The same in words, with what was measured."""
        words, scalars = [], self.scalars()
        if self._recent:
            frames, steps, wait = (scalars[name] for name in ("frames_per_second", "steps_per_second", "data_wait"))
            updates = f"the last {len(self._recent)} updates of shapes seen before"
            words = [
                f"{frames:.3g} frames/s, {steps:.3g} updates/s and {wait:.0%} of the time waiting for data in {updates}"
            ]
        if peak := runtime.peak_memory():
            words.append(f"peak memory {peak[0] / 1e9:.2f} GB of the {peak[1]}")
        return ", ".join(words)

    def warning(self, num_workers: int) -> str | None:
        """Advice if data is too slow; once per run, when a whole window of updates shows it.

        Args:
            num_workers: workers that read data.
        """
        wait = self.scalars().get("data_wait", 0.0)
        if self._has_warned or len(self._recent) < WINDOW or wait < WAITS:
            return None
        self._has_warned = True
        processors = os.cpu_count() or 1
        advice = "more of them, or smaller files" if num_workers < processors else "smaller files, or more processors"
        return (
            f"training waits for data: {wait:.0%} of the time of the last {WINDOW} updates. data.num_workers is "
            f"{num_workers}, with {processors} processors here: {advice} would help; mg-benchmark-loader measures both"
        )
