"""What a folder of samples holds: samples.jsonl, a line for each, the failed ones too, whenever a run was killed."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mg.data.rows import put_lines, read_lines

INDEX_FILE = "samples.jsonl"
OK, ERROR = "ok", "error"


@dataclass
class Row:
    """One sample.

    Attributes:
        name: of its file, without suffix.
        prompt: without its JSON suffix.
        status: ok, or error: then `error` says why, in one line.
        settings: all that the sample depends on.
        file: below the folder; a .png for a single frame, else an .mp4.
        frames, height, width, fps: of the file.
        pictures: of its references, below the folder.
        seconds: that it took, its share of a batch.
    """

    name: str
    prompt: str
    status: str = OK
    error: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    file: str = ""
    frames: int = 0
    height: int = 0
    width: int = 0
    fps: float = 0.0
    pictures: list[str] = field(default_factory=list)
    seconds: float = 0.0


def read_rows(folder: Path) -> dict[str, Row]:
    """The samples of a folder by name; none where there is no index."""
    return read_lines(folder / INDEX_FILE, Row)


def record(folder: Path, rows: Iterable[Row]) -> None:
    """Put rows into a folder's index, in place of those of their names."""
    put_lines(folder / INDEX_FILE, rows, Row, lambda row: row.name)
