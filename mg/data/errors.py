"""What the data layer raises: `DataError` for an index or a whole data set, `VideoError` for one file; and `sparing`,
which lets the other files continue."""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike

_logger = logging.getLogger(__name__)


class DataError(ValueError):
    """An index or a whole data set that cannot be used; the message names the file, the row and what is expected."""


class VideoError(ValueError):
    """A video or image file that cannot be read or written; the message names it."""


class NoRoom(VideoError):
    """Not enough memory for a file; there may be at another time."""


@contextmanager
def reading(path: str | PathLike, otherwise: str = "it cannot be read") -> Iterator[None]:
    """Turn any exception raised inside into a `VideoError` that names the file.

    Decoders get bytes that nobody foresaw: real files have raised FFmpeg's, Pillow's and OpenCV's errors,
    `struct.error`, `TypeError` and `MemoryError`.

    Args:
        otherwise: what is wrong with the file, for exceptions other than `VideoError`.
    """
    try:
        yield
    except (DataError, VideoError):
        raise
    except MemoryError as error:
        raise NoRoom(f"{path}: {otherwise} (not enough memory)") from error
    except Exception as error:
        raise VideoError(f"{path}: {otherwise} ({_reason(error)})") from error


@contextmanager
def sparing(on_error: Callable[[Exception], None]) -> Iterator[None]:
    """Report any exception in the block to `on_error` and continue after it: a failure costs only one clip."""
    try:
        yield
    except Exception as error:
        _logger.debug("", exc_info=True)
        on_error(error.with_traceback(None))  # the traceback would keep the clip's memory alive


def _reason(error: Exception) -> str:
    """A decoder's error in one line."""
    text = getattr(error, "strerror", None) or str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # decord prefixes a time and a source location: "[12:20:47] /.../video_reader.cc:486: "
    return re.sub(r"^\[[\d:]+\] \S+:\d+: ", "", lines[0]) if lines else type(error).__name__
