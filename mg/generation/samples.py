"""The index of a folder of samples: samples.jsonl, one line per sample, failed ones included, even in a killed run."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mg.data.rows import put_lines, read_lines

INDEX_FILE = "samples.jsonl"
OK, ERROR = "ok", "error"


@dataclass
class SampleRow:
    """One sample.

    Attributes:
        name: its file name without suffix.
        prompt: the prompt without its JSON suffix.
        status: ok or error; `error` is then the reason, in one line.
        settings: everything that the sample depends on.
        file: relative to the folder; a .png for a single frame, else an .mp4.
        frames, height, width, fps: of the file.
        pictures: pictures of its references, relative to the folder.
        seconds: the time it took, as its share of a batch.
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


def read_rows(folder: Path) -> dict[str, SampleRow]:
    """The samples of a folder by name; empty if there is no index."""
    return read_lines(folder / INDEX_FILE, SampleRow)


def record(folder: Path, rows: Iterable[SampleRow]) -> None:
    """Write rows to a folder's index, replacing those with the same names."""
    put_lines(folder / INDEX_FILE, rows, SampleRow, lambda row: row.name)
