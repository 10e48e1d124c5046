"""Text whose captions and names hold anything: line separators of every script, NUL, bytes that are no UTF-8.

Python's `str.splitlines` ends lines at U+2028, U+2029, U+0085 and five more; a file of lines here ends them at "\\n"
alone. What UTF-8 cannot hold, a lone surrogate, as Python names the bytes of a file name that are no UTF-8, is written
as `\\udcff` is read in JSON.
"""

import csv
import io
import json
import unicodedata
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LONGEST_NAME = 240  # bytes of a file's name, before a number and a suffix; most file systems take 255
_UNPRINTABLE = {"Cc", "Cs", "Zl", "Zp"}  # controls, surrogates, separators of lines and of paragraphs
_SEPARATORS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}


def one_line(said: object) -> str:
    """What an error or a text says, in one line: any white space is one blank."""
    if isinstance(said, OSError) and said.strerror:
        said = f"{said.filename}: {said.strerror}" if said.filename else said.strerror
    text = printable(" ".join(str(said).split()))
    return text or (type(said).__name__ if isinstance(said, BaseException) else "")


def printable(text: str) -> str:
    """A name or a caption as a table or a log shows it, in one line: `\\n` and the like in place of what breaks it."""
    if text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode() if unicodedata.category(character) in _UNPRINTABLE else character
        for character in text
    )


def split_lines(text: str) -> list[str]:
    """The lines of a text that ends each with "\\n"."""
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]


def json_line(record: Any) -> str:
    """A record as a line of JSON that every reader of lines takes for one, whatever it ends them at."""
    return json.dumps(record, ensure_ascii=False).translate(_SEPARATORS) + "\n"


def csv_line(values: Iterable[Any]) -> str:
    """Cells as a line of CSV."""
    line = io.StringIO()
    # With another end of lines some versions of Python write "\\r" without quotes; NUL is what some cannot read.
    cells = [value.replace("\0", "\\x00") if isinstance(value, str) else value for value in values]
    csv.writer(line, lineterminator="\r\n").writerow(cells)
    return line.getvalue().removesuffix("\r\n") + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a text as it is, in UTF-8."""
    path.write_bytes(encoded(text))


def encoded(text: str) -> bytes:
    """A text in UTF-8, to be written."""
    return text.encode("utf-8", "backslashreplace")


def name_bytes(name: str) -> bytes:
    """A name as bytes that say it alone, to be hashed."""
    return name.encode("utf-8", "surrogatepass")


def file_name(name: str) -> str:
    """A text as the name of a file, without suffix: what no file name holds, or a terminal would obey, becomes an
    underscore; of one that is too long for a file system the beginning is kept, and a checksum tells it from others
    that begin alike."""
    flat = "".join("_" if character == "/" or printable(character) != character else character for character in name)
    coded = name_bytes(flat or "_")
    if len(coded) <= LONGEST_NAME:
        return flat or "_"
    checksum = f"_{zlib.crc32(coded):08x}"
    return coded[: LONGEST_NAME - len(checksum)].decode(errors="ignore") + checksum
