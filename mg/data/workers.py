"""Processes that read clips, for a loader that scales with the number of CPUs.

A worker is a new Python process without MindSpore: nothing is forked from a process whose threads could hold a lock, it
starts in half a second, and needs about 75 MB plus what decoding needs. It reads one row at a time and puts the clip
into an in-memory file that it shares with its parent; the parent has a thread for each worker, which waits without
holding the GIL. No space in /dev/shm is needed.

Workers end with their parent, however that ends. Ctrl-C does not reach them: it is for the parent, which waits.
"""

import io
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

import cv2
import numpy as np

from mg.data import remarks
from mg.data.errors import DataError
from mg.data.index import IndexRow
from mg.data.reader import IMAGE_CACHE_BYTES, ClipReader

if TYPE_CHECKING:
    from mg.data.loader import DataConfig

T = TypeVar("T")

# Not -m, which would put the current folder, and any mg in it, first on the path.
_START = "import sys; sys.path[:] = sys.argv[4:]; from mg.data.workers import main; main()"
# Each reader uses one thread; libraries would start one per CPU in each process.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class WorkerError(DataError):
    """A worker that ended too early; the message says how, and at which file."""


class ReaderPool:
    """As many readers as a config has workers, and jobs for them. `close` kills all, even in the middle of reading.

    Args:
        config: how rows become clips.
        threads: read in threads of this process instead of separate processes.
        decoder: of videos: auto | decord | av.
    """

    def __init__(self, config: "DataConfig", threads: bool = False, decoder: str = "auto"):
        count = config.num_workers
        self.workers = [] if threads else [_Worker(config, IMAGE_CACHE_BYTES // count, decoder) for _ in range(count)]
        self._free: SimpleQueue = SimpleQueue()
        for reader in [ClipReader(config, decoder=decoder)] * count if threads else self.workers:
            self._free.put(reader)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="mg-data")

    def submit(self, job: Callable[..., T], *arguments: Any) -> "Future[T]":
        """job(reader, *arguments), as soon as a reader is free. A reader is used like a `ClipReader`.

        The future raises WorkerError if the reader's process has ended.
        """
        return self._threads.submit(self._run, job, arguments)

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self.workers:
            worker.close()

    def _run(self, job: Callable[..., T], arguments: tuple) -> T:
        reader = self._free.get()
        try:
            return job(reader, *arguments)
        finally:
            self._free.put(reader)


class _Worker:
    """A ClipReader in its own process, as seen by the parent."""

    def __init__(self, config: "DataConfig", cache_bytes: int, decoder: str):
        self._file = _open_nameless()
        self._connection, theirs = multiprocessing.Pipe()
        with theirs:
            handles = (theirs.fileno(), self._file.fileno())
            self.process = subprocess.Popen(
                [sys.executable, "-c", _START, *map(str, (*handles, os.getpid())), *sys.path],
                stdin=subprocess.DEVNULL,
                pass_fds=handles,
                start_new_session=True,  # out of reach of the terminal's Ctrl-C
                env={**os.environ, **_ONE_THREAD},
            )
        with suppress(OSError):  # if it ended at once, the first request reports it
            self._connection.send((config, cache_bytes, decoder))

    def read(self, row: IndexRow, num_frames: int, size: tuple[int, int], key: tuple[int, ...]) -> np.ndarray:
        shape = self._ask("read", row, num_frames, size, key)
        clip = np.empty(shape, np.float32)
        self._file.seek(0)
        left = memoryview(clip).cast("B")
        while count := self._file.readinto(left):
            left = left[count:]
        return clip

    def measure(self, row: IndexRow) -> tuple[int, int, int]:
        return self._ask("measure", row)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self._connection.close()
        self._file.close()

    def _ask(self, method: str, row: IndexRow, *arguments: Any) -> Any:
        try:
            self._connection.send((method, row, *arguments))
            done, answer, said = self._connection.recv()
        except (EOFError, OSError):
            raise WorkerError(self._last_words(row)) from None
        for remark in said:
            remarks.remark(*remark)
        if not done:
            error, trace = answer
            raise error from RuntimeError(f"in a loader worker:\n{trace}")
        return answer

    def _last_words(self, row: IndexRow) -> str:
        code = self.process.wait()
        ended = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        hint = "this is how Linux ends a process when memory runs out: lower data.num_workers"
        return f"a loader worker {ended} at {row.path}" + (f"; {hint}" if code == -signal.SIGKILL else "")


def _open_nameless() -> io.FileIO:
    """A file in memory, or a temporary one if the system has none; it is gone when the last process closes it.

    Not in /dev/shm, which has only 64 MB in containers.
    """
    with suppress(AttributeError, OSError):
        return io.FileIO(os.memfd_create("mg-clip"), "r+")
    return tempfile.TemporaryFile(buffering=0)


def _end_with(parent: int) -> None:
    """End this process when `parent` has ended, even in the middle of a clip.

    Not with PR_SET_PDEATHSIG, which follows the thread that started this process, nor at the end of the connection,
    which a process forked from the parent may hold open.
    """
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _serve(connection: Connection, file: int) -> None:
    """Serve read requests until the parent is gone."""
    reader = ClipReader(*connection.recv())
    while True:
        method, *arguments = connection.recv()
        try:
            answer = getattr(reader, method)(*arguments)
            if method == "read":
                _write(file, answer)
                answer = answer.shape
            connection.send((True, answer, remarks.hand_over()))
        except Exception as error:
            connection.send((False, (_portable(error), traceback.format_exc()), remarks.hand_over()))


def _write(file: int, clip: np.ndarray) -> None:
    left, place = memoryview(clip).cast("B"), 0
    while left:
        count = os.pwrite(file, left, place)
        left, place = left[count:], place + count


def _portable(error: Exception) -> Exception:
    """The error, or one with the same text if it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def main() -> None:
    """A worker's entry point; arguments: file descriptors of a connection and a file, and the parent's process id."""
    connection, file, parent = map(int, sys.argv[1:4])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    sys.modules["mindspore"] = None  # type: ignore[assignment]  # not needed here, and decord then loads without it
    remarks.hold()
    cv2.setNumThreads(0)  # the processes already provide the parallelism
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        _serve(Connection(connection), file)
