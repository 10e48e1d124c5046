"""Reading and writing videos and images as uint8 RGB frames.

What FFmpeg decodes through PyAV is the reference: frames in display order, with edit lists, display matrix, sample
aspect ratio and timestamps applied. The cost of a video is proportional to what is read: a whole file is only read if
all its frames are requested, or if its description turns out to be wrong. A file that is cut short, damaged (as far as
FFmpeg's decoders tell), empty or without a picture raises a `VideoError` that names it.

decord is opt-in, for the kinds of files where a test proves that it returns the same frames.
"""

import itertools
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from PIL import Image, ImageOps

from mg.checkpoints.atomic import atomic_write
from mg.data.decoding import AvReader, VideoReader
from mg.data.errors import VideoError, reading
from mg.data.probe import Facts
from mg.data.versions import check_versions

PathLike = str | os.PathLike

BACKENDS = ("auto", "decord", "av")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}


def is_image(path: PathLike) -> bool:
    """Whether the file's suffix is that of a still image."""
    return Path(path).suffix.lower() in IMAGE_SUFFIXES


def open_video(
    path: PathLike,
    backend: str = "auto",
    square_pixels: bool = True,
    allow_partial: bool = False,
    facts: Facts | None = None,
) -> VideoReader:
    """Open a video for reading. Use one reader per thread; a reader is cheap.

    Args:
        path: the file.
        backend: av | decord, for files where it is proved to return PyAV's frames | auto, which is av.
        square_pixels: scale frames with non-square pixels to square ones, as players do.
        allow_partial: read what decodes from a file that is cut short or damaged; else that is an error.
        facts: `VideoReader.facts` from opening the same file before: saves decoding the first frame.

    Raises:
        VideoError: the file is missing, empty, cut short, not a video, or has no frame that decodes.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)}")
    check_versions()
    _check_file(path)
    with reading(path, "not a video that can be decoded"):
        reader = AvReader(path, square_pixels, allow_partial, facts)
        if backend != "decord":
            return reader
        from mg.data.decord_reader import DecordReader  # only on request: it imports MindSpore

        return DecordReader(reader)


def read_image(path: PathLike) -> np.ndarray:
    """Decode a still image, upright -> uint8 RGB (H, W, 3). 16-bit images are scaled to 8 bits, alpha is dropped.

    Raises:
        VideoError: the file is missing, empty, cut short or not an image.
    """
    _check_file(path)
    with reading(path, "not an image that can be decoded"), Image.open(path) as image:
        image.load()
        with suppress(Exception):  # unreadable EXIF: leave the picture as stored
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip instead of scale
            image = Image.fromarray((np.asarray(image, np.uint32) >> 8).astype(np.uint8))
        return np.asarray(image.convert("RGB"))


def write_video(path: PathLike, frames: np.ndarray | Iterable[np.ndarray], fps: float) -> None:
    """Write uint8 RGB frames (T, H, W, 3) as H.264 that a browser plays (yuv420p, index first), atomically.

    Frames may come in pieces, an iterable of such arrays of the same size: then a video of any length needs only as
    much memory as one piece. H.264 needs even sides: an odd one is padded by repeating its last row or column.
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
        # The matrix and range that the conversion from RGB uses, so that players don't have to guess.
        stream.codec_context.colorspace = av.video.reformatter.Colorspace.SMPTE170M
        stream.codec_context.color_range = av.video.reformatter.ColorRange.MPEG
        for piece in itertools.chain([first], pieces):
            for frame in piece:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _even_pieces(path: PathLike, pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The pieces that have frames, padded to even sides."""
    size = None
    for piece in pieces:
        piece = _checked_frames(path, piece, dims=4)
        size = size or piece.shape[1:3]
        if piece.shape[1:3] != size:
            raise VideoError(f"{path}: a piece has frames of {piece.shape[1:3]}, the first one of {size}")
        if len(piece):
            yield np.pad(piece, ((0, 0), (0, size[0] % 2), (0, size[1] % 2), (0, 0)), mode="edge")


def write_image(path: PathLike, image: np.ndarray) -> None:
    """Write a uint8 RGB image (H, W, 3) in the format of the path's suffix, atomically."""
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
