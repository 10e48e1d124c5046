"""Packages in a folder that pip uses instead of a registry."""

import os
import zipfile
from pathlib import Path

import pytest


def offer(patch: pytest.MonkeyPatch, folder: Path | None) -> None:
    """Let pip see the packages in `folder`, or none, and no registry."""
    patch.setenv("PIP_CONFIG_FILE", os.devnull)
    patch.setenv("PIP_NO_INDEX", "1")
    patch.setenv("PIP_FIND_LINKS", str(folder or ""))
    patch.delenv("PIP_EXTRA_INDEX_URL", raising=False)


def write_wheel(folder: Path, name: str, files: dict[str, bytes]) -> Path:
    """A wheel of version 1 that holds `files`."""
    path = folder / f"{name}-1-py3-none-any.whl"
    known = {"METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n", "RECORD": ""}
    known["WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(path, "w") as archive:
        for file, data in files.items():
            archive.writestr(file, data)
        for file, text in known.items():
            archive.writestr(f"{name}-1.dist-info/{file}", text)
    return path
