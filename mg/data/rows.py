"""A file of rows that several processes write: a line of JSON for each, by name; whole, whenever one is killed."""

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
    """A row, a dataclass; its name tells it from others."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    name: str


N = TypeVar("N", bound=Named)


def read_lines(path: Path, kind: type[N]) -> dict[str, N]:
    """The rows of a file by name; none where there is no file.

    Raises:
        DataError: a line that is none.
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
    """Put rows into a file, all of them at once, in place of those of their names, and in the order of `place`."""
    with locked(path.with_name(".lock")):
        merged = read_lines(path, kind) | {row.name: row for row in rows}
        with atomic_write(path) as temporary:
            write_text(temporary, "".join(json_line(asdict(row)) for row in sorted(merged.values(), key=place)))


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold a lock between the processes of a machine, or of all that share the file system.

    Raises:
        DataError: another one holds it, and this one is not to wait.
    """
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise DataError(
                f"{path.parent}: another run is writing there, as the same rank; wait for its end"
            ) from None
        yield
