"""How much memory there is, as Linux and its control groups say. Here because it needs no MindSpore."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def peak_rss(process: int | None = None) -> int | None:
    """Bytes that this process, or the one of that id, had resident at most, as Linux counts them; None elsewhere."""
    return _field(PROC / str(process or "self") / "status", "VmHWM:")


def resident() -> int | None:
    """Bytes that this process has resident; None where it is not Linux'."""
    return _field(PROC / "self" / "status", "VmRSS:")


def available_memory() -> int | None:
    """Bytes that this process may still take before something is killed for it: what the machine has to give, and what
    the limits of its control groups (a container's, a job's) leave, whichever is less; None where neither is known."""
    found = [_field(PROC / "meminfo", "MemAvailable:"), *_left_by_groups()]
    return min((amount for amount in found if amount is not None), default=None)


def _field(path: Path, name: str) -> int | None:
    """A line such as "VmHWM:   1234 kB" of one of Linux' own files, in bytes."""
    with suppress(OSError, ValueError, IndexError):
        for line in path.read_text(errors="replace").split("\n"):
            words = line.split()
            if words[:1] == [name]:
                return int(words[1]) * (1024 if words[2:] == ["kB"] else 1)
    return None


def _left_by_groups() -> Iterator[int]:
    """What is left of each limit that holds for this process, by either version of control groups."""
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
            # A container may see its own group as the root, whatever the path says: all that is there counts.
            group = root / place.lstrip("/")
            for folder in (group, *group.parents):
                left = _left_in(folder, *files)
                if left is not None:
                    yield left
                if folder == root:
                    break


def _left_in(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    """What a group's limit leaves; files that the kernel has read ahead are no use of it. None without a limit."""
    with suppress(OSError, ValueError):
        allowed = int((folder / limit).read_text())  # no number, "max", where there is none
        used = int((folder / usage).read_text()) - (_field(folder / "memory.stat", reclaimable) or 0)
        return max(0, allowed - used)
    return None
