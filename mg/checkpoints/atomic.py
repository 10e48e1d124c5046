"""Writing files atomically."""

import contextlib
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
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
        try:
            with contextlib.suppress(OSError):  # not every file system has locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)  # so that `remove_leftovers` knows that it is in use
            mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
            yield temporary
            os.chmod(temporary, mode)
            sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
    sync(path.parent)


def remove_leftovers(folder: Path, names: Iterable[str]) -> None:
    """Remove the temporary files that `atomic_write` left in a folder, for files of these names, when its process was
    killed. One that is still being written stays."""
    hidden = {_hidden(name) for name in names}
    for path in folder.glob(".*"):
        found = re.fullmatch(r"(.*\.)[0-9a-f]{8}(\..*)?", path.name)
        if found and (found[1], found[2] or "") in hidden:
            with contextlib.suppress(OSError), open(path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def _beside(path: Path) -> Path:
    before, after = _hidden(path.name)
    return path.with_name(f"{before}{secrets.token_hex(4)}{after}")


def _hidden(name: str) -> tuple[str, str]:
    """What comes before and after 8 random digits in a temporary file's name: a hidden one with the same suffix, no
    longer than a long `name`, since file systems limit names."""
    stem, suffix = (os.fsencode(part) for part in (Path(name).stem, Path(name).suffix))
    room = max(len(os.fsencode(name)), 64) - len(suffix) - len("..01234567")
    return f".{os.fsdecode(stem[: max(room, 0)])}.", os.fsdecode(suffix)


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
