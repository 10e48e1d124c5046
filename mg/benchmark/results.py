"""The rows of a benchmark: a CSV with one per video and model, which stays valid if the run is killed."""

import csv
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mg.checkpoints import atomic_write
from mg.evaluation.table import Table

OK, ERROR = "ok", "error"


@dataclass
class ResultRow:
    """The result of one model for one video; unknown values are None, and empty cells of the CSV.

    Attributes:
        name: the video, as the index has it.
        output: its file name, without suffix, under the output folder.
        model: the model's label.
        status: ok, or error: then `error` says why, in one line, and the figures are None.
        frames, height, width, fps: of the clip, as the model saw it.
        psnr, ssim, lpips, flolpips: means over the frames; `flow` is the estimator used by flolpips.
        encode_seconds, decode_seconds: without the compilation for the first clip of a shape.
        tiles: whether the model ran whole or in which tiles.
        latents: channels x t x h x w.
        cell: frames x height x width of the pixels per latent.
        peak_memory: bytes during encoding and decoding, of the device or of the process: `memory_of`.
    """

    name: str
    output: str
    model: str
    status: str = ERROR
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    lpips: float | None = None
    flolpips: float | None = None
    flow: str = ""
    encode_seconds: float | None = None
    decode_seconds: float | None = None
    tiles: str = ""
    latents: str = ""
    cell: str = ""
    peak_memory: int | None = None
    memory_of: str = ""
    error: str = ""

    @property
    def ok(self) -> bool:
        return self.status == OK

    @property
    def values(self) -> int:
        """Number of values of the video."""
        return 3 * self.frames * self.height * self.width

    @property
    def latent_values(self) -> int:
        product = 1
        for size in self.latents.split("x"):
            product *= int(size)
        return product


COLUMNS = [field.name for field in fields(ResultRow)]


def read_rows(path: Path) -> list[ResultRow]:
    """The complete rows of a results file, in order; an empty list if there is no file.

    A last row that was truncated because the run was killed is left out.

    Raises:
        ValueError: the file is not a results file.
    """
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    lines = [line for line in csv.reader(io.StringIO(text, newline="")) if line]
    if lines and not (text.endswith("\n") and len(lines[-1]) == len(lines[0])):
        lines.pop()
    if not lines:
        return []
    place = COLUMNS.index("tiles")
    if lines[0] == COLUMNS[:place] + COLUMNS[place + 1 :]:  # from an older version
        lines = [[*line[:place], "" if number else "tiles", *line[place:]] for number, line in enumerate(lines)]
    if lines[0] != COLUMNS:
        raise ValueError(f"{path}: its columns are not those of a benchmark's results; give another output_path")
    try:
        return [_row(values) for values in lines[1:]]
    except ValueError as error:
        raise ValueError(f"{path}: a row cannot be read ({error}); fix it, or give another output_path") from None


class Results:
    """A results file that starts with `rows` and grows with each `add`; see `Table`."""

    def __init__(self, path: Path, rows: Iterable[ResultRow] = ()):
        self._rows = list(rows)
        self._table = Table(path, COLUMNS, map(_values, self._rows))

    def add(self, row: ResultRow) -> None:
        """Add a row, and wait until it is on disk."""
        self._rows.append(row)
        self._table.add(_values(row))

    def save(self) -> None:
        """Make sure that all rows are written.

        Raises:
            OSError: the file cannot be written.
        """
        self._table.write(map(_values, self._rows))


def write_settings(path: Path, settings: dict) -> None:
    """Write the settings that the rows depend on, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _row(values: list[str]) -> ResultRow:
    if len(values) != len(COLUMNS):
        raise ValueError(f"{len(values)} cells instead of {len(COLUMNS)}: {','.join(values)[:80]}")
    cells: list[Any] = [_read(field.type, text) for field, text in zip(fields(ResultRow), values)]
    row = ResultRow(*cells)
    if row.status not in (OK, ERROR):
        raise ValueError(f"status {row.status!r}")
    return row


def _read(kind, text: str) -> str | int | float | None:
    if kind is str:
        return text
    if not text:
        return None
    return int(text) if kind == int | None else float(text)


def _values(row: ResultRow) -> list:
    return ["" if value is None else value for value in vars(row).values()]
