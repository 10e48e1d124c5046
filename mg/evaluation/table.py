"""A CSV whose rows are written as they come, so that a run that ends early, for any reason, keeps those it had."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from mg.checkpoints import atomic_write, naming
from mg.plain_text import csv_line, encoded, write_text

_logger = logging.getLogger(__name__)


def error_of(write: Callable[[], None]) -> OSError | None:
    """Call `write` for the final files of a run and return why it failed, or None. Results are worth more than their
    files: they should be shown in any case."""
    try:
        write()
    except OSError as error:
        return error
    return None


class Table:
    """A CSV file that starts with a header of `columns` and the existing `rows`.

    A row that doesn't fit on a full disk is retried with the next one, or in `write`; the run continues. Any thread may
    add rows.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, columns: Sequence[str], rows: Iterable[Sequence] = ()):
        self.path, self._columns = path, columns
        self._end, self._waiting = 0, b""  # size of the file in bytes, and the bytes not written yet
        self._lock = Lock()
        self.write(rows)

    def add(self, cells: Sequence[Any]) -> None:
        """Append a row, and wait until it is on disk."""
        with self._lock:
            self._add(cells)

    def _add(self, cells: Sequence[Any]) -> None:
        self._waiting += encoded(csv_line(cells))
        try:
            with naming(self.path), open(self.path, "r+b") as file:
                file.seek(self._end)
                file.write(self._waiting)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, self._end)  # drop a partly written row
            _logger.warning("%s: %s; the missing rows are written with the next one", self.path, error.strerror)
            return
        self._end, self._waiting = self._end + len(self._waiting), b""

    def write(self, rows: Iterable[Sequence]) -> None:
        """Rewrite the file with all rows, in the given order, atomically.

        Raises:
            OSError: the file cannot be written; the old one stays.
        """
        text = "".join(map(csv_line, [self._columns, *rows]))
        with atomic_write(self.path) as temporary:
            write_text(temporary, text)
        self._end, self._waiting = len(encoded(text)), b""
