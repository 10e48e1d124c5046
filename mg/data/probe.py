"""What a video file says of itself, and what its first frame shows: cheap to see, whatever the length of the file.

What a container says of the number of frames is a hint: edit lists hide frames, streams are cut, joined and copied from
the middle, and headers are written before the end is known. `mg.data.video` finds out where a hint does not hold.
"""

import os
import re
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition

from mg.data.errors import VideoError
from mg.data.timeline import Timeline

_FASTEST = 240.0  # frames per second; above it stands the unit of a container's clock (1000, 90000), not a rate
_NARROWEST = 0.1  # of pixels, to their height; beyond it, or its inverse, the file is wrong
_DISCARDED = 0x2  # FFmpeg's AVINDEX_DISCARD_FRAME: decoded but not shown, by an edit list


@dataclass(frozen=True)
class Facts:
    """A file's description of itself.

    Attributes:
        height, width: of the first frame, upright, in the pixels that are coded.
        square_height, square_width: the same in square pixels, as players show it.
        turned: how the first frame is brought upright, see `orientation`.
        rotation: of the first frame in degrees, by PyAV: frames of the same are turned like it.
        fps: frames per second, on average; 0 where nothing is known.
        first: time stamp of the first frame that decodes, in units of the stream; None where there are none, as in raw
            streams, or none to be trusted: AVI has none itself, and FFmpeg's for its B-frames are not in their order.
        claimed: the frames by what the container says; None where it says nothing that can be believed.
        listed: whether the container's index has an entry for each of them.
        found: what was found out of the frames since, by reading through the file.
    """

    height: int
    width: int
    square_height: int
    square_width: int
    turned: tuple[bool, bool, bool]
    rotation: int
    fps: float
    first: int | None
    claimed: Timeline | None
    listed: bool
    found: dict[str, Timeline | None] = field(default_factory=dict, compare=False)


def open_container(path: str | os.PathLike) -> tuple[av.container.InputContainer, av.VideoStream]:
    """A file and its stream of video: the first one that is not a cover.

    Raises:
        VideoError: there is none.
    """
    container = av.open(f"file:{path}")  # a colon in a name is no protocol's
    streams = [stream for stream in container.streams.video if stream.codec_context is not None]
    if not streams:
        container.close()
        raise VideoError(f"{path}: there is no video in this file that can be decoded")
    stream = min(streams, key=lambda stream: bool(stream.disposition & Disposition.attached_pic))
    # Loading is parallel over clips already; more threads per clip would only be in each other's way.
    stream.codec_context.thread_count = 1
    return container, stream


def describe(container: av.container.InputContainer, stream: av.VideoStream, first: av.VideoFrame) -> Facts:
    """What is known of a file once its first frame is decoded."""
    height, width = first.height, first.width
    square = height, max(1, round(width * pixel_aspect(stream)))
    turned = orientation(first)
    if turned[0]:
        height, width, square = width, height, square[::-1]
    fps = float(stream.average_rate or stream.guessed_rate or 0)
    untrue = container.format.name == "avi" and stream.codec_context.has_b_frames
    start = None if untrue else first.pts
    claimed = _claimed(container, stream, first, fps)
    listed = claimed is not None and len(getattr(stream, "index_entries", ())) >= len(claimed)
    return Facts(height, width, *square, turned, first.rotation, fps, start, claimed, listed)


def pixel_aspect(stream: av.VideoStream) -> float:
    """The width of a pixel to its height."""
    aspect = stream.sample_aspect_ratio
    return float(aspect) if aspect and _NARROWEST <= aspect <= 1 / _NARROWEST else 1.0


def orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """How a frame is brought upright by its display matrix: whether rows and columns are exchanged, and then whether it
    is turned upside down, and left to right.

    PyAV keeps a frame whose side data was asked for until the garbage collector comes by: not to be asked of every one.
    """
    data = frame.side_data.get(SideData.DISPLAYMATRIX)
    if data is None:
        return False, False, False
    # The point (x, y) of the frame is shown at (a x + c y, b x + d y).
    (a, b), (c, d) = np.frombuffer(bytes(data), np.int32).reshape(3, 3)[:2, :2].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        return True, b < 0, c < 0
    return False, d < 0, a < 0


def ends_early(path: str | os.PathLike, container: av.container.InputContainer, stream: av.VideoStream) -> bool:
    """Whether the file is shorter than its container says that it has been written."""
    size = Path(path).stat().st_size
    index = getattr(stream, "index_entries", ())  # PyAV 17 and later
    if "matroska" in container.format.name:
        return _matroska_size(path) > size
    return len(index) > 0 and index[len(index) - 1].pos + index[len(index) - 1].size > size


def _matroska_size(path: str | os.PathLike) -> int:
    """Where the segment of a Matroska or WebM file ends; 0 where that was left open, as in a live stream."""
    with open(path, "rb") as file:
        file.seek(4)  # behind the EBML header's name
        file.seek(_matroska_number(file), os.SEEK_CUR)
        file.seek(4, os.SEEK_CUR)  # behind the segment's name
        size = _matroska_number(file)
        return file.tell() + size if size >= 0 else 0


def _matroska_number(file: BinaryIO) -> int:
    """A number of 1 to 8 bytes, as many as the first one has leading zero bits, and one; -1 where all are ones."""
    first = file.read(1)[0]
    length = 9 - first.bit_length()
    number = int.from_bytes(bytes([first]) + file.read(length - 1), "big") - (1 << 7 * length)
    return number if number < (1 << 7 * length) - 1 else -1


def _claimed(
    container: av.container.InputContainer, stream: av.VideoStream, first: av.VideoFrame, fps: float
) -> Timeline | None:
    if first.pts is None or not 0 < fps <= _FASTEST:
        return None
    guessed = float(stream.guessed_rate or fps)
    if abs(guessed / fps - 1) > 0.02:  # the mean of a rate that varies, or the fields of interlaced frames
        index = getattr(stream, "index_entries", ())
        if len(index) < stream.frames or len(index) < 2:
            return None
        times = (float(entry.timestamp * stream.time_base) for entry in index if not entry.flags & _DISCARDED)
        return Timeline.of(times, fps)
    if stream.duration:
        seconds = Fraction(stream.duration) * stream.time_base
    elif tag := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", "")):  # Matroska's
        hours, minutes, rest = map(Fraction, tag.groups())
        seconds = 3600 * hours + 60 * minutes + rest - first.pts * stream.time_base
    elif container.duration:  # of all streams; Matroska and FLV say when they end
        seconds = Fraction(container.duration, av.time_base) - first.pts * stream.time_base
    else:
        return None
    return Timeline.regular(max(1, round(seconds * Fraction(fps))), fps)
