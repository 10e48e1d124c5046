"""How much memory a process has held, as Linux counts it. Here because it needs no MindSpore."""

from contextlib import suppress
from pathlib import Path


def peak_rss(process: int | None = None) -> int | None:
    """Bytes that this process, or the one of that id, had resident at most, as Linux counts them; None elsewhere."""
    with suppress(OSError, StopIteration):
        lines = Path(f"/proc/{process or 'self'}/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    return None
