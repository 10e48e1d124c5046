"""When the frames of a video are shown, and which of them a clip takes.

Clips are taken by time, in seconds, because phones, screen recorders and browsers write varying frame rates. At a
constant rate a step in seconds is a fixed number of frames, and the rule is Open-Sora's: every n-th frame,
n = ceil(fps / fps_max).
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np

T = TypeVar("T")


@dataclass(frozen=True)
class Timeline:
    """The frames of a video.

    Attributes:
        times: of the frames in seconds, increasing from 0 (N,).
        fps: frames per second; for a varying rate, by the median interval.
        seekable: whether the times can be used to seek; not if the file has none or they restart midway.
        damaged: whether there were more frames that do not decode.
    """

    times: np.ndarray
    fps: float
    seekable: bool = True
    damaged: bool = False

    @classmethod
    def regular(cls, num_frames: int, fps: float) -> "Timeline":
        return cls(np.arange(num_frames) / fps, fps)

    @classmethod
    def of(cls, times: Iterable[float], fps: float, **about: bool) -> "Timeline":
        """From times in any order and the rate that the file gives."""
        rising = np.sort(np.fromiter(times, float))
        step = float(np.median(np.diff(rising))) if len(rising) > 1 else 0.0
        if step > 0 and abs(1 / step / fps - 1) > 0.05:  # else the file knows better: times may be rounded
            fps = 1 / step
        return cls(rising - rising[:1], fps, **about)

    def __len__(self) -> int:
        return len(self.times)

    @property
    def is_regular(self) -> bool:
        """Whether every frame is where its number and the rate put it, to within half a frame."""
        return bool(np.all(np.abs(self.times * self.fps - np.arange(len(self))) < 0.5))

    def step(self, fps_max: float | None, stride: int) -> float:
        """Seconds between the frames of a clip that is thinned to `fps_max` and takes every `stride`-th frame of what
        is left; 0 means every frame."""
        frames = stride * frame_interval(self.fps, fps_max)
        if frames > 1:
            return frames / self.fps
        return 0.0 if fps_max is None else 1 / fps_max  # parts of a video may be faster than the whole

    def starts(self, num_frames: int, step: float) -> int:
        """At how many frames, counted from the beginning, a clip of `num_frames` can start."""
        last = len(self) - 1
        for _ in range(num_frames - 1):
            if step == 0:
                last -= 1
            else:
                last = int(np.searchsorted(self.times, self.times[last] - step + slack(step, self.fps), "right")) - 1
            if last < 0:
                return 0
        return last + 1

    def from_start(self, num_frames: int | None, fps_max: float | None, stride: int) -> tuple[int, float]:
        """How many frames a clip from the beginning has, at most `num_frames`, and their rate per second."""
        step = self.step(fps_max, stride)
        times = [time for time, _ in islice(take(zip(self.times, self.times), step, self.fps), num_frames)]
        if self.is_regular or len(times) < 2:
            return len(times), self.fps / (stride * frame_interval(self.fps, fps_max))
        return len(times), (len(times) - 1) / (times[-1] - times[0])

    def shortage(self, num_frames: int, fps_max: float | None, stride: int) -> tuple[str, int]:
        """What there is, in words, and how many frames of the video a clip of `num_frames` needs."""
        if self.is_regular:
            return f"{len(self)} frames", (num_frames - 1) * stride * frame_interval(self.fps, fps_max) + 1
        return f"{len(self)} frames, of which {self.length(fps_max, stride)} remain after thinning", num_frames

    def length(self, fps_max: float | None, stride: int) -> int:
        """How many frames a clip of the whole video has."""
        if self.is_regular:
            return clip_length(len(self), self.fps, fps_max, stride)
        return self.from_start(None, fps_max, stride)[0]


def take(frames: Iterable[tuple[float, T]], step: float, fps: float, start: float = 0.0) -> Iterator[tuple[float, T]]:
    """From frames with their times, take the first one at `start` and then one every `step` seconds."""
    due = start - 0.5 / fps
    for time, frame in frames:
        if time >= due:
            yield time, frame
            due = time + step - slack(step, fps)


def slack(step: float, fps: float) -> float:
    """How many seconds early a frame may be: containers round times, often to milliseconds."""
    return min(step / 4, 0.5 / fps)


def frame_interval(fps: float, fps_max: float | None) -> int:
    """The n for which every n-th frame keeps a video within `fps_max`; 1 (all frames) without a limit.

    Open-Sora's rule: ceil(fps / fps_max), so that with a limit of 16, 24 frames per second become 12 and not 16.
    """
    return math.ceil(fps / fps_max) if fps_max is not None and fps > fps_max else 1


def clip_length(num_frames: int, fps: float, fps_max: float | None, stride: int) -> int:
    """How many frames a clip of a constant-rate video could have, thinned to `fps_max` and with every `stride`-th of
    what is left."""
    return num_frames // frame_interval(fps, fps_max) // stride
