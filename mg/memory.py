"""How much memory there is, according to Linux and its control groups. Needs no MindSpore."""

import ctypes
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def peak_rss(process: int | None = None) -> int | None:
    """Peak resident bytes of this process, or of the one with that id, as Linux counts them; None elsewhere."""
    return _field(PROC / str(process or "self") / "status", "VmHWM:")


def forget_peak_rss() -> None:
    """Let this process's peak be what is resident now, if Linux allows it; else it stays that of the whole lifetime."""
    with suppress(OSError):
        (PROC / "self" / "clear_refs").write_text("5")


def release_freed() -> None:
    """Return freed memory to the system, which glibc would keep; elsewhere nothing happens."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def resident() -> int | None:
    """Resident bytes of this process; None if not on Linux."""
    return _field(PROC / "self" / "status", "VmRSS:")


def available_memory() -> int | None:
    """Bytes that this process can still allocate before something gets killed: the machine's available memory or what
    the limits of its control groups (a container's, a job's) leave, whichever is less; None if neither is known."""
    found = [_field(PROC / "meminfo", "MemAvailable:"), *_left_by_groups()]
    return min((amount for amount in found if amount is not None), default=None)


def _field(path: Path, name: str) -> int | None:
    """The value in bytes of a line such as "VmHWM:   1234 kB" in one of Linux's files."""
    with suppress(OSError, ValueError, IndexError):
        for line in path.read_text(errors="replace").split("\n"):
            words = line.split()
            if words[:1] == [name]:
                return int(words[1]) * (1024 if words[2:] == ["kB"] else 1)
    return None


def _left_by_groups() -> Iterator[int]:
    """What is left of each limit on this process, in either version of control groups."""
    with suppress(OSError):
        for line in (PROC / "self" / "cgroup").read_text(errors="replace").split("\n"):
            _, _, rest = line.partition(":")
            kinds, _, place = rest.partition(":")
            if kinds == "":
                files, root = ("memory.max", "memory.current", "inactive_file"), CGROUPS
            elif "memory" in kinds.split(","):
                files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                root = CGROUPS / "memory"
            else:
                continue
            # A container may see its own group as the root, whatever the path says: use every level that exists.
            group = root / place.lstrip("/")
            for folder in (group, *group.parents):
                left = _left_in(folder, *files)
                if left is not None:
                    yield left
                if folder == root:
                    break


def _left_in(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    """What a group's limit leaves, not counting reclaimable file cache as used. None without a limit."""
    with suppress(OSError, ValueError):
        allowed = int((folder / limit).read_text())  # "max", not a number, if there is no limit
        used = int((folder / usage).read_text()) - (_field(folder / "memory.stat", reclaimable) or 0)
        return max(0, allowed - used)
    return None
