"""Workers of one script on the CPU, by the command that starts workers on Ascend: msrun ... script --option ..."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent


def start(
    logs: Path, script: Path | str, *arguments: object, cwd: Path | None = None, workers: int = 2, **env: str
) -> subprocess.Popen:
    """Start workers with `script`; their output comes through msrun's stdout, in the file `logs`.txt.

    Args:
        cwd: their working folder, by default that of the logs.
        env: variables to add to this process's environment.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # On a busy machine a worker may take minutes to import what it needs, and the others wait for it.
    command = [BIN / "msrun", f"--worker_num={workers}", f"--local_worker_num={workers}", f"--master_port={port}"]
    command += ["--join=True", "--cluster_time_out=600", f"--log_dir={logs}", script, *arguments]
    env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", **env}
    with open(f"{logs}.txt", "w") as output:
        return subprocess.Popen(
            [*map(str, command)], env=env, stdout=output, stderr=subprocess.STDOUT, cwd=cwd or logs.parent
        )


def run(folder: Path, script: Path, timeout: float, *arguments: object) -> None:
    """Two workers of `script FOLDER ARGUMENTS`, to their end, which must be a good one; logs go to folder/logs."""
    process = start(folder / "logs", script, folder, *arguments)
    said = finish(process, folder / "logs", timeout)
    assert process.returncode == 0, said[-5000:]


def finish(process: subprocess.Popen, logs: Path, timeout: float) -> str:
    """What the terminal shows, once msrun has ended; what is left of it by then is an error."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    try:
        process.wait(timeout)
    finally:
        process.kill()
    assert not psutil.wait_procs(family, timeout=300)[1]
    return Path(f"{logs}.txt").read_text()
