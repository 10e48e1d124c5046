"""Ending together with msrun, MindSpore's launcher for several workers.

msrun kills the workers on its host as soon as one of them fails, and then waits for its scheduler, one more process
with the same command. The scheduler waits for the workers: half a minute if they had connected, else for
`--cluster_time_out`, ten minutes by default. If msrun itself is killed, all of them keep running.

So workers and scheduler ask Linux to kill them when msrun ends, and the scheduler has a watchdog that ends it when no
worker on its host is left. That is a separate process: while waiting inside MindSpore, the scheduler runs no Python.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

_SECONDS = 15  # normally the scheduler ends two or three seconds after the last worker
_PR_SET_PDEATHSIG = 1


def process_name() -> str:
    """The prefix for this process's messages: "worker 1: ", "scheduler: ", or "" without msrun."""
    role, rank = os.environ.get("MS_ROLE", ""), os.environ.get("RANK_ID", "")
    return {"MS_WORKER": f"worker {rank}: ".replace(" :", ":"), "MS_SCHED": "scheduler: "}.get(role, "")


def end_with_msrun() -> None:
    """Tie this process to the msrun that waits for it, if any: without --join msrun doesn't wait."""
    parent = psutil.Process().parent()
    if parent is None or not any(Path(word).name == "msrun" for word in parent.cmdline()):
        return
    end_with_parent()
    if os.environ.get("MS_ROLE") == "MS_SCHED":
        subprocess.Popen([sys.executable, __file__, str(os.getpid())])


def end_with_parent() -> None:
    """Have Linux kill this process when its parent's thread that started it ends, even if this process is stopped."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _watch(scheduler: psutil.Process) -> None:
    """End `scheduler` once it has been without workers for a while; return when it has ended."""
    command, alone = scheduler.cmdline(), 0
    while alone < _SECONDS:
        time.sleep(1)
        if not _is_alive(scheduler):
            return
        workers = [child for child in scheduler.parent().children() if child != scheduler and _is_alive(child)]
        alone = 0 if any(_command(worker) == command for worker in workers) else alone + 1
    sys.stderr.write("error: all workers on this host have ended; see the log of the first that failed\n")
    scheduler.kill()


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


if __name__ == "__main__":
    try:
        _watch(psutil.Process(int(sys.argv[1])))
    except psutil.NoSuchProcess:
        sys.exit()
