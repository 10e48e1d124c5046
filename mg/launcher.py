"""Ending with msrun, MindSpore's launcher of several workers.

msrun kills the workers of its host as soon as one of them fails, and then waits for its scheduler, a process more with
the same command. That waits for the workers: for half a minute where they have met, and where they had not yet for
`--cluster_time_out`, ten minutes by default. A msrun that is itself killed leaves all of them behind, at work.

So workers and scheduler ask Linux to end them with msrun, and the scheduler has a companion that ends it when no worker
of its host is left. It is a process of its own: inside MindSpore the scheduler waits without giving Python a turn.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

_SECONDS = 15  # in order, the scheduler needs two or three after the last worker
_PR_SET_PDEATHSIG = 1


def process_name() -> str:
    """What to call this process before what it says: "worker 1: ", "scheduler: ", or "" without msrun."""
    role, rank = os.environ.get("MS_ROLE", ""), os.environ.get("RANK_ID", "")
    return {"MS_WORKER": f"worker {rank}: ".replace(" :", ":"), "MS_SCHED": "scheduler: "}.get(role, "")


def end_with_msrun() -> None:
    """Tie this process to the msrun that waits for it, if there is one: without --join it waits for none."""
    parent = psutil.Process().parent()
    if parent is None or not any(Path(word).name == "msrun" for word in parent.cmdline()):
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.environ.get("MS_ROLE") == "MS_SCHED":
        subprocess.Popen([sys.executable, __file__, str(os.getpid())])


def _watch(scheduler: psutil.Process) -> None:
    """End `scheduler` when it has been alone for a while; return when it has ended."""
    command, alone = scheduler.cmdline(), 0
    while alone < _SECONDS:
        time.sleep(1)
        if not _is_alive(scheduler):
            return
        workers = [child for child in scheduler.parent().children() if child != scheduler and _is_alive(child)]
        alone = 0 if any(_command(worker) == command for worker in workers) else alone + 1
    sys.stderr.write("error: every worker of this host has ended; the log of the first that failed says why\n")
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
