"""Text with arbitrary captions and names: line separators of any script, NUL, bytes that aren't UTF-8.

Python's `str.splitlines` splits at U+2028, U+2029, U+0085 and five more; files of lines here only split at "\\n". A
lone surrogate, which Python uses for bytes of a file name that aren't UTF-8, cannot be encoded and is written as an
escape like `\\udcff`, as in JSON.
"""

import csv
import io
import json
import unicodedata
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

LONGEST_NAME = 240  # bytes of a file name, without a number and a suffix; most file systems allow 255
_UNPRINTABLE = {"Cc", "Cs", "Zl", "Zp"}  # controls, surrogates, line and paragraph separators
_SEPARATORS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}


def one_line(said: object) -> str:
    """An error or a text in one line: any run of whitespace becomes one space."""
    if isinstance(said, OSError) and said.strerror:
        said = f"{said.filename}: {said.strerror}" if said.filename else said.strerror
    text = printable(" ".join(str(said).split()))
    return text or (type(said).__name__ if isinstance(said, BaseException) else "")


def printable(text: str) -> str:
    """A name or a caption in one line, for a table or a log: line breaks and controls become `\\n` and the like."""
    if text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode() if unicodedata.category(character) in _UNPRINTABLE else character
        for character in text
    )


def split_lines(text: str) -> list[str]:
    """The lines of a text in which each ends with "\\n"."""
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]


def json_line(record: Any) -> str:
    """A record as a line of JSON that every reader takes for one line, wherever it splits lines."""
    return json.dumps(record, ensure_ascii=False).translate(_SEPARATORS) + "\n"


def text_table(rows: Sequence[Sequence[object]], numbers: bool = True) -> list[str]:
    """Rows of cells as lines with aligned columns.

    Args:
        numbers: align all columns but the first to the right; else all are aligned to the left.
    """
    texts = [list(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    align = str.rjust if numbers else str.ljust
    return ["  ".join([first.ljust(widths[0]), *map(align, others, widths[1:])]).rstrip() for first, *others in texts]


def csv_line(values: Iterable[Any]) -> str:
    """Cells as a line of CSV."""
    line = io.StringIO()
    # With a different lineterminator some versions of Python write "\\r" unquoted; some cannot read NUL.
    cells = [value.replace("\0", "\\x00") if isinstance(value, str) else value for value in values]
    csv.writer(line, lineterminator="\r\n").writerow(cells)
    return line.getvalue().removesuffix("\r\n") + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a text unchanged, in UTF-8."""
    path.write_bytes(encoded(text))


def encoded(text: str) -> bytes:
    """A text encoded in UTF-8, for writing."""
    return text.encode("utf-8", "backslashreplace")


def name_bytes(name: str) -> bytes:
    """A name as unique bytes, for hashing."""
    return name.encode("utf-8", "surrogatepass")


def file_name(name: str) -> str:
    """A text as a file name without suffix: characters that file names cannot have, or that control a terminal, become
    underscores; a name too long for a file system is cut, with a checksum to tell it from others that begin alike."""
    flat = "".join("_" if character == "/" or printable(character) != character else character for character in name)
    coded = name_bytes(flat or "_")
    if len(coded) <= LONGEST_NAME:
        return flat or "_"
    checksum = f"_{zlib.crc32(coded):08x}"
    return coded[: LONGEST_NAME - len(checksum)].decode(errors="ignore") + checksum
