"""A JSON Lines file of named rows that several processes write; stays intact if one of them is killed."""

import contextlib
import fcntl
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from mg.checkpoints import atomic_write
from mg.data.errors import DataError
from mg.plain_text import json_line, split_lines, write_text


class Named(Protocol):
    """A row, a dataclass identified by its name."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    name: str


N = TypeVar("N", bound=Named)


def read_lines(path: Path, kind: type[N]) -> dict[str, N]:
    """The rows of a file by name; empty if there is no file.

    Raises:
        DataError: a malformed line.
    """
    try:
        lines = split_lines(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a text in UTF-8 ({error})") from None
    rows, names = {}, [entry.name for entry in fields(kind)]
    for number, line in enumerate(lines, 1):
        try:
            row = kind(**json.loads(line))
        except (ValueError, TypeError):
            raise DataError(f"{path}, line {number}: must be a JSON object with keys of {', '.join(names)}") from None
        rows[row.name] = row
    return rows


def put_lines(path: Path, rows: Iterable[N], kind: type[N], place: Callable[[N], Any]) -> None:
    """Put rows into a file atomically, replacing those with the same names, sorted by `place`."""
    with locked(path.with_name(".lock")):
        merged = read_lines(path, kind) | {row.name: row for row in rows}
        with atomic_write(path) as temporary:
            write_text(temporary, "".join(json_line(asdict(row)) for row in sorted(merged.values(), key=place)))


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold a lock between the processes of a machine, or of all machines that share the file system.

    Raises:
        DataError: another process holds it, and `wait` is False.
    """
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise DataError(
                f"{path.parent}: another run is writing there with the same rank; wait until it ends"
            ) from None
        yield
