"""The index of a data set, a CSV or parquet file with a column `video` or `path`, optionally `caption` or `text`, and
optionally facts about the files: `num_frames`, `height`, `width` and `fps`, as Open-Sora 2.0 writes them."""

import codecs
import csv
import io
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mg.data.errors import DataError
from mg.plain_text import one_line, printable

_logger = logging.getLogger(__name__)

PATH_COLUMNS = ("video", "path")
CAPTION_COLUMNS = ("caption", "text")
SIZE_COLUMNS = ("num_frames", "height", "width")
COLUMNS = (*PATH_COLUMNS, *CAPTION_COLUMNS, *SIZE_COLUMNS, "fps")

_NOTHING = {"", "nan", "none", "null", "na", "n/a", "<na>"}  # how pandas and other tools write missing values
_NUL = "\ufdd0"  # a code point that never occurs in text, to replace NUL, which some versions of csv cannot read


@dataclass(frozen=True)
class IndexRow:
    """One file: its path, its name as the index writes it, its caption ("" if there is none), and if the index has
    them, its number of frames, its height and width in pixels and its frames per second."""

    path: Path
    name: str
    caption: str = ""
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None


def read_index(csv_path: str | os.PathLike, video_folder: str | os.PathLike | None = None) -> list[IndexRow]:
    """Read an index: a CSV in UTF-8, with or without a byte order mark, or a .parquet file, which requires pyarrow or
    pandas. The files themselves are not opened.

    A row with sizes of 0, meaning that a tool found nothing in its file, is counted in the log and is not an error:
    reading the file will tell.

    Args:
        csv_path: the index; a CSV has a header line.
        video_folder: the folder that the paths are relative to and must be inside; by default the index's own folder,
            and then absolute paths may point anywhere.

    Raises:
        DataError: no such file or folder, no path column, no row, an empty path or one that leads outside the folder,
            an invalid size or frame rate, or unmatched quotes; the message names the line.
    """
    csv_path = Path(csv_path)
    if csv_path.is_dir():
        raise DataError(f"{csv_path}: is a folder; give a CSV or a parquet file in it")
    if not csv_path.is_file():
        raise DataError(f"{csv_path}: no such CSV file")
    if video_folder is not None and not Path(video_folder).is_dir():
        raise DataError(f"{video_folder}: no such video folder")
    folder = Path(os.path.abspath(csv_path.parent if video_folder is None else video_folder))
    records = _parquet_records(csv_path) if csv_path.suffix.lower() == ".parquet" else _csv_records(csv_path)
    rows, empty = [], []
    for place, record in records:
        row = _row(f"{csv_path}, {place}", record, folder, video_folder is not None)
        rows.append(row)
        if _holds_nothing(record):
            empty.append(row.name)
    if not rows:
        raise DataError(f"{csv_path}: there is no row below the header")
    if empty:
        shown = ", ".join(map(printable, empty[:3])) + ", ..." * (len(empty) > 3)
        _logger.warning("%s: %d of %d rows say that their files are empty: %s", csv_path, len(empty), len(rows), shown)
    return rows


def _csv_records(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a CSV by column, each with its place, "line 2"."""
    text = _decoded(path)
    _check_separator(path, text)
    lines = io.StringIO(text.replace("\0", _NUL), newline="")  # with csv's line endings, not those of str.splitlines
    limit = csv.field_size_limit(sys.maxsize)  # a caption may be of any length
    try:
        reader = csv.reader(lines, skipinitialspace=True, strict=True)
        header, begun = None, 1
        while True:
            try:
                cells = [cell.replace(_NUL, "\0") for cell in next(reader, ())]
            except csv.Error as error:
                raise DataError(
                    f"{path}, line {begun}: its quotes do not match ({error}); within a quoted cell a quote is written "
                    'twice: "He said ""hi"""'
                ) from None
            place, ended, begun = f"line {begun}", begun > reader.line_num, reader.line_num + 1
            if ended:
                break
            if not any(map(str.strip, cells)):  # an empty line, or the empty rows that spreadsheets leave at the end
                continue
            if header is None:
                header = _checked_header(path, [cell.strip() for cell in cells])
                continue
            if any(map(str.strip, cells[len(header) :])):
                raise DataError(
                    f"{path}, {place}: there are {len(cells)} cells where the header has {len(header)}; a cell that "
                    "holds a comma must be quoted"
                )
            yield place, dict(zip(header, cells))
        if header is None:
            raise DataError(f"{path}: the file is empty; it needs a header with a column 'video' or 'path'")
    finally:
        csv.field_size_limit(limit)


def _decoded(path: Path) -> str:
    """The text of a CSV file."""
    content = path.read_bytes()
    convert = "write it as UTF-8, for example by: iconv -f"
    wide = content[:1] == b"\0" or content[1:2] == b"\0"  # each ASCII character has a zero byte
    if wide or content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path}: not a CSV file in UTF-8 but in UTF-16; {convert} UTF-16 -t UTF-8")
    if content.startswith(b"PAR1"):
        raise DataError(f"{path}: this is a parquet file; give it the suffix .parquet")
    if content.startswith((b"PK\3\4", b"\x1f\x8b")):
        raise DataError(f"{path}: not a CSV file but a spreadsheet or an archive; save it as CSV in UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: not a CSV file in UTF-8 ({error.reason} {content[error.start]:#x}); {convert} "
            "GB18030 -t UTF-8, or whatever its encoding is"
        ) from None


def _check_separator(path: Path, text: str) -> None:
    """Raise DataError if the header's cells are separated by anything but commas."""
    header = next((line for line in text.splitlines() if line.strip()), "")
    for separator, name in ((",", ""), (";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if any(cell.strip(" '\"") in PATH_COLUMNS for cell in header.split(separator)):
            if name:
                raise DataError(f"{path}: its columns are separated by {name}; use commas")
            return


def _checked_header(path: Path, columns: list[str]) -> list[str]:
    if any(column in columns for column in PATH_COLUMNS):
        twice = next((column for column in COLUMNS if columns.count(column) > 1), None)
        if twice:
            raise DataError(f"{path}: the column '{twice}' is there twice; leave one out")
        return columns
    found = printable(", ".join(columns))
    raise DataError(f"{path}: no column 'video' or 'path'; its columns are {found[:200]}")


def _parquet_records(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a parquet file by column, each with its place, "row 1"."""
    try:
        names, columns = _read_parquet(path)
    except ImportError:
        raise DataError(f"{path}: a parquet file needs pyarrow or pandas to be read: pip install pyarrow") from None
    except Exception as error:  # whatever the library at hand raises
        raise DataError(f"{path}: not a parquet file that can be read ({one_line(error)[:200]})") from None
    header = _checked_header(path, names)
    wanted = [name for name in COLUMNS if name in header]
    for number, values in enumerate(zip(*(columns(name) for name in wanted)), 1):
        yield f"row {number}", dict(zip(wanted, map(_text, values)))


def _read_parquet(path: Path) -> tuple[list[str], Callable[[str], list]]:
    """The names of a parquet file's columns, and a function that returns a column's values."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        from pandas import read_parquet  # it may have another engine

        table = read_parquet(path)
        return [str(name) for name in table.columns], lambda name: table[name].tolist()
    with ParquetFile(path) as file:
        names = file.schema_arrow.names
        table = file.read(columns=[name for name in COLUMNS if name in names])
    return names, lambda name: table.column(name).to_pylist()


def _text(value: Any) -> str:
    """A value of a typed column as a CSV would write it."""
    if value is None or value != value:  # NaN, and pandas' NaT
        return ""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _row(place: str, record: dict[str, str], folder: Path, confined: bool) -> IndexRow:
    """A row of the index; `place` names its line for error messages."""
    path_column = next(column for column in PATH_COLUMNS if column in record)
    name = record[path_column].strip()
    if not name:
        raise DataError(f"{place}: the column '{path_column}' is empty")
    path = Path(os.path.normpath(folder / name))
    absolute_is_fine = Path(name).is_absolute() and not confined
    if not absolute_is_fine and not path.is_relative_to(folder):
        raise DataError(f"{place}: {printable(name)} leads outside the folder {folder}")
    caption = next((record[column] for column in CAPTION_COLUMNS if column in record), "").strip()
    sizes: dict[str, Any] = {column: _number(place, record, column, whole=True) for column in SIZE_COLUMNS}
    return IndexRow(path, name, caption, **sizes, fps=_number(place, record, "fps", whole=False))


def _number(place: str, record: dict[str, str], column: str, whole: bool) -> float | int | None:
    """A column's value; None if the column is missing or has no value: "", nan, or the 0 or -1 that tools write for a
    file they could not read and for an image's frame rate."""
    text = record.get(column, "").strip()
    number = _as_number(text)
    if number in (None, 0, -1):
        return None
    if not math.isfinite(number) or number < 0 or (whole and number != int(number)):
        wanted = "a whole number of at least 1" if whole else "a number above 0"
        raise DataError(f"{place}: the column '{column}' is {text!r}; it must be {wanted}, or empty")
    return int(number) if whole else number


def _as_number(text: str) -> float | None:
    """A number, infinity for any other text; None for a missing value."""
    if text.lower() in _NOTHING:
        return None
    try:
        number = float(text)
    except ValueError:
        return math.inf
    return None if math.isnan(number) else number


def _holds_nothing(row: dict[str, str]) -> bool:
    """Whether a tool that measured the file found no frame in it."""
    return any(_as_number(row.get(column, "").strip()) in (0, -1) for column in SIZE_COLUMNS)
