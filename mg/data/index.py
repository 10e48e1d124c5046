"""The CSV index of a data set: a column `video` or `path`, and optionally `caption` or `text`, and what is known of the
files: `num_frames`, `height`, `width` and `fps`, as Open-Sora 2.0 writes them."""

import csv
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mg.data.errors import DataError

PATH_COLUMNS = ("video", "path")
CAPTION_COLUMNS = ("caption", "text")
SIZE_COLUMNS = ("num_frames", "height", "width")


@dataclass(frozen=True)
class IndexRow:
    """One file: where it lies, its name as the CSV writes it, its caption ("" if there is none), and as far as the CSV
    says, its frames, its height and width in pixels and its frames per second."""

    path: Path
    name: str
    caption: str = ""
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None


def read_index(csv_path: str | os.PathLike, video_folder: str | os.PathLike | None = None) -> list[IndexRow]:
    """Read an index (UTF-8, with or without a byte order mark). The files themselves are not looked at.

    Args:
        csv_path: the CSV, with a header line.
        video_folder: the folder that the paths are relative to and must lie in; by default the CSV's own, and then
            absolute paths may lie anywhere.

    Raises:
        DataError: no such CSV or folder, no path column, no row, an empty path, one that leads outside the folder, or
            a size or frame rate that is none.
    """
    csv_path = Path(csv_path)
    if not csv_path.is_file():
        raise DataError(f"{csv_path}: no such CSV file")
    if video_folder is not None and not Path(video_folder).is_dir():
        raise DataError(f"{video_folder}: no such video folder")
    folder = Path(os.path.abspath(csv_path.parent if video_folder is None else video_folder))
    try:
        with open(csv_path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True, strict=True)
            columns = [column.strip() for column in reader.fieldnames or []]
            reader.fieldnames = columns
            path_column = next((column for column in PATH_COLUMNS if column in columns), None)
            caption_column = next((column for column in CAPTION_COLUMNS if column in columns), None)
            if not columns:
                raise DataError(f"{csv_path}: the file is empty; it needs a header with a column 'video' or 'path'")
            if path_column is None:
                raise DataError(f"{csv_path}: no column 'video' or 'path'; its columns are {', '.join(columns)}")
            rows = [
                _row(csv_path, reader.line_num, record, path_column, caption_column, folder, video_folder is not None)
                for record in reader
            ]
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{csv_path}: not a CSV file in UTF-8 ({error})") from None
    if not rows:
        raise DataError(f"{csv_path}: there is no row below the header")
    return rows


def _row(
    csv_path: Path,
    line: int,
    record: dict,
    path_column: str,
    caption_column: str | None,
    folder: Path,
    confined: bool,
) -> IndexRow:
    name = (record[path_column] or "").strip()
    if not name:
        raise DataError(f"{csv_path}, line {line}: the column '{path_column}' is empty")
    path = Path(os.path.normpath(folder / name))
    absolute_is_fine = Path(name).is_absolute() and not confined
    if not absolute_is_fine and not path.is_relative_to(folder):
        raise DataError(f"{csv_path}, line {line}: {name} leads outside the folder {folder}")
    caption = (record[caption_column] or "").strip() if caption_column else ""
    sizes: dict[str, Any] = {column: _number(csv_path, line, record, column, whole=True) for column in SIZE_COLUMNS}
    return IndexRow(path, name, caption, **sizes, fps=_number(csv_path, line, record, "fps", whole=False))


def _number(csv_path: Path, line: int, record: dict, column: str, whole: bool) -> float | int | None:
    """What a column says; None where it is not there or holds nothing: "", nan, or 0, an image's frame rate."""
    text = (record.get(column) or "").strip()
    if text.lower() in ("", "nan"):
        return None
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    wrong = not math.isfinite(number) or number < 0 or (whole and (number < 1 or number != int(number)))
    if wrong:
        wanted = "a whole number of at least 1" if whole else "a number above 0"
        raise DataError(f"{csv_path}, line {line}: the column '{column}' is {text!r}; it must be {wanted}, or empty")
    return (int(number) if whole else number) or None
