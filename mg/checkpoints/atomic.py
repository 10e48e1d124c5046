"""Writing files whole or not at all."""

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary file beside `path`, of the same suffix, that takes its place when the block ends well.

    If the block raises, the temporary file goes and an older file at `path` stays as it was. Missing parent folders
    are made. The file gets the mode that the umask gives, whatever mode the block left it with.

    Raises:
        OSError: the folder cannot be written, the disk is full, or `path` is a folder; it names `path`.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; a file was to be written there")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    with naming(path, temporary):
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        try:
            yield temporary
            os.chmod(temporary, mode)
            sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync(path.parent)


def _beside(path: Path) -> Path:
    """A hidden name of the same suffix, no longer than the name itself where that is long: a file system may take no
    more."""
    rest = f".{secrets.token_hex(4)}{path.suffix}"
    room = max(len(os.fsencode(path.name)), 64) - len(os.fsencode(rest)) - 1
    return path.with_name(f".{os.fsdecode(os.fsencode(path.stem)[: max(room, 0)])}{rest}")


@contextlib.contextmanager
def naming(path: str | os.PathLike, *stand_ins: str | os.PathLike) -> Iterator[None]:
    """Let an OSError that names no file, as a full disk's does, or one of `stand_ins`, name `path`."""
    try:
        yield
    except OSError as error:
        if error.errno and str(error.filename) in ("None", *map(str, stand_ins)):
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
