"""What a video file says about itself and what its first frame shows: cheap to find out for a file of any length.

A container's number of frames is only a hint: edit lists hide frames, streams are cut, joined and copied from the
middle, and headers are written before the end is known. `mg.data.video` finds out when a hint is wrong.
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

_FASTEST = 240.0  # frames per second; anything above is a container's clock unit (1000, 90000), not a rate
_NARROWEST = 0.1  # pixel width to height; below this, or above its inverse, the file is wrong
_DISCARDED = 0x2  # FFmpeg's AVINDEX_DISCARD_FRAME: decoded but not shown, by an edit list


@dataclass(frozen=True)
class Facts:
    """A file's description of itself.

    Attributes:
        height, width: of the upright first frame, in coded pixels.
        square_height, square_width: the same in square pixels, as players show it.
        turned: how the first frame is turned upright, see `orientation`.
        rotation: of the first frame in degrees, by PyAV: frames with the same rotation are turned the same way.
        fps: frames per second, on average; 0 if unknown.
        first: timestamp of the first frame that decodes, in units of the stream; None if there are none, as in raw
            streams, or they are unreliable: AVI stores none, and those that FFmpeg makes up for B-frames are out of
            order.
        claimed: the frames as the container describes them; None if it says nothing credible.
        listed: whether the container's index has an entry for each of them.
        found: what reading through the file has since shown about its frames.
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
    """A file and its first video stream that is not a cover image.

    Raises:
        VideoError: there is no video stream.
    """
    container = av.open(f"file:{path}")  # else a colon in a name would look like a protocol
    streams = [stream for stream in container.streams.video if stream.codec_context is not None]
    if not streams:
        container.close()
        raise VideoError(f"{path}: there is no video in this file that can be decoded")
    stream = min(streams, key=lambda stream: bool(stream.disposition & Disposition.attached_pic))
    # Loading is already parallel over clips; more threads per clip would only get in each other's way.
    stream.codec_context.thread_count = 1
    return container, stream


def describe(container: av.container.InputContainer, stream: av.VideoStream, first: av.VideoFrame) -> Facts:
    """What is known about a file once its first frame is decoded."""
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
    """The ratio of a pixel's width to its height."""
    aspect = stream.sample_aspect_ratio
    return float(aspect) if aspect and _NARROWEST <= aspect <= 1 / _NARROWEST else 1.0


def orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """How a frame's display matrix turns it upright: whether to exchange rows and columns, and then whether to flip it
    vertically and horizontally.

    PyAV keeps a frame whose side data was accessed alive until the garbage collector runs: don't call this per frame.
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
    """Whether the file is shorter than its container says."""
    size = Path(path).stat().st_size
    index = getattr(stream, "index_entries", ())  # PyAV 17 and later
    if "matroska" in container.format.name:
        return _matroska_size(path) > size
    return len(index) > 0 and index[len(index) - 1].pos + index[len(index) - 1].size > size


def _matroska_size(path: str | os.PathLike) -> int:
    """Where the segment of a Matroska or WebM file ends; 0 if that was left open, as in a live stream."""
    with open(path, "rb") as file:
        file.seek(4)  # after the EBML header's ID
        file.seek(_matroska_number(file), os.SEEK_CUR)
        file.seek(4, os.SEEK_CUR)  # after the segment's ID
        size = _matroska_number(file)
        return file.tell() + size if size >= 0 else 0


def _matroska_number(file: BinaryIO) -> int:
    """A number of 1 to 8 bytes: one more than the first byte has leading zero bits; -1 if all value bits are ones."""
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
    elif container.duration:  # of all streams; in Matroska and FLV it is the end time
        seconds = Fraction(container.duration, av.time_base) - first.pts * stream.time_base
    else:
        return None
    return Timeline.regular(max(1, round(seconds * Fraction(fps))), fps)
