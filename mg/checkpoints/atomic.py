"""Writing files atomically."""

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary file next to `path`, with the same suffix, that replaces `path` when the block succeeds.

    If the block raises, the temporary file is removed and an older file at `path` is left untouched. Missing parent
    folders are created. The file gets the mode that the umask implies, whatever mode the block gave it.

    Raises:
        OSError: the folder cannot be written, the disk is full, or `path` is a folder; the error names `path`.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; a file should be written there")
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
    """A hidden name with the same suffix; no longer than a long `path.name`, since file systems limit names."""
    rest = f".{secrets.token_hex(4)}{path.suffix}"
    room = max(len(os.fsencode(path.name)), 64) - len(os.fsencode(rest)) - 1
    return path.with_name(f".{os.fsdecode(os.fsencode(path.stem)[: max(room, 0)])}{rest}")


@contextlib.contextmanager
def naming(path: str | os.PathLike, *stand_ins: str | os.PathLike) -> Iterator[None]:
    """Make an OSError name `path` if it names no file (as when the disk is full) or one of `stand_ins`."""
    try:
        yield
    except OSError as error:
        if error.errno and str(error.filename) in ("None", *map(str, stand_ins)):
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


def sync(path: Path) -> None:
    """Wait until a file, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
