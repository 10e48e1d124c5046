"""Reading and writing videos and images as uint8 RGB frames.

Videos are decoded by decord where it has a wheel (x86-64) and by PyAV everywhere else, and for the files that decord
misreads; both give the same frames, turned upright as the file's rotation says. A file cut short, empty, or without a
picture is a `VideoError` that names it. So is damage inside the stream, as far as the decoder tells: PyAV's does,
decord's conceals much of it.
"""

import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from PIL import Image, ImageOps

from mg.checkpoints.atomic import atomic_write

PathLike = str | os.PathLike

BACKENDS = ("auto", "decord", "av")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}

# Of frames that decord decodes at once where something becomes of them. Larger arrays come from the system each time,
# which clears their pages, under a lock that all threads share.
_PIECE_BYTES = 8 * 2**20


class VideoError(ValueError):
    """A video or image file that cannot be read or written; the message names it."""


def is_image(path: PathLike) -> bool:
    """Whether the file's suffix is that of a still image."""
    return Path(path).suffix.lower() in IMAGE_SUFFIXES


def frame_interval(fps: float, fps_max: float | None) -> int:
    """Every how many frames one is taken so that a video keeps to `fps_max`; 1, all of them, without a limit.

    Open-Sora's rule: ceil(fps / fps_max), so that 24 frames per second become 12 and not 16 where 16 is the limit.
    """
    return math.ceil(fps / fps_max) if fps_max is not None and fps > fps_max else 1


def clip_length(num_frames: int, fps: float, fps_max: float | None, stride: int) -> int:
    """How many frames a clip of a video could have, thinned to `fps_max` and with every `stride`-th of what is left."""
    return num_frames // frame_interval(fps, fps_max) // stride


def open_video(path: PathLike, backend: str = "auto") -> "VideoReader":
    """Open a video for reading. Use one reader per thread; a reader is cheap.

    Args:
        path: the file.
        backend: auto (decord where it can be imported and reads this file rightly, else PyAV) | decord | av.

    Raises:
        VideoError: the file is missing, empty, cut short, not a video, or has no frame that decodes.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)}")
    _check_file(path)
    packets = _list_packets(path)
    if backend == "decord" or (backend == "auto" and _decord() is not None):
        try:
            return _DecordReader(path, packets)
        except VideoError:  # PyAV's decoders are newer (AV1, say); where it fails too, its error is the clearer one
            if backend == "decord":
                raise
    return _AvReader(path, packets)


class VideoReader:
    """An open video: `num_frames`, `fps`, `height` and `width` (upright), and `read`. Also a context manager."""

    path: Path
    num_frames: int
    fps: float
    height: int
    width: int

    def read(self, indices: Iterable[int], each: Callable[[np.ndarray], np.ndarray] | None = None) -> np.ndarray:
        """Decode the frames at `indices` (any order, repeats allowed) -> uint8 RGB (T, H, W, 3).

        Args:
            each: what becomes of frames, (t, H, W, 3) to (t, h, w, 3), as they are decoded, a few at a time: such as
                scaling down, after which all of them are held in a fraction of the memory.

        Raises:
            VideoError: an index outside the video, or a frame that does not decode.
        """
        indices = [int(index) for index in indices]
        outside = [index for index in indices if not 0 <= index < self.num_frames]
        if outside:
            raise VideoError(f"{self.path}: frame {outside[0]} was asked for, of {self.num_frames}")
        if not indices:
            return np.empty((0, self.height, self.width, 3), np.uint8)
        return self._read(indices, each)

    def _read(self, indices: Sequence[int], each: Callable[[np.ndarray], np.ndarray] | None) -> np.ndarray:
        raise NotImplementedError

    def close(self) -> None:
        """Give the file back. Happens by itself when the reader goes out of use."""

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *_) -> None:
        self.close()


@dataclass(frozen=True)
class _Packets:
    """What the container says of its frames, without decoding.

    Attributes:
        index_of: presentation time -> number of the frame; None where the times are missing or repeat.
        suits_decord: 8 bits, no packet hidden by an edit list, and each key frame shown after all that precede it in
            the file. Else decord, which counts packets, seeks to wrong frames without a word, or rounds its own way.
    """

    index_of: dict[int, int] | None
    suits_decord: bool


def _list_packets(path: PathLike) -> _Packets:
    times: list[int] = []
    keys: list[tuple[int, int]] = []
    num_packets = 0
    try:
        with av.open(str(path)) as container:
            stream = _video_stream(path, container)
            bits = max((component.bits for component in stream.format.components), default=8) if stream.format else 8
            for packet in container.demux(stream):
                if packet.size == 0:  # the flush at the end
                    continue
                num_packets += 1
                if packet.is_corrupt:
                    raise VideoError(f"{path}: the file is damaged or cut short at frame {num_packets - 1}")
                if packet.is_discard:
                    continue
                if packet.is_keyframe:
                    keys.append((len(times), packet.pts))
                times.append(packet.pts)
            if num_packets < stream.frames:
                raise VideoError(f"{path}: cut short: {num_packets} of its {stream.frames} frames are there")
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"{path}: not a video that can be decoded ({_reason(error)})") from None
    if None in times or len(set(times)) < len(times):
        return _Packets(None, False)
    index_of = {time: index for index, time in enumerate(sorted(times))}
    in_order = len(times) == num_packets and all(index_of[time] == place for place, time in keys)
    return _Packets(index_of, in_order and bits == 8)


def _video_stream(path: PathLike, container):
    stream = next(iter(container.streams.video), None)
    if stream is None or stream.codec_context is None:
        raise VideoError(f"{path}: there is no video in this file that can be decoded")
    return stream


class _DecordReader(VideoReader):
    def __init__(self, path: PathLike, packets: _Packets):
        self.path = Path(path)
        decord = _decord()
        if decord is None:
            raise VideoError(f"{self.path}: decord cannot be imported here; use the backend 'av'")
        if not packets.suits_decord:
            raise VideoError(f"{self.path}: decord misreads files of this kind; use the backend 'av'")
        try:
            self._reader = decord.VideoReader(str(path), num_threads=1)
            self.num_frames = len(self._reader)
            self.fps = float(self._reader.get_avg_fps())
            # A first frame that decodes is what makes a file a video; it also gives the upright size.
            self.height, self.width, channels = self._reader[0].shape
        except (decord.DECORDError, RuntimeError, IndexError) as error:
            raise VideoError(f"{self.path}: not a video that can be decoded ({_reason(error)})") from None
        if channels != 3:  # decord divides a padded line by the width, which goes wrong where that is below 64
            raise VideoError(f"{self.path}: decord cannot read frames {self.width} wide; use the backend 'av'")

    def _read(self, indices: Sequence[int], each: Callable[[np.ndarray], np.ndarray] | None) -> np.ndarray:
        try:
            if each is None:
                return self._reader.get_batch(indices).asnumpy()
            count = max(1, _PIECE_BYTES // (self.height * self.width * 3))
            pieces = [indices[i : i + count] for i in range(0, len(indices), count)]
            return np.concatenate([each(self._reader.get_batch(piece).asnumpy()) for piece in pieces])
        except (_decord().DECORDError, RuntimeError, IndexError) as error:
            raise VideoError(f"{self.path}: frames do not decode ({_reason(error)})") from None

    def close(self) -> None:
        self._reader = None


class _AvReader(VideoReader):
    def __init__(self, path: PathLike, packets: _Packets):
        self.path = Path(path)
        self._container = None
        self._index_of = packets.index_of
        try:
            first = next(self._decode(), None)
            if self._index_of is None:
                self.num_frames = sum(1 for _ in self._decode())
            else:
                self.num_frames = len(self._index_of)
        except (av.FFmpegError, OSError) as error:
            raise VideoError(f"{self.path}: not a video that can be decoded ({_reason(error)})") from None
        if first is None:
            raise VideoError(f"{self.path}: there is no frame in this video")
        self.height, self.width = _to_rgb(first).shape[:2]
        self.fps = float(self._stream.average_rate or self._stream.guessed_rate or 0)

    def _decode(self, time: int | None = None) -> Iterator[av.VideoFrame]:
        """The frames from the first on, or from the key frame before `time`."""
        if self._container is None or time is None:  # opened anew rather than rewound: not every file can seek
            self.close()
            self._container = av.open(str(self.path))
            self._stream = _video_stream(self.path, self._container)
            # Loading is parallel over clips already; more threads per clip would only be in each other's way.
            self._stream.codec_context.thread_count = 1
        if time is not None:
            self._container.seek(time, stream=self._stream, backward=True)
        for frame in self._container.decode(self._stream):
            if frame.is_corrupt:
                raise VideoError(f"{self.path}: the frame at {frame.time} s is damaged")
            yield frame

    def _read(self, indices: Sequence[int], each: Callable[[np.ndarray], np.ndarray] | None) -> np.ndarray:
        wanted = set(indices)

        def taken(frame: av.VideoFrame) -> np.ndarray:
            picture = _to_rgb(frame)
            return picture if each is None else each(picture[None])[0]

        try:
            frames = self._read_by_time(wanted, taken) if self._index_of else {}
            if len(frames) < len(wanted):  # times that lie, or a key frame that is none: count from the start instead
                frames = self._read_by_count(wanted, taken)
        except (av.FFmpegError, OSError) as error:
            raise VideoError(f"{self.path}: frames do not decode ({_reason(error)})") from None
        missing = sorted(wanted - set(frames))
        if missing:
            raise VideoError(f"{self.path}: frame {missing[0]} of {self.num_frames} does not decode")
        return np.stack([frames[index] for index in indices])  # (T, H, W, 3)

    def _read_by_time(self, wanted: set, taken: Callable[[av.VideoFrame], np.ndarray]) -> dict:
        frames = {}
        first, last = min(wanted), max(wanted)
        time_of_first = next(time for time, index in self._index_of.items() if index == first)
        for frame in self._decode(time_of_first):
            index = self._index_of.get(frame.pts, -1)
            if index in wanted:
                frames[index] = taken(frame)
            if index >= last:
                break
        return frames

    def _read_by_count(self, wanted: set, taken: Callable[[av.VideoFrame], np.ndarray]) -> dict:
        frames = {}
        for index, frame in enumerate(self._decode()):
            if index in wanted:
                frames[index] = taken(frame)
            if len(frames) == len(wanted):
                break
        return frames

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
            self._container = None


def read_image(path: PathLike) -> np.ndarray:
    """Decode a still image, upright -> uint8 RGB (H, W, 3). 16-bit images are scaled to 8 bits, alpha is dropped.

    Raises:
        VideoError: the file is missing, empty, cut short or not an image.
    """
    _check_file(path)
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip instead of scale
                image = Image.fromarray((np.asarray(image, np.uint32) >> 8).astype(np.uint8))
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise VideoError(f"{path}: not an image that can be decoded ({_reason(error)})") from None


def write_video(path: PathLike, frames: np.ndarray | Iterable[np.ndarray], fps: float) -> None:
    """Write uint8 RGB frames (T, H, W, 3) as H.264 that a browser plays (yuv420p, index first); whole or not at all.

    Frames may come by pieces, an iterable of such arrays of one size: a video of any length takes as much memory as
    one piece. H.264 wants even sides: an odd one is padded by repeating its last row or column.
    """
    if not fps > 0:
        raise VideoError(f"{path}: fps is {fps}; it must be above 0")
    pieces = _even_pieces(path, [frames] if isinstance(frames, np.ndarray) else frames)
    first = next(pieces, None)
    if first is None:
        raise VideoError(f"{path}: there is no frame to write")
    with (
        atomic_write(path) as temporary,
        av.open(str(temporary), "w", format="mp4", options={"movflags": "faststart"}) as container,
    ):
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = first.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # One thread and no macroblock tree (which reads memory that it never set) give the same bytes every time.
        stream.options = {"crf": "16", "x264-params": "mbtree=0"}
        stream.codec_context.thread_count = 1
        # The matrix and range that the conversion from RGB uses, so that a player need not guess.
        stream.codec_context.colorspace = av.video.reformatter.Colorspace.SMPTE170M
        stream.codec_context.color_range = av.video.reformatter.ColorRange.MPEG
        for piece in itertools.chain([first], pieces):
            for frame in piece:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _even_pieces(path: PathLike, pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Those that have frames, padded to even sides."""
    size = None
    for piece in pieces:
        piece = _checked_frames(path, piece, dims=4)
        size = size or piece.shape[1:3]
        if piece.shape[1:3] != size:
            raise VideoError(f"{path}: a piece has frames of {piece.shape[1:3]}, the first one of {size}")
        if len(piece):
            yield np.pad(piece, ((0, 0), (0, size[0] % 2), (0, size[1] % 2), (0, 0)), mode="edge")


def write_image(path: PathLike, image: np.ndarray) -> None:
    """Write a uint8 RGB image (H, W, 3) in the format of the path's suffix; whole or not at all."""
    image = _checked_frames(path, image, dims=3)
    if not is_image(path):
        raise VideoError(f"{path}: an image's suffix must be one of {', '.join(sorted(IMAGE_SUFFIXES))}")
    done, encoded = cv2.imencode(Path(path).suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    if not done:
        raise VideoError(f"{path}: the image of shape {image.shape} could not be encoded")
    with atomic_write(path) as temporary:
        Path(temporary).write_bytes(encoded.tobytes())


def _checked_frames(path: PathLike, frames: np.ndarray, dims: int) -> np.ndarray:
    frames = np.asarray(frames)
    if frames.ndim != dims or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        layout = "(T, H, W, 3)" if dims == 4 else "(H, W, 3)"
        raise VideoError(f"{path}: cannot write {frames.dtype} of shape {frames.shape}; it must be uint8 {layout}")
    return np.ascontiguousarray(frames)


def _check_file(path: PathLike) -> None:
    path = Path(path)
    if not path.is_file():
        raise VideoError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise VideoError(f"{path}: the file is empty")


def _to_rgb(frame: av.VideoFrame) -> np.ndarray:
    """One decoded frame, turned upright -> uint8 (H, W, 3)."""
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90 % 4)


def _decord():
    """The decord module, or None where it has no wheel."""
    with suppress(ImportError):  # where there is one, before decord: the other order aborts the process
        import mindspore  # noqa: F401
    try:
        import decord
    except ImportError:
        return None
    decord.logging.set_level(decord.logging.QUIET)
    return decord


def _reason(error: BaseException) -> str:
    """What a decoder says of a file, in one line."""
    text = getattr(error, "strerror", None) or str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # decord puts a time and a place in its source in front: "[12:20:47] /.../video_reader.cc:486: "
    return re.sub(r"^\[[\d:]+\] \S+:\d+: ", "", lines[0]) if lines else type(error).__name__
