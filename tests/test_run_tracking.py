"""A run says how fast it is, draws a few clips, and tells wandb; none of it changes a number of the run."""

import json
import logging
import os
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from unittest import mock

import mindspore as ms
import numpy as np
import pytest
from training_runs import assert_same_weights, read_records, short_run, stopped_at, write_data

from mg import runtime
from mg.checkpoints import read_state_dict
from mg.data.index import read_index
from mg.data.loader import Batch, ClipLoader, DataConfig
from mg.data.video import read_image
from mg.memory import peak_rss
from mg.training import speed
from mg.training.previews import Previews
from mg.training.speed import SpeedMeter
from mg.training.wandb_run import WandbRun

EVERYTHING = "--optim.ema_decay=0.9 --optim.accumulation=2 --data.image_ratio=0.4 --data.random_crop".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def environment():
    """No setting of wandb comes in from outside, nor stays behind."""
    with mock.patch.dict(os.environ):
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            del os.environ[name]
        yield


class FakeRun:
    """What training uses of a wandb run, noted down."""

    def __init__(self, options: dict):
        self.options, self.metrics, self.logged, self.exit_code = options, {}, [], None
        self.id, self.offline, self.url = options["id"], options.get("mode") == "offline", "https://wandb.test/run"
        self.broken = False

    def define_metric(self, name, step_metric=None):
        self.metrics[name] = step_metric

    def log(self, values):
        if self.broken:
            raise ConnectionResetError("Connection lost")
        self.logged.append(values)

    def finish(self, exit_code):
        self.exit_code = exit_code

    def scalars(self) -> list[dict]:
        return [values for values in self.logged if "previews" not in values]

    def images(self) -> list[dict]:
        return [values for values in self.logged if "previews" in values]


class FakeWandb(ModuleType):
    """Stands in for the package; `refusal` is what it says to all that is not offline."""

    def __init__(self):
        super().__init__("wandb")
        self.runs, self.refusal, self.stopped, self.asked = [], None, 0, []

    def init(self, **options):
        self.asked.append((options.get("mode"), sys.stdin.read()))
        if self.refusal and options.get("mode") != "offline":
            raise RuntimeError(self.refusal)
        self.runs.append(FakeRun(options))
        return self.runs[-1]

    def teardown(self):
        self.stopped += 1

    def Image(self, path):
        return read_image(path)


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


# wandb.


@pytest.mark.parametrize("mode", ["pynative", pytest.param("graph", marks=pytest.mark.full)])
def test_wandb_gets_what_the_log_has_and_changes_no_number_of_the_run(tmp_path, data, wandb, monkeypatch, mode):
    trained = []
    draw = Previews.draw

    def watched(self, model, step):
        before = [cell.training for _, cell in model.cells_and_names()]
        path = draw(self, model, step)
        trained.append(before == [cell.training for _, cell in model.cells_and_names()])
        return path

    monkeypatch.setattr(Previews, "draw", watched)
    options = [*data, *EVERYTHING, "--max_steps=5", "--ckpt_save_steps=2", "--mode", mode]
    plain, tracked = tmp_path / "plain", tmp_path / "tracked"
    short_run(plain, *options)
    records = short_run(tracked, *options, "--wandb", "True")
    assert (tracked / "log.jsonl").read_bytes() == (plain / "log.jsonl").read_bytes()
    for file in ("two_convs.ckpt", "checkpoints/step_000005/state.safetensors"):
        assert_same_weights(read_state_dict(tracked / file), read_state_dict(plain / file))
    assert not (plain / "previews").exists() and not (plain / "wandb").exists() and all(trained)

    (run,) = wandb.runs
    assert [{name: scalars[name] for name in record} for scalars, record in zip(run.scalars(), records)] == records
    assert {"speed/frames_per_second", "speed/steps_per_second", "speed/data_wait"} <= set(run.scalars()[-1])
    assert [values["step"] for values in run.images()] == [1, 3, 4]
    assert run.images()[-1]["previews"].shape == (
        4 * 16,
        4 * 16,
        3,
    )  # two clips of four frames, and what became of them
    assert run.metrics == {"step": None, "*": "step"} and run.exit_code == 0
    assert run.options["dir"] == str(tracked) and run.options["config"]["optim"]["lr"] == 0.01
    assert (run.options["name"], os.environ["WANDB_PROJECT"]) == ("tracked", "mg")


def test_a_resumed_run_continues_in_the_same_wandb_run(tmp_path, data, wandb):
    options = [*data, "--mode=pynative", "--wandb", "--preview_clips=0", "--ckpt_save_steps=2", "--max_steps=4"]
    with stopped_at(4):  # updates 3 and 4 are made again
        short_run(tmp_path, *options)
    short_run(tmp_path, *options, "--resume")
    first, second = wandb.runs
    assert first.id == second.id and first.options["resume"] == second.options["resume"] == "allow"
    assert (first.exit_code, second.exit_code) == (1, 0)
    steps = Counter(values["step"] for run in wandb.runs for values in run.logged)
    assert steps == {0: 1, 1: 1, 2: 2, 3: 2} and not (tmp_path / "previews").exists()

    WandbRun(tmp_path, {}, resume=False).begin()
    assert wandb.runs[-1].id != first.id


def test_without_an_account_the_run_is_offline_without_a_question(tmp_path, wandb, monkeypatch, caplog):
    wandb.refusal = "No API key configured.\nUse `wandb login`."
    terminal = mock.Mock(read=lambda: pytest.fail("it asked the terminal"))
    monkeypatch.setattr(sys, "stdin", terminal)
    run = WandbRun(tmp_path, {}, resume=False)
    with caplog.at_level(logging.INFO):
        run.begin()
    assert wandb.asked == [(None, ""), ("offline", "")] and wandb.stopped == 1
    assert sys.stdin is terminal
    (said,) = caplog.messages
    run_id = (tmp_path / "wandb" / "run_id.txt").read_text().strip()
    assert said == (
        "wandb: offline (No API key configured. Use `wandb login`.); to upload the run: "
        f"wandb sync {tmp_path}/wandb/*-{run_id}"
    )


def test_the_users_own_settings_of_wandb_are_kept(tmp_path, wandb):
    os.environ |= {"WANDB_MODE": "disabled", "WANDB_PROJECT": "mine", "WANDB_NAME": "first"}
    WandbRun(tmp_path, {}, resume=False).begin()
    (run,) = wandb.runs
    assert run.options["name"] == "first" and not {"mode", "project", "entity"} & set(run.options)
    assert (os.environ["WANDB_PROJECT"], os.environ["WANDB_MODE"]) == ("mine", "disabled")


def test_a_failure_in_wandb_is_one_warning_and_does_not_end_training(tmp_path, data, wandb, monkeypatch, caplog):
    def broken_from(step):
        log = FakeRun.log

        def broken(self, values):
            self.broken = values["step"] >= step
            log(self, values)

        monkeypatch.setattr(FakeRun, "log", broken)

    broken_from(1)
    options = [*data, "--mode=pynative", "--max_steps=3", "--wandb"]
    assert len(short_run(tmp_path / "lost", *options)) == 3
    assert caplog.text.count("wandb failed, the run continues without it: Connection lost") == 1
    assert len(wandb.runs[0].logged) == 1 and wandb.runs[0].exit_code is None
    assert len(list((tmp_path / "lost" / "previews").iterdir())) == 1

    caplog.clear()
    monkeypatch.setattr(FakeWandb, "init", mock.Mock(side_effect=OSError("no room")))
    run = WandbRun(tmp_path, {}, resume=False)
    run.begin()
    run.add(0, {"loss": 1.0})
    run.close()
    assert caplog.messages == ["wandb failed, the run continues without it: no room"]


@pytest.mark.parametrize("found", [None, ModuleType("wandb")])  # no package; or a folder that is called so
def test_without_the_package_there_is_one_line_before_any_work(tmp_path, monkeypatch, found):
    monkeypatch.setitem(sys.modules, "wandb", found)
    with pytest.raises(ValueError, match="^--wandb needs the package wandb, .*: pip install wandb, or"):
        short_run(tmp_path / "run", "--wandb", "True", "--csv_path", "none.csv")
    assert not (tmp_path / "run").exists()


REAL_RUNS = """
import sys
from pathlib import Path
from training_runs import short_run

output, *data = sys.argv[1:]
options = [*data, "--mode=pynative", "--wandb", "--preview_clips=1"]
short_run(Path(output), *options, "--max_steps=1")
short_run(Path(output), *options, "--max_steps=2", "--resume")
"""


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
@pytest.mark.full
def test_the_package_itself_keeps_a_resumed_run_offline_below_the_output_folder(tmp_path, data):
    environment = os.environ | {
        "HOME": str(tmp_path), "WANDB_ERROR_REPORTING": "false", "NETRC": str(tmp_path / "netrc"),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    command = [sys.executable, "-c", REAL_RUNS, tmp_path / "run", *data]
    result = subprocess.run(
        command, env=environment, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert result.returncode == 0 and "wandb failed" not in result.stderr, result.stderr
    assert len(read_records(tmp_path / "run")) == 2
    run_id = (tmp_path / "run" / "wandb" / "run_id.txt").read_text().strip()
    parts = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert 1 <= len(parts) <= 2 and all(part.name.endswith(f"-{run_id}") for part in parts)  # named by the second
    written = b"".join(path.read_bytes() for part in parts for path in part.glob("*.wandb"))
    assert b"grad_norm" in written and b"speed/peak_memory_gb" in written
    assert any(part.glob("files/media/images/previews_*.png") for part in parts)
    assert not (tmp_path / "wandb").exists()


# Previews.


def test_previews_are_the_first_clips_of_the_run_above_their_reconstructions(tmp_path, data):
    rows = read_index(data[1], data[3])
    config = DataConfig(sample_n_frames=12, image_size=16, crop_size=16, image_ratio=0.5, num_workers=0)
    loader = ClipLoader(rows, config, seed=3)
    black = lambda x: ms.ops.zeros_like(x) - 1  # noqa: E731  # a model
    path = Previews(tmp_path, loader, 2).draw(black, 7)
    picture = read_image(path)
    assert path.name == "step_000007.png" and picture.shape == (4 * 16, 8 * 16, 3)  # eight of twelve frames
    rows_of = picture.reshape(4, 16, 8 * 16, 3)
    assert not rows_of[1::2].any()
    first = next(batch for batch in loader.batches() if batch.x.shape[2] == 12)  # not the image of an earlier step
    np.testing.assert_array_equal(rows_of[0][:, :16], np.rint((first.x[0, :, 0] + 1) * 127.5).transpose(1, 2, 0))

    other = Previews(tmp_path, ClipLoader(rows, config, seed=3), 2).draw(black, 9)  # as after a resume
    assert other.read_bytes() == path.read_bytes()
    many = read_image(Previews(tmp_path, loader, 10).draw(black, 8))
    assert 6 * 16 <= len(many) <= 8 * 16  # the three videos, and the still one where an image step has it
    assert Previews(tmp_path, loader, 0).draw(black, 1) is None


def test_a_file_that_a_preview_cannot_read_is_not_counted(tmp_path):
    data = write_data(tmp_path)
    (tmp_path / "videos" / "0.mp4").write_bytes(b"no video")
    loader = ClipLoader(read_index(data[1], data[3]), DataConfig(crop_size=16, sample_n_frames=4, max_bad_share=1.0))
    assert Previews(tmp_path, loader, 3).draw(lambda x: x, 1).is_file()
    assert not loader.bad_files


# Speed.


class Clock:
    """Seconds that pass only when they are told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def measured(meter: SpeedMeter, clock: Clock, frames: int, waiting: float, working: float, batches: int = 1) -> None:
    """An update of two clips a batch."""

    def read():
        for _ in range(batches):
            clock.now += waiting
            yield Batch(0, 0, np.zeros((2, 3, frames, 8, 8), np.float32), ["a", "b"])

    meter.begin()
    for _ in meter.timed(read()):
        clock.now += working
    meter.end()
    clock.now += 1000  # a checkpoint


def test_speed_is_that_of_the_last_updates_that_did_not_compile():
    clock = Clock()
    meter = SpeedMeter(world_size=4, clock=clock)
    measured(meter, clock, frames=8, waiting=0.0, working=100.0)  # compiles
    assert "frames_per_second" not in meter.scalars() and "frames/s" not in meter.describe()
    measured(meter, clock, frames=8, waiting=1.0, working=3.0)
    measured(meter, clock, frames=1, waiting=0.0, working=100.0)  # compiles
    measured(meter, clock, frames=1, waiting=0.5, working=0.5, batches=2)
    found = meter.scalars()
    assert found["frames_per_second"] == pytest.approx(4 * (2 * 8 + 2 * 2 * 1) / 6)
    assert (found["steps_per_second"], found["data_wait"]) == pytest.approx((2 / 6, 2 / 6))
    assert meter.describe().startswith(
        "13.3 frames/s, 0.333 updates/s and 33% of the time waiting for data in the last 2"
    )
    for _ in range(speed.WINDOW):
        measured(meter, clock, frames=8, waiting=0.0, working=2.0)
    assert meter.scalars()["frames_per_second"] == pytest.approx(4 * 2 * 8 / 2)  # what was before is forgotten


def test_waiting_for_data_is_reported_once_with_a_remedy(monkeypatch):
    monkeypatch.setattr(speed.os, "cpu_count", lambda: 8)
    for waiting, said in ((0.5, None), (2.0, "training waits for data: 40% of the time of the last 50 updates")):
        clock = Clock()
        meter = SpeedMeter(clock=clock)
        for _ in range(speed.WINDOW):
            measured(meter, clock, frames=8, waiting=waiting, working=3.0)
            assert meter.warning(4) is None, "the first of them compiled"
        measured(meter, clock, frames=8, waiting=waiting, working=3.0)
        found = meter.warning(4)
        if said is None:
            assert found is None
        else:
            assert found.startswith(said) and "is 4, with 8 processors here: more of them, or smaller files" in found
        assert meter.warning(4) is None


def test_peak_memory_is_the_devices_if_counted_else_the_processs(monkeypatch):
    held = np.ones(64 * 2**20, np.uint8)
    assert runtime.peak_memory() == (peak_rss(), "process") and peak_rss() >= held.nbytes
    assert SpeedMeter().describe().endswith(" GB of the process")
    monkeypatch.setattr(runtime, "device", lambda: "ascend")
    monkeypatch.setattr(ms.runtime, "max_memory_allocated", lambda: 5_000_000_000)
    assert runtime.peak_memory() == (5_000_000_000, "device")
    assert SpeedMeter().scalars() == {"peak_memory_gb": 5.0}
    assert SpeedMeter().describe() == "peak memory 5.00 GB of the device"


def test_each_update_has_its_own_speed_even_after_a_resume(tmp_path, data, caplog, monkeypatch):
    monkeypatch.setattr(speed, "WINDOW", 1)
    monkeypatch.setattr(speed, "WAITS", 0.0)  # any wait is too long
    options = [*data, "--mode=pynative", "--data.image_ratio=0", "--max_steps=4", "--ckpt_save_steps=2"]
    with caplog.at_level(logging.INFO), stopped_at(4):
        short_run(tmp_path, *options)
    assert "update 2: " in caplog.text and "frames/s" in caplog.text and "updates of shapes seen before" in caplog.text
    assert caplog.text.count("training waits for data") == 1
    short_run(tmp_path, *options, "--resume")
    speeds = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    assert [record["step"] for record in speeds] == [0, 1, 2, 3]
    fast = [record for record in speeds if "frames_per_second" in record]
    assert [record["step"] for record in fast] == [1, 3]  # 0 and 2 are the first of a process
    for record in fast:
        assert record["frames_per_second"] == pytest.approx(4 * record["steps_per_second"])
        assert 0 <= record["data_wait"] <= 1 and record["peak_memory_gb"] > 0
    assert not any("second" in name or "data_wait" in name for name in read_records(tmp_path)[0])
