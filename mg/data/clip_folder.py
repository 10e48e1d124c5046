"""A completely written folder of clips: the CSVs that list them, and a manifest that is written last."""

import csv
import json
from pathlib import Path

from mg.checkpoints.atomic import atomic_write


def write_csv(path: Path, columns: tuple[str, ...], rows: list[tuple[str, str]]) -> None:
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def finish(path: Path, manifest: dict, files: list[str]) -> None:
    """Write the manifest last: if it exists, all the files it lists were written completely."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps({**manifest, "files": files}, indent=1) + "\n", encoding="utf-8")


def is_complete(path: Path, manifest: dict) -> bool:
    """Whether the manifest matches and its files exist; if not, an old manifest is removed before new files come."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        files = found.pop("files")
    except (OSError, ValueError, KeyError, AttributeError):
        found, files = None, []
    complete = found == manifest and all((path.parent / name).is_file() for name in files)
    if not complete:
        path.unlink(missing_ok=True)
    return complete
