"""Processes that read clips give what one process gives, say what goes wrong in them, and never outlive a run."""

import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil
import pytest

from mg.data import workers
from mg.data.index import IndexRow
from mg.data.loader import ClipLoader, DataConfig
from mg.data.reader import ClipReader
from mg.data.video import VideoError, write_video
from mg.data.workers import ReaderPool, WorkerError

CONFIG = dict(sample_n_frames=3, image_size=32, crop_size=24, random_crop=True, image_ratio=0.0, max_bad_share=1.0)
SIZE, KEY = (24, 24), (0, 1, 2)


@pytest.fixture(scope="module")
def row(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "clip.mp4"
    write_video(path, np.random.default_rng(0).integers(0, 255, (8, 40, 64, 3)).astype(np.uint8), fps=8)
    return IndexRow(path, path.name)


@pytest.fixture(scope="module")
def pool():
    with closing(ReaderPool(DataConfig(**CONFIG, num_workers=1))) as pool:
        yield pool


def read(reader, row, num_frames=3, size=SIZE):
    return reader.read(row, num_frames, size, KEY)


def test_a_worker_reads_what_this_process_reads(pool, row):
    alone = ClipReader(DataConfig(**CONFIG))
    for num_frames in (3, 8, 1):  # a shorter clip after a longer one, too
        clip = pool.submit(read, row, num_frames).result()
        assert clip.flags.writeable and np.array_equal(clip, read(alone, row, num_frames))
    assert pool.submit(lambda reader: reader.measure(row)).result() == alone.measure(row) == (8, 40, 64)


def test_a_worker_has_no_mindspore(pool, row):
    pool.submit(read, row).result()
    assert "mindspore" not in Path(f"/proc/{pool.workers[0].process.pid}/maps").read_text()


def test_an_error_in_a_worker_is_raised_here_and_the_worker_continues(pool, row):
    with pytest.raises(VideoError, match="none.mp4: no such file"):
        pool.submit(read, IndexRow(Path("none.mp4"), "none.mp4")).result()
    with pytest.raises(ValueError, match="cannot crop 99 x 24") as error:
        pool.submit(read, row, 3, (99, 24)).result()
    assert "_serve" in str(error.value.__cause__), "the worker's own stack"
    assert pool.submit(read, row).result().shape == (3, 3, 24, 24)


def test_ctrl_c_is_not_for_workers(pool, row):
    pool.submit(read, row).result()
    process = pool.workers[0].process
    assert os.getsid(process.pid) != os.getsid(0), "the terminal's does not reach them"
    process.send_signal(signal.SIGINT)
    assert pool.submit(read, row).result().shape == (3, 3, 24, 24)


def test_a_temporary_file_is_used_if_memory_can_hold_none(row, monkeypatch):
    def refuse(name):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(workers.os, "memfd_create", refuse)
    with closing(ReaderPool(DataConfig(**CONFIG, num_workers=1))) as pool:
        assert np.array_equal(pool.submit(read, row).result(), read(ClipReader(DataConfig(**CONFIG)), row))


def test_a_worker_that_is_killed_ends_the_run_with_one_line(row):
    batches = ClipLoader([row], DataConfig(**CONFIG, num_workers=2)).batches()
    next(batches)
    for worker in psutil.Process().children():
        worker.kill()
    with pytest.raises(WorkerError, match="killed by signal 9 at .*clip.mp4; .*lower data.num_workers") as error:
        for _ in range(10):  # some were read before
            next(batches)
    assert "\n" not in str(error.value)


def test_a_worker_that_does_not_start_is_reported(row, monkeypatch):
    monkeypatch.setattr(workers, "_START", "import sys; sys.exit(3)")
    with closing(ReaderPool(DataConfig(**CONFIG, num_workers=1))) as pool, pytest.raises(WorkerError, match="code 3"):
        pool.submit(read, row).result()


def test_workers_end_with_a_process_that_is_killed():
    code = f"""
import time
from mg.data.loader import DataConfig
from mg.data.workers import ReaderPool

pool = ReaderPool(DataConfig(**{CONFIG}, num_workers=2))
print(*(worker.process.pid for worker in pool.workers), flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        children = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(children) == 2
    psutil.wait_procs(children, timeout=120)
    assert not any(child.is_running() for child in children)
