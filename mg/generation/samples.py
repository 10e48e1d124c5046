"""What a folder of samples holds: samples.jsonl, a line for each, the failed ones too, whenever a run was killed."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from mg.checkpoints import atomic_write
from mg.data.shards import locked
from mg.plain_text import json_line, split_lines, write_text

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
    """The samples of a folder by name; none where there is no index.

    Raises:
        ValueError: a line that is none.
    """
    path, names = folder / INDEX_FILE, [entry.name for entry in fields(Row)]
    try:
        lines = split_lines(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    rows = {}
    for number, line in enumerate(lines, 1):
        try:
            row = Row(**json.loads(line))
        except (ValueError, TypeError):
            raise ValueError(f"{path}, line {number}: must be a JSON object with keys of {', '.join(names)}") from None
        rows[row.name] = row
    return rows


def record(folder: Path, rows: Iterable[Row]) -> None:
    """Put rows into a folder's index, in place of those of their names."""
    with locked(folder / ".lock"):
        merged = read_rows(folder) | {row.name: row for row in rows}
        with atomic_write(folder / INDEX_FILE) as path:
            write_text(path, "".join(json_line(asdict(merged[name])) for name in sorted(merged)))
