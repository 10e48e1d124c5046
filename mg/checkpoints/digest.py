"""Identifying weights by hash."""

import hashlib
from functools import partial
from pathlib import Path

WEIGHT_SUFFIXES = {".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".json"}


def sha256(path: Path) -> str:
    """The hash of a file, as sha256sum prints it; for a folder, one of its weights' and configs' names and hashes."""
    if path.is_file():
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            for block in iter(partial(file.read, 2**20), b""):
                digest.update(block)
        return digest.hexdigest()
    files = sorted(file for file in path.rglob("*") if file.suffix in WEIGHT_SUFFIXES and file.is_file())
    text = "".join(f"{file.relative_to(path).as_posix()} {sha256(file)}\n" for file in files)
    return hashlib.sha256(text.encode()).hexdigest()
