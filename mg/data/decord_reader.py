"""Decoding with decord, for the kinds of files where a test proves that it returns FFmpeg's frames.

It is opt-in: it reads through a whole file before the first frame, needs more memory, and was no faster than PyAV when
measured (docs/performance.md).
"""

import itertools
from collections.abc import Iterable, Iterator
from contextlib import suppress

import numpy as np

from mg.data.decoding import AvReader, VideoReader
from mg.data.errors import VideoError, reading
from mg.data.probe import open_container
from mg.data.timeline import Timeline, take
from mg.data.transforms import resize

# Containers, by FFmpeg's names, and codecs that decord reads as FFmpeg does, provided that decoding can begin at each
# key frame and each is shown after everything that precedes it: tests/test_decoders.py compares every frame.
PROVED = {
    "mov": ("h264", "hevc", "mpeg4", "mpeg2video", "vp9", "mjpeg"),
    "matroska": ("h264", "hevc", "mpeg4", "mpeg2video", "vp8", "vp9", "mjpeg"),
}


class DecordReader(VideoReader):
    """decord, guided by what PyAV knows about a file. It reads the whole file first, and is correct for fewer files.

    Raises:
        VideoError: decord is not proved to read this file correctly.
    """

    def __init__(self, exact: AvReader):
        self.path, self.facts, self._exact = exact.path, exact.facts, exact
        self.height, self.width, self.fps = exact.height, exact.width, exact.fps
        decord = _decord()
        if decord is None:
            raise VideoError(f"{self.path}: decord cannot be imported here; use the backend 'av'")
        self._timeline = _proved(exact)
        if self._timeline is None:
            raise VideoError(f"{self.path}: decord is not proved to read such files correctly; use the backend 'av'")
        self._reader = decord.VideoReader(str(self.path), num_threads=1)
        if len(self._reader) != len(self._timeline):
            raise VideoError(f"{self.path}: decord sees {len(self._reader)} frames; use the backend 'av'")
        if self._reader[0].shape[2] != 3:  # it divides a padded line by the width, which can be wrong below 64
            raise VideoError(f"{self.path}: decord cannot read frames {self.width} wide; use the backend 'av'")

    def listed(self) -> Timeline:
        return self._timeline

    def decoded(self) -> Timeline:
        return self._timeline

    def timelines(self) -> Iterator[Timeline]:
        yield self._timeline

    def clip(
        self, timeline: Timeline | None = None, start: int = 0, step: float = 0.0, size: tuple[int, int] | None = None
    ) -> Iterator[np.ndarray]:
        times = zip(self._timeline.times[start:], itertools.count(start))
        for _, index in take(times, step, self._timeline.fps, self._timeline.times[start]):
            yield self.read([index], size)[0]

    def read(self, indices: Iterable[int], size: tuple[int, int] | None = None) -> np.ndarray:
        height, width = size or (self.height, self.width)
        frames = [np.empty((0, height, width, 3), np.uint8)]
        with reading(self.path, "frames do not decode"):
            for index in indices:
                if not 0 <= index < self.num_frames:
                    raise VideoError(f"{self.path}: frame {index} was requested, but there are {self.num_frames}")
                frames.append(resize(self._reader[int(index)].asnumpy(), height, width)[None])
        return np.concatenate(frames)

    def close(self) -> None:
        self._exact.close()
        self._reader = None


def _proved(exact: AvReader) -> Timeline | None:
    """The frames of a file that decord is proved to read correctly; else None."""
    container, stream = open_container(exact.path)
    with container:
        names, codec = container.format.name.split(","), stream.codec_context.name
        bits = max((component.bits for component in stream.format.components), default=8) if stream.format else 8
        packets = [packet for packet in container.demux(stream) if packet.size]
        shown = sorted(packet.pts for packet in packets if packet.pts is not None)
        place = {time: number for number, time in enumerate(shown)}
        plain = (
            any(codec in codecs for name, codecs in PROVED.items() if name in names)
            and bits == 8
            and len(place) == len(packets)
            and not any(exact.facts.turned)
            and not any(packet.is_discard or packet.is_corrupt for packet in packets)
            and all(
                place[packet.pts] == number and (codec != "h264" or _begins_anew(bytes(packet)))
                for number, packet in enumerate(packets)
                if packet.is_keyframe
            )
        )
        unit = float(stream.time_base)
    return Timeline.of([time * unit for time in shown], exact.fps or 25.0) if plain else None


def _begins_anew(packet: bytes) -> bool:
    """Whether an H.264 packet in mp4 or Matroska has an IDR picture, not just a recovery point."""
    at = 0
    while at + 4 < len(packet):
        if packet[at + 4] & 0x1F == 5:
            return True
        at += 4 + int.from_bytes(packet[at : at + 4], "big")
    return False


def _decord():
    """The decord module, or None if it is not installed."""
    with suppress(ImportError):  # if installed, before decord: the other order aborts the process
        import mindspore  # noqa: F401
    try:
        import decord
    except ImportError:
        return None
    decord.logging.set_level(decord.logging.QUIET)
    return decord
