"""A CSV whose rows are written as they come, so that a run that ends early, however it ends, leaves those it had."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mg.checkpoints import atomic_write, naming
from mg.plain_text import csv_line, encoded, write_text

_logger = logging.getLogger(__name__)


def error_of(write: Callable[[], None]) -> OSError | None:
    """Write what a run leaves at its end; why that failed, or None. Figures are worth more than their files: they are
    shown in any case."""
    try:
        write()
    except OSError as error:
        return error
    return None


class Table:
    """A file of rows, begun with a line of `columns` and the `rows` that are there already.

    A row that a full disk has no room for waits for the next one, or for `write`: the run goes on.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, columns: Sequence[str], rows: Iterable[Sequence] = ()):
        self.path, self._columns = path, columns
        self._end, self._waiting = 0, b""  # bytes of the file, and those that it has had no room for
        self.write(rows)

    def add(self, cells: Sequence[Any]) -> None:
        """Write a row behind the others, and wait until it is on disk."""
        self._waiting += encoded(csv_line(cells))
        try:
            with naming(self.path), open(self.path, "r+b") as file:
                file.seek(self._end)
                file.write(self._waiting)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, self._end)  # without a row that was cut short
            _logger.warning("%s: %s; what it lacks is written with the next row", self.path, error.strerror)
            return
        self._end, self._waiting = self._end + len(self._waiting), b""

    def write(self, rows: Iterable[Sequence]) -> None:
        """Write all rows anew, in their order, whole or not at all.

        Raises:
            OSError: the file cannot be written; what was there stays.
        """
        text = "".join(map(csv_line, [self._columns, *rows]))
        with atomic_write(self.path) as temporary:
            write_text(temporary, text)
        self._end, self._waiting = len(encoded(text)), b""
