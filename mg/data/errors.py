"""What the data layer raises: `DataError` for an index or a whole data set, `VideoError` for one file of it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike


class DataError(ValueError):
    """An index, or a data set as a whole, that cannot be used; the message names file, row and what would be right."""


class VideoError(ValueError):
    """A video or image file that cannot be read or written; the message names it."""


class NoRoom(VideoError):
    """A file that there is not enough memory for; another time there may be."""


@contextmanager
def reading(path: str | PathLike, otherwise: str = "it cannot be read") -> Iterator[None]:
    """Whatever goes wrong inside is the file's fault, and leaves as a `VideoError` that names it.

    Decoders meet bytes that nobody foresaw: FFmpeg's errors, Pillow's, OpenCV's, `struct.error`, `TypeError` and
    `MemoryError` were all seen of files from the field.

    Args:
        otherwise: what is wrong with the file, where no `VideoError` says it.
    """
    try:
        yield
    except (DataError, VideoError):
        raise
    except MemoryError as error:
        raise NoRoom(f"{path}: {otherwise} (it takes more memory than there is)") from error
    except Exception as error:
        raise VideoError(f"{path}: {otherwise} ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    """What a decoder says of a file, in one line."""
    text = getattr(error, "strerror", None) or str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # decord puts a time and a place in its source in front: "[12:20:47] /.../video_reader.cc:486: "
    return re.sub(r"^\[[\d:]+\] \S+:\d+: ", "", lines[0]) if lines else type(error).__name__
