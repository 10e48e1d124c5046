"""Decoding the frames of a video with PyAV.

    with AvReader(path) as video:
        frames = video.read(range(16))                       # (T, H, W, 3), by number
        for timeline in video.timelines(): ...               # or by time:
            for frame in video.clip(timeline, start=7, step=0.2, size=(256, 340)): ...

Frames come in FFmpeg's display order. Reading by number decodes from the beginning, and continues where it stopped.
Reading by time seeks to an earlier key frame, and makes sure to return the same frames as decoding from the beginning:
it skips frames shown before that key frame, and where the key frame is not the first to decode it seeks further back,
finally to the beginning.
"""

import itertools
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import av
import numpy as np

from mg.data.errors import VideoError, reading
from mg.data.hdr import ToneMapper, curve_of, kind_of
from mg.data.probe import Facts, describe, ends_early, open_container, orientation
from mg.data.remarks import HDR, PARTIAL, remark, was_said
from mg.data.timeline import Timeline, take
from mg.data.transforms import resize

Reader = TypeVar("Reader", bound="VideoReader")

# How many seconds before a frame to look for a key frame to decode from; tried one after the other.
_FURTHER_BACK = (0, 2, 10, 60)


class VideoReader:
    """An open video, also a context manager. Its content is what FFmpeg decodes: those frames in that order.

    Attributes:
        path: the file.
        facts: what the file says about itself.
        height, width: of the upright frames, in square pixels unless `square_pixels` is off.
        fps: frames per second, on average.
    """

    path: Path
    facts: Facts
    height: int
    width: int
    fps: float

    def clip(
        self, timeline: Timeline | None = None, start: int = 0, step: float = 0.0, size: tuple[int, int] | None = None
    ) -> Iterator[np.ndarray]:
        """Frames in order, uint8 RGB (H, W, 3), decoded lazily.

        Args:
            timeline: one of `timelines`.
            start: index in the timeline of the frame to begin with.
            step: seconds from one frame to the next, 0 for all frames.
            size: height and width that each frame is scaled to as it is decoded; by default those of the video.

        Raises:
            VideoError: a frame doesn't decode, or differs in size from the first.
        """
        raise NotImplementedError

    def read(self, indices: Iterable[int], size: tuple[int, int] | None = None) -> np.ndarray:
        """Decode the frames at `indices` (any order, repeats allowed) -> uint8 RGB (T, H, W, 3).

        Args:
            size: height and width that each frame is scaled to as it is decoded; by default those of the video.

        Raises:
            VideoError: an index is outside the video, or a frame doesn't decode.
        """
        raise NotImplementedError

    def timelines(self) -> Iterator[Timeline]:
        """What is known about the frames: first what the container says, then what is more certain but costs more to
        find out, and finally the frames that decode. Depends only on the file."""
        raise NotImplementedError

    def listed(self) -> Timeline:
        """The frames to choose from, by the container's index, or by their packets if it has no complete index.
        Matroska, FLV and transport streams are read through for this."""
        raise NotImplementedError

    def decoded(self) -> Timeline:
        """The frames that decode, found by decoding all of them.

        Raises:
            VideoError: the file is cut short or damaged, and `allow_partial` is off.
        """
        raise NotImplementedError

    @property
    def num_frames(self) -> int:
        """How many frames decode; raises like `decoded`."""
        return len(self.decoded())

    def close(self) -> None:
        """Release the file. Also happens when the reader is garbage-collected."""

    def __enter__(self: Reader) -> Reader:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class AvReader(VideoReader):
    """Decodes with PyAV.

    Args:
        counts: only count the frames that decode, for another reader, which does the reporting.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        square_pixels: bool,
        allow_partial: bool,
        facts: Facts | None,
        counts: bool = False,
    ):
        self.path, self._square_pixels, self._allow_partial = Path(path), square_pixels, allow_partial
        self._container: av.container.InputContainer | None = None
        self._cursor: Iterator[tuple[float, av.VideoFrame]] | None = None  # of `read`
        self._next = 0  # number of the cursor's next frame
        self._tone_mapper: ToneMapper | None = None
        self._counts = counts
        self._damaged = self._times_start_again = False
        self.facts = facts
        self._rewind()
        if self.facts is None:
            decoded = self._decode()
            first = next(decoded, None)
            if first is None:
                raise VideoError(f"{path}: there is no frame in this video that can be decoded")
            self.facts = describe(self._container, self._stream, first)
            self._begun: Iterator[av.VideoFrame] | None = itertools.chain([first], decoded)
        self.fps, self.height, self.width = self.facts.fps, self.facts.height, self.facts.width
        if square_pixels:
            self.height, self.width = self.facts.square_height, self.facts.square_width
        self._ends_early = ends_early(path, self._container, self._stream)
        if self._damaged or self._ends_early:
            self._note_damage()

    def listed(self) -> Timeline:
        with reading(self.path, "frames do not decode"):
            if self.facts.listed and not self._ends_early:
                return self.facts.claimed
            return self._packet_timeline() or self._decoded_timeline()

    def decoded(self) -> Timeline:
        with reading(self.path, "frames do not decode"):
            timeline = self._decoded_timeline()
            if timeline.damaged:
                self._note_damage()
            return timeline

    def timelines(self) -> Iterator[Timeline]:
        with reading(self.path, "frames do not decode"):
            if self.facts.claimed is not None:
                yield self.facts.claimed
            by_packets = self._packet_timeline()
            if by_packets is not None:
                yield by_packets
            yield self._decoded_timeline()

    def clip(
        self, timeline: Timeline | None = None, start: int = 0, step: float = 0.0, size: tuple[int, int] | None = None
    ) -> Iterator[np.ndarray]:
        with reading(self.path, "frames do not decode"):
            begin, fps = (0.0, self._rate) if timeline is None else (float(timeline.times[start]), timeline.fps)
            frames = self._frames(begin - 0.5 / fps if timeline is None or timeline.seekable else 0.0)
            for _, frame in take(frames, step, fps, begin):
                yield self._picture(frame, size)

    def read(self, indices: Iterable[int], size: tuple[int, int] | None = None) -> np.ndarray:
        places: dict[int, list[int]] = {}
        for place, index in enumerate(indices):
            places.setdefault(int(index), []).append(place)
        with reading(self.path, "frames do not decode"):
            frames = np.empty((sum(map(len, places.values())), *(size or (self.height, self.width)), 3), np.uint8)
            if not places:
                return frames
            first, last = min(places), max(places)
            if first < 0:
                raise VideoError(f"{self.path}: frame {first} was requested; the first one is 0")
            if self._cursor is None or first < self._next:
                self._cursor, self._next = self._frames(), 0
            cursor, self._cursor = self._cursor, None  # kept only if all goes well
            while self._next <= last:
                _, frame = next(cursor, (None, None))
                if frame is None:
                    missing = min(index for index in places if index >= self._next)
                    raise VideoError(f"{self.path}: frame {missing} was requested, but there are {self._next}")
                for place in places.get(self._next, ()):
                    frames[place] = self._picture(frame, size)
                self._next += 1
            self._cursor = cursor
        return frames  # (T, H, W, 3)

    def close(self) -> None:
        self._cursor = self._begun = None
        if self._container is not None:
            self._container.close()
            self._container = None

    @property
    def _rate(self) -> float:
        return self.fps or 25.0  # FFmpeg's own guess for a file without a rate

    def _rewind(self) -> None:
        """Reopen instead of seeking: not every file can seek."""
        self.close()
        self._container, self._stream = open_container(self.path)

    def _frames(self, start: float = 0.0) -> Iterator[tuple[float, av.VideoFrame]]:
        """The frames and their times in seconds, never decreasing, from the first frame or from one before `start`;
        the same frames either way.

        Raises:
            VideoError: a frame doesn't decode and `allow_partial` is off, or it differs in size from the first.
        """
        self._cursor = None
        decoded, number = self._sought(start) if start > 0 else None, None
        if decoded is None:
            decoded, number = self._begun, 0
            if decoded is None:
                self._rewind()
                decoded = self._decode()
        self._begun = None
        shift, last = 0.0, None
        for frame in decoded:
            if last is None:
                time = self._time(frame) or 0.0
            elif self._time(frame) is None or self._time(frame) + shift < last:  # joined, or without time stamps
                self._times_start_again = True
                time = last + 1 / self._rate
                shift = time - (self._time(frame) or 0.0)
            else:
                time = self._time(frame) + shift
            last = time
            if self._size(frame) != (self.facts.height, self.facts.width):
                where = f"changes at frame {number}"
                if number is None:
                    where = f"has changed by frame {round(time * self._rate)}"
                raise self._wrong_size(frame, where)
            number = None if number is None else number + 1
            yield time, frame

    def _time(self, frame: av.VideoFrame) -> float | None:
        if frame.pts is None or self.facts.first is None:
            return None
        return float((frame.pts - self.facts.first) * self._stream.time_base)

    def _sought(self, start: float) -> Iterator[av.VideoFrame] | None:
        """The frames decoded from a key frame shown at `start` or before; None if only reading from the beginning is
        sure to give the same frames."""
        if self.facts.first is None:
            return None
        if self._begun is not None:
            self._rewind()
        unit = float(self._stream.time_base)
        target = self.facts.first + int(start / unit)
        for back in _FURTHER_BACK:
            place = target - int(back / unit)
            if place <= self.facts.first:
                return None
            try:
                self._container.seek(place, stream=self._stream, backward=True)
            except av.FFmpegError:
                return None
            decoded = self._decode(target)
            first = next(decoded, None)
            if first is not None:
                return itertools.chain([first], decoded)
        return None

    def _decode(self, target: int | None = None) -> Iterator[av.VideoFrame]:
        """The frames that decode, from the current position. Packets before the first key frame may fail to decode.

        Args:
            target: begin with a key frame shown at this timestamp or before; yield nothing unless it is the first frame
                to decode. Frames after it in the file but shown before it lack their reference frames and are skipped.
        """
        key = None
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets, None)
            except av.FFmpegError:
                self._note_damage()
                packet = None
            if (
                packet is not None and packet.size == 0
            ):  # an empty AVI chunk repeats a frame; the flush packet isn't one
                continue
            if packet is not None and packet.is_keyframe and key is None:
                key = packet
                if target is not None and (key.pts is None or key.pts > target):
                    return
            if target is not None and key is None:
                if packet is None:
                    return
                continue
            try:
                frames = self._stream.codec_context.decode(packet)
            except av.FFmpegError:
                frames = []
                if key is not None:
                    self._note_damage()
            for frame in frames:
                if target is not None and frame.pts is not None and frame.pts < key.pts:
                    continue
                if target is not None and frame.pts != key.pts and not key.is_discard:
                    return
                if frame.is_corrupt:
                    if key is not None:
                        self._note_damage()
                    continue
                target = None
                yield frame
            if packet is None:
                return

    def _size(self, frame: av.VideoFrame) -> tuple[int, int]:
        """Height and width, upright."""
        return (frame.width, frame.height) if self._turned(frame)[0] else (frame.height, frame.width)

    def _wrong_size(self, frame: av.VideoFrame, where: str) -> VideoError:
        height, width = self._size(frame)
        sizes = f"from {self.facts.width} x {self.facts.height} to {width} x {height}"
        return VideoError(f"{self.path}: the size {where}, {sizes}; cut the file there")

    def _turned(self, frame: av.VideoFrame) -> tuple[bool, bool, bool]:
        return self.facts.turned if frame.rotation == self.facts.rotation else orientation(frame)

    def _picture(self, frame: av.VideoFrame, size: tuple[int, int] | None) -> np.ndarray:
        """uint8 RGB (H, W, 3), upright, in the requested size."""
        rows_for_columns, upside_down, mirrored = self._turned(frame)
        picture = self._to_sdr(frame).to_ndarray(format="rgb24")
        if rows_for_columns:
            picture = picture.transpose(1, 0, 2)
        picture = picture[:: -1 if upside_down else 1, :: -1 if mirrored else 1]
        return resize(picture, *(size or (self.height, self.width)))

    def _to_sdr(self, frame: av.VideoFrame) -> av.VideoFrame:
        curve = curve_of(frame, self._stream)
        if curve is None:
            return frame
        try:
            if self._tone_mapper is None or self._tone_mapper.kind != kind_of(frame):
                self._tone_mapper = ToneMapper(frame)
            return self._tone_mapper(frame)
        except Exception:  # an FFmpeg without the options, or a PyAV without the calls
            remark(HDR, self.path, f"HDR ({curve}), which this FFmpeg does not map to SDR; the one in PyAV 17.1 does")
            return frame

    def _note_damage(self) -> None:
        self._damaged = True
        if self.facts is None:  # reported once the first frame has decoded
            return
        if not self._allow_partial:
            raise self._cut_short()
        if not self._counts and not was_said(PARTIAL, self.path):
            remark(PARTIAL, self.path, f"{self._how_many_decode()}; they are used")

    def _cut_short(self) -> VideoError:
        return VideoError(f"{self.path}: cut short or damaged: {self._how_many_decode()}; allow_partial uses them")

    def _how_many_decode(self) -> str:
        decoded, claimed = len(self._decoded_timeline()), self.facts.claimed
        listed = len(claimed) if claimed is not None else 0
        return f"{decoded} of its {listed} frames decode" if listed > decoded else f"{decoded} frames decode"

    def _packet_timeline(self) -> Timeline | None:
        """The frames by the timestamps of all packets; None if those are missing or inconsistent."""
        if "packets" not in self.facts.found:
            self.facts.found["packets"] = None if self.facts.first is None else self._list_packets()
        return self.facts.found["packets"]

    def _list_packets(self) -> Timeline | None:
        shown: list = []
        decoded: list = []
        begun = False
        container, stream = open_container(self.path)
        unit = float(stream.time_base)
        with container, suppress(av.FFmpegError):
            for packet in container.demux(stream):
                begun = begun or packet.is_keyframe
                if packet.size and begun and not packet.is_discard:
                    shown.append(packet.pts)
                    decoded.append(packet.dts)
        known = [time for time in decoded if time is not None]
        if not shown or None in shown or len(set(shown)) < len(shown) or known != sorted(known):
            return None
        return Timeline.of([time * unit for time in shown], self._rate)

    def _decoded_timeline(self) -> Timeline:
        """The frames that decode, skipping those that don't."""
        if "frames" not in self.facts.found:
            with AvReader(self.path, self._square_pixels, True, self.facts, counts=True) as other:
                times = [time for time, _ in other._frames()]
            self.facts.found["frames"] = Timeline.of(
                times, self._rate, seekable=not other._times_start_again, damaged=other._damaged
            )
        return self.facts.found["frames"]
