"""Remarks about files that are imperfect but still read: one warning for each, and the totals when the process ends.

A loader worker logs nothing itself: it hands its remarks to the process that started it, which logs each one once, even
if several workers read the file.
"""

import atexit
import logging
from collections import Counter
from os import PathLike
from threading import Lock
from typing import NamedTuple

from mg.plain_text import printable

_logger = logging.getLogger(__name__)

PARTIAL, HDR = "partial", "hdr"
_COUNTED = {
    PARTIAL: "files that are cut short or damaged, whose decodable frames were used (allow_partial)",
    HDR: "HDR files that were read without tone mapping, and are pale",
}


class Remark(NamedTuple):
    kind: str
    path: str
    text: str


_said: dict[tuple[str, str], Remark] = {}
_held: list[Remark] | None = None  # in a worker: the remarks to hand over
_lock = Lock()


def remark(kind: str, path: str | PathLike, text: str) -> None:
    """Log a remark, unless one of this kind was already made about this file."""
    new = Remark(kind, str(path), text)
    with _lock:
        if (kind, new.path) in _said:
            return
        if not _said and _held is None:
            atexit.register(_say_counts)
        _said[kind, new.path] = new
    if _held is None:
        _logger.warning("%s: %s", printable(new.path), text)
    else:
        _held.append(new)


def was_said(kind: str, path: str | PathLike) -> bool:
    """Whether a remark of this kind was made about this file."""
    return (kind, str(path)) in _said


def counts() -> list[str]:
    """The number of files for each kind of remark, one line each."""
    found = Counter(kind for kind, _ in _said)
    return [f"{_COUNTED[kind]}: {count}" for kind, count in found.items() if kind in _COUNTED]


def _say_counts() -> None:
    for line in counts():
        _logger.warning(line)


def hold() -> None:
    """From now on, keep remarks for `hand_over`."""
    global _held
    _held = []


def hand_over() -> list[Remark]:
    """The remarks since the last call."""
    assert _held is not None
    new = _held[:]
    _held.clear()
    return new
