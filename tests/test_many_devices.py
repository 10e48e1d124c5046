"""Two workers make the updates of one with a batch twice as large; they resume to the bit, and end together.

All on the CPU, by the command that starts workers on Ascend: msrun ... script --option ...
"""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from many_devices import PROOFS, RESUMED, record
from training_runs import SHORT, read_records, short_run, write_data
from workers import finish, start

from mg.checkpoints import read_state_dict

FOLDER = Path(__file__).parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), videos=8)


@pytest.fixture(scope="module")
def group(data, tmp_path_factory):
    """The folder that two workers of many_devices.py have filled."""
    folder = tmp_path_factory.mktemp("group")
    process = start(folder / "logs", FOLDER / "many_devices.py", folder, *data)
    said = finish(process, folder / "logs", 900)
    assert process.returncode == 0, said[-5000:]
    return folder


def load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as stored:
        return dict(stored)


def assert_close(found: dict, wanted: dict, tolerance: float = 1e-6):
    """Absolute, and for gradients and moments relative to the largest of their tensor."""
    assert found.keys() == wanted.keys()
    for name, right in wanted.items():
        scale = max(1.0, np.abs(right).max())
        assert np.abs(found[name] - right).max() <= tolerance * scale, name


def assert_same(found: dict, wanted: dict):
    assert found.keys() == wanted.keys()
    for name, right in wanted.items():
        np.testing.assert_array_equal(found[name], right, err_msg=name)


@pytest.mark.full
@pytest.mark.parametrize("mode", ["graph", "pynative"])
def test_gradients_and_parameters_are_those_of_one_worker_with_the_doubled_batch(group, data, tmp_path, mode):
    """Of both networks, with the discriminator's statistics, dropout, noise, the adaptive weight, EMA, and images."""
    record(tmp_path, [*data, *PROOFS[mode], "--mode=pynative", "--data.batch_size=2"])
    wanted = load(tmp_path / "rank_0.npz")
    assert sum(name.startswith("gradient") for name in wanted) == 3 * (4 + (10 if mode == "pynative" else 7))
    ranks = [load(group / mode / f"rank_{rank}.npz") for rank in (0, 1)]
    assert_same(ranks[1], ranks[0])
    assert_close(ranks[0], wanted)
    for found, right in zip(read_records(group / mode), read_records(tmp_path), strict=True):
        assert found == pytest.approx(right, rel=1e-5, abs=1e-6)
    assert read_records(tmp_path)[0]["adaptive_weight"] > 1


@pytest.mark.full
def test_only_the_first_worker_writes_and_shows_a_bar(group):
    names = {path.name for path in (group / "graph").iterdir()} - {"rank_0.npz", "rank_1.npz"}
    assert names == {
        "checkpoints",
        "config.json",
        "log.jsonl",
        "loss.png",
        "speed.jsonl",
        "tensorboard",
        "two_convs.ckpt",
        "two_convs.json",
    }
    assert len(list((group / "graph" / "tensorboard").iterdir())) == 1
    assert [record["step"] for record in read_records(group / "graph")] == [0, 1, 2]
    for rank, bars in ((0, True), (1, False)):
        said = (group / "logs" / f"worker_{rank}.log").read_text()
        assert ("3/3 [" in said) == bars and ("trainable parameters" not in said)  # its INFO lines need a command line


@pytest.mark.full
@pytest.mark.parametrize(
    "whole, stopped", [("whole", "stopped"), ("sharded", "sharded_stopped"), ("buckets", "buckets_stopped")]
)
def test_two_workers_resume_to_the_bit_in_the_middle_of_an_epoch(group, whole, stopped):
    """With EMA, discriminator, dynamic loss scale and all that is drawn; and in buckets."""
    assert read_records(group / stopped) == read_records(group / whole)
    names = ["model", "state"] + ["discriminator"] * (whole != "buckets")
    for name in names:
        file = f"checkpoints/step_000004/{name}.safetensors"
        assert_same(read_state_dict(group / stopped / file), read_state_dict(group / whole / file))
    assert json.loads((group / stopped / "checkpoints/step_000004/state.json").read_text())["workers"] == 2


@pytest.mark.full
def test_shards_of_both_networks_make_the_updates_of_whole_ones(group):
    """And their checkpoints are whole."""
    ranks = [load(group / "sharded" / f"rank_{rank}.npz") for rank in (0, 1)]
    assert_same(ranks[1], ranks[0])
    assert_close(ranks[0], load(group / "whole" / "rank_0.npz"))
    for name in ("model", "state", "discriminator"):
        file = f"checkpoints/step_000004/{name}.safetensors"
        assert_close(*(read_state_dict(group / run / file) for run in ("sharded", "whole")))
    for found, right in zip(read_records(group / "sharded"), read_records(group / "whole"), strict=True):
        assert found == pytest.approx(right, rel=1e-5, abs=1e-6)


@pytest.mark.full
def test_a_run_continues_with_another_number_of_workers_and_says_what_changes(group, data, tmp_path, caplog):
    """One worker with the doubled batch makes the updates of two; with the same batch, others."""
    shutil.copytree(group / "stopped", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000004")
    options = [*data, *RESUMED, "--max_steps=4", "--resume"]
    short_run(tmp_path / "run", *options, "--data.batch_size=2")
    file = "checkpoints/step_000004/model.safetensors"
    assert_close(read_state_dict(tmp_path / "run" / file), read_state_dict(group / "whole" / file))
    assert "resuming with different batches than before, workers 2 -> 1: the order" in caplog.text
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000004")
    records = short_run(tmp_path / "run", *options, "--max_steps=5")
    assert "workers 2 -> 1, clips per update 2 -> 1, total updates 4 -> 5: the order" in caplog.text
    assert [record["step"] for record in records] == list(range(5))


@pytest.mark.full
def test_workers_check_that_they_agree(group):
    for rank in (0, 1):
        said = json.loads((group / f"rank_{rank}.json").read_text())
        assert said["gathered"] == ["a", "ab"] and said["nothing"]
        assert said["different"].startswith("worker 1 does not match worker 0: its parameters differ; give all")
        assert said["bad_files"] == ["first_0", "first_1", "second_0", "second_1"]
        assert said["stopped"].startswith("4 of 9 files could not be used")


# The end of a run.


def ends(process: subprocess.Popen, logs: Path) -> str:
    """What the terminal shows of a run that ends by itself, and sooner than msrun's ten minutes."""
    said = finish(process, logs, 300)
    assert process.returncode != 0
    return said


def command(data, output: Path) -> list:
    return [
        FOLDER / "training_runs.py",
        *SHORT,
        *data,
        "--output_path",
        output,
        "--mode=pynative",
        "--max_steps=100000",
    ]


def scripts_of(process: subprocess.Popen) -> list[psutil.Process]:
    """msrun's children that run training_runs.py, the scheduler first; not those that are not there yet or any more."""
    found = []
    for child in psutil.Process(process.pid).children():
        try:
            if any(argument.endswith("training_runs.py") for argument in child.cmdline()):
                found.append(child)
        except psutil.Error:  # it has ended between the two looks
            continue
    return found


@pytest.mark.full
@pytest.mark.parametrize("moment", ["before they meet", "in an update"])
def test_a_killed_worker_ends_the_run(data, tmp_path, moment):
    process = start(tmp_path / "logs", *command(data, tmp_path / "run"))
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 300
    met = False
    while not met and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
        workers = scripts_of(process)
        met = len(workers) == 3 and (moment == "before they meet" or (log.exists() and log.stat().st_size > 1000))
    assert met, Path(f"{tmp_path}/logs.txt").read_text()
    workers[-1].send_signal(signal.SIGKILL)
    said = ends(process, tmp_path / "logs")
    assert f"Worker process {workers[-1].pid} exit with exception. Error code: -9" in said


@pytest.mark.full
def test_a_users_mistake_under_msrun_is_one_line_of_each_worker(data, tmp_path):
    """Before the workers meet, and after; both at once, since most of it is waiting."""
    mistakes = {"--csv_path=none.csv": "none.csv: no such CSV file", "--model.name=x": "there is no mo"}
    begun = []
    for number, option in enumerate(mistakes):
        logs, output = tmp_path / f"logs_{number}", tmp_path / f"run_{number}"
        begun.append((start(logs, *command(data, output), option), logs, output, mistakes[option]))
    for process, logs, output, message in begun:
        said = ends(process, logs)
        assert f"worker 0: error: {message}" in said or f"worker 1: error: {message}" in said
        for rank in (0, 1):
            assert "Traceback" not in (logs / f"worker_{rank}.log").read_text()
        assert not output.exists()


@pytest.mark.full
def test_nothing_outlives_msrun(data, tmp_path):
    """Neither Ctrl-C, which msrun answers by killing all, nor its own death."""
    process = start(tmp_path / "logs", *command(data, tmp_path / "run"))
    deadline = time.monotonic() + 300
    log = tmp_path / "run" / "log.jsonl"
    while time.monotonic() < deadline and process.poll() is None and not log.exists():
        time.sleep(0.1)
    assert log.exists(), Path(f"{tmp_path}/logs.txt").read_text()
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 3  # the scheduler and two workers
    process.send_signal(signal.SIGKILL)
    left = psutil.wait_procs(family, timeout=300)[1]
    assert [child for child in left if "tail" not in child.name()] == []
    for child in left:  # msrun's own, which prints the workers' logs
        child.kill()
