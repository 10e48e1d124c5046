"""A run writes what it promises, resumes to the bit after SIGKILL, and ends with one line if it cannot continue."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from tensorboardX.proto.event_pb2 import Event
from training_runs import SHORT, assert_same_weights, kill_after, read_records, short_run, stopped_at, write_data

from mg.checkpoints import read_state_dict, write_state_dict
from mg.config import parse_config, to_dict
from mg.data.index import read_index
from mg.data.loader import ClipLoader, DataConfig
from mg.data.video import read_image
from mg.losses.lpips import LPIPS
from mg.models import create_model, from_pretrained
from mg.models.discriminator import DiscriminatorConfig
from mg.training.autoencoder import TrainConfig
from mg.training.data_changes import describe_changes
from mg.training.step import TrainStep
from mg.training.trainer import TrainingError

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "train_tae.py"
SMALL_SCRIPT = Path(__file__).with_name("training_runs.py")
TAE = dict(  # of one level, twice as long as its latents: little to compile
    ch=32, ch_mult=[1], num_res_blocks=1, z_channels=4, temporal_downsample_level=[0], temporal_upsample_level=[0]
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The options that name a small data set of three videos and an image."""
    return write_data(tmp_path_factory.mktemp("data"))


def read_events(folder: Path, speed: bool = False) -> dict[str, dict[int, float]]:
    """TensorBoard's scalars, {name: {step: value}}: of the speed, which no two runs have in common, or the others."""
    scalars = {}
    for path in folder.glob("events.*"):
        content, at = path.read_bytes(), 0
        while at + 8 <= len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            if at + length + 16 > len(content):  # cut short by a kill
                break
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += length + 16  # length, its checksum, event, its checksum
            assert event.session_log.status == 0  # no point is void
            for value in event.summary.value:
                if value.tag.startswith("speed/") == speed:
                    scalars.setdefault(value.tag, {})[event.step] = value.simple_value
    return scalars


def weights(output: Path, name: str = "two_convs") -> dict[str, np.ndarray]:
    return read_state_dict(output / f"{name}.ckpt")


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """Output folder and terminal of a run of eight updates in graph mode, begun from the command line."""
    output = tmp_path_factory.mktemp("finished") / "run"
    options = ["--max_steps=8", "--ckpt_save_steps=3", "--optim.warmup_steps", "3", "--ckpt_max_keep", "2"]
    command = [sys.executable, SMALL_SCRIPT, *SHORT, *data, "--output_path", output, *options]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return output, result.stderr


def test_a_run_writes_log_events_curve_checkpoints_and_weights(finished):
    output, _ = finished
    records = read_records(output)
    assert [record["step"] for record in records] == list(range(8))
    assert list(records[0]) == [
        "step",
        "loss",
        "l1",
        "lpips",
        "kl",
        "outlier",
        "grad_norm",
        "lr",
        "loss_scale",
        "skipped",
    ]
    assert [record["lr"] for record in records[:4]] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01, 0.01])
    assert records[-1]["loss"] < records[0]["loss"]
    events = read_events(output / "tensorboard")
    for name in list(records[0])[1:]:
        assert events[name] == pytest.approx({record["step"]: record[name] for record in records}, rel=1e-6)
    height, width, _ = read_image(output / "loss.png").shape
    assert height > 200 and width > 400
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step_000006", "step_000008"]
    assert sorted(path.name for path in output.iterdir()) == [
        "checkpoints",
        "config.json",
        "log.jsonl",
        "loss.png",
        "speed.jsonl",
        "tensorboard",
        "two_convs.ckpt",
        "two_convs.json",
    ]


def test_the_weights_of_a_run_load_as_a_model(finished):
    output, _ = finished
    expected = create_model("two_convs")
    for path in (output / "two_convs.ckpt", output / "checkpoints" / "step_000008"):
        model = from_pretrained(path)
        assert [name for name, _ in model.named_weights()] == [name for name, _ in expected.named_weights()]
        assert_same_weights({name: p.asnumpy() for name, p in model.named_weights()}, weights(output))


def test_the_terminal_shows_progress_time_left_and_loss(finished):
    _, said = finished
    last = said.replace("\r", "\n").strip().splitlines()[-1]
    assert "8/8" in last and "loss=" in last and "step" in last and "frames/s=" in last and "data_wait=" in last
    first = next(line for line in said.replace("\r", "\n").splitlines() if " 1/8 " in line)
    assert "<" in first  # elapsed<left
    assert "Traceback" not in said and "Exception" not in said


def test_config_json_holds_every_setting(finished, data):
    output, _ = finished
    stored = json.loads((output / "config.json").read_text())
    config = parse_config(TrainConfig, "", ["--config", str(output / "config.json")])
    assert json.loads(json.dumps(to_dict(config))) == stored
    assert stored["data"]["crop_size"] == 16 and stored["csv_path"] == data[1]


def test_images_are_mixed_in_at_the_set_ratio(tmp_path, data, monkeypatch):
    frames = []
    accumulate = TrainStep.accumulate
    monkeypatch.setattr(
        TrainStep, "accumulate", lambda self, x, *noise: frames.append(x.shape[2]) or accumulate(self, x, *noise)
    )
    short_run(tmp_path, *data, "--max_steps=10", "--data.image_ratio=0.3", "--optim.accumulation=2")
    assert frames.count(1) == 6 and frames.count(4) == 14
    for worker in range(2):  # of two: images at the same steps
        loader = ClipLoader(read_index(data[1], data[3]), DataConfig(image_ratio=0.3), 42, worker, 2)
        assert [loader.is_image_step(step) for step in range(20)] == [count == 1 for count in frames]


def test_both_modes_log_the_same_losses(finished, data, tmp_path):
    records = short_run(tmp_path, *data, "--max_steps=8", "--optim.warmup_steps=3", "--mode=pynative")
    for name in ("loss", "l1", "grad_norm", "lr"):
        assert [r[name] for r in records] == pytest.approx([r[name] for r in read_records(finished[0])], rel=1e-5)


# Resuming.

EVERYTHING = (
    "--optim.ema_decay=0.9 --optim.accumulation=2 --data.image_ratio=0.4 --data.random_crop --data.flip".split()
)


def test_a_resumed_run_is_the_run_that_was_not_stopped(tmp_path, data):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = [*data, *EVERYTHING, "--optim.schedule=cosine_decay", "--ckpt_save_steps=2", "--max_steps=6"]
    short_run(whole, *options)
    for step in (4, 6):  # stopped where a checkpoint was due: two updates are made again
        with stopped_at(step):
            short_run(parts, *options, "--resume")
    short_run(parts, *options, "--resume")
    assert read_records(parts) == read_records(whole)
    assert_same_weights(weights(parts), weights(whole))
    assert read_events(parts / "tensorboard") == read_events(whole / "tensorboard")
    speeds = [json.loads(line) for line in (parts / "speed.jsonl").read_text().splitlines()]
    assert [record["step"] for record in speeds] == list(range(6))
    for name, points in read_events(parts / "tensorboard", speed=True).items():
        of_this = {r["step"]: r[name.removeprefix("speed/")] for r in speeds if name.removeprefix("speed/") in r}
        assert points == pytest.approx(of_this, rel=1e-6), name

    assert short_run(parts, *options, "--resume") == read_records(whole)  # nothing is left to do
    assert_same_weights(weights(parts), weights(whole))


def test_resume_needs_neither_the_weights_nor_the_config_that_the_run_began_with(tmp_path, data):
    begun_from = create_model("two_convs", z_channels=3)
    begun_from.save_weights(tmp_path / "first.ckpt")
    options = [*data, "--model.from_pretrained", tmp_path / "first.ckpt", "--max_steps=2"]
    short_run(tmp_path / "run", *options)
    for path in tmp_path.glob("first.*"):
        path.unlink()
    assert len(short_run(tmp_path / "run", *options, "--max_steps=3", "--resume")) == 3
    assert from_pretrained(tmp_path / "run" / "two_convs.ckpt").config["z_channels"] == 3


def test_resume_starts_from_the_beginning_without_a_checkpoint(tmp_path, data):
    (tmp_path / "checkpoints" / ".step_000001.partial").mkdir(parents=True)
    assert [record["step"] for record in short_run(tmp_path, *data, "--max_steps=2", "--resume")] == [0, 1]


def test_a_folder_with_checkpoints_is_not_started_again(finished, data):
    output, _ = finished
    before = (output / "log.jsonl").read_bytes()
    with pytest.raises(TrainingError, match="holds checkpoints of a run; continue it with --resume, or choose another"):
        short_run(output, *data)
    assert (output / "log.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "changed, message",
    [
        (["--optim.ema_decay=0.9"], "step_000008: its optimizer, EMA or loss scale is not this run's"),
        (["--model.dtype=fp16"], "step_000008: its optimizer, EMA or loss scale is not this run's"),
        (["--model.config.z_channels=3"], "step_000008 does not fit this two_convs"),
        (["--model.name=image_vae"], "step_000008 holds a model other than 'image_vae'"),
    ],
)
def test_resuming_with_other_settings_is_one_clear_line(finished, data, changed, message):
    output, _ = finished
    before = (output / "log.jsonl").read_bytes()
    with pytest.raises(ValueError) as error:
        short_run(output, *data, "--resume", *changed)
    assert message in str(error.value)
    assert (output / "log.jsonl").read_bytes() == before


def test_settings_that_may_change_are_named_when_they_do(tmp_path, data, caplog):
    short_run(tmp_path, *data, "--max_steps=1")
    short_run(tmp_path, *data, "--max_steps=2", "--optim.lr=0.5", "--resume")
    assert "resuming with different settings than before: optim.lr 0.01 -> 0.5, max_steps 1 -> 2" in caplog.text
    assert json.loads((tmp_path / "config.json").read_text())["optim"]["lr"] == 0.5


ROWS = ["0.mp4,moving", "1.mp4,moving", "2.mp4,moving", "still.png,moving"]


@pytest.mark.parametrize(
    "rows, message",
    [
        (ROWS[:2], "2 rows gone (2.mp4, still.png)"),
        ([*ROWS, "0.mp4,again"], "1 row new (0.mp4)"),
        ([*ROWS[:3], "still.png,stands"], "1 row edited (still.png)"),
        (ROWS[::-1], "the rows are in another order"),
        (
            [ROWS[3], "a/3.mp4,b", ROWS[0]],
            "2 rows gone (1.mp4, 2.mp4), 1 row new (a/3.mp4), the others in another order",
        ),
    ],
)
def test_a_resumed_run_says_how_its_data_changed_and_ends_unless_told_otherwise(trained, tmp_path, rows, message):
    output, options = tmp_path / "run", ["--csv_path", str(tmp_path / "train.csv"), *trained[1][2:]]
    shutil.copytree(trained[0], output)
    (tmp_path / "train.csv").write_text("\n".join(["video,caption", *rows]) + "\n")
    with pytest.raises(TrainingError) as error:
        short_run(output, *options, "--max_steps=2", "--resume")
    assert f"step_000001 was trained on: {message}. Restore the CSV, or pass --resume_changed_data" in str(error.value)
    assert str(tmp_path / "train.csv") in str(error.value) and len(read_records(output)) == 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    """The folder of a run of one update, and the options that name its data."""
    output = tmp_path_factory.mktemp("trained") / "run"
    short_run(output, *data, "--max_steps=1")
    return output, data


def test_a_run_continues_with_changed_data_on_request(trained, tmp_path, caplog):
    output, options = tmp_path / "run", ["--csv_path", str(tmp_path / "train.csv"), *trained[1][2:]]
    shutil.copytree(trained[0], output)
    (tmp_path / "train.csv").write_text("\n".join(["video,caption", *ROWS[1:]]) + "\n")
    assert len(short_run(output, *options, "--max_steps=2", "--resume", "--resume_changed_data")) == 2
    assert "resuming with different data than before: 1 row gone (0.mp4)" in caplog.text
    caplog.clear()
    assert len(short_run(output, *options, "--max_steps=3", "--resume")) == 3  # they are the run's own now
    assert "data" not in caplog.text


def test_the_same_rows_from_elsewhere_are_no_change(trained, tmp_path, data):
    output, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(trained[0], output)
    shutil.copytree(data[3], moved)
    (tmp_path / "copy.csv").write_text("\ufeffvideo,caption\r\n" + "\r\n".join(ROWS), newline="")
    options = ["--csv_path", str(tmp_path / "copy.csv"), "--video_folder", str(moved)]
    assert len(short_run(output, *options, "--max_steps=2", "--resume")) == 2


def test_a_run_saved_by_an_older_version_continues_and_says_so(trained, tmp_path, data, caplog):
    output = tmp_path / "run"
    shutil.copytree(trained[0], output)
    state = output / "checkpoints" / "step_000001" / "state.json"
    state.write_text(
        json.dumps({name: value for name, value in json.loads(state.read_text()).items() if name != "data"})
    )
    assert len(short_run(output, *data, "--max_steps=2", "--resume")) == 2
    assert "step_000001 does not say which data it was trained on" in caplog.text


def test_rows_that_come_twice_are_told_apart():
    a, b, c = ["a", "1"], ["a", "2"], ["b", "1"]
    for before, now, said in (
        ([a, b], [a, b], ""),
        ([a, b], [b, a], "the rows are in another order"),
        ([a, a], [a], "1 row gone (a)"),
        ([a, a, c], [a, b, c], "1 row edited (a)"),
        ([a, b, c], [c, b], "1 row gone (a), the others in another order"),
        ([a] * 9, [["b", "1"]], "9 rows gone (a), 1 row new (b)"),
        ([[str(i), ""] for i in range(9)], [a], "9 rows gone (0, 1, 2, ...), 1 row new (a)"),
    ):
        assert describe_changes(before, now) == said


def test_a_run_of_random_lengths_says_their_shapes_and_resumes_to_the_bit(tmp_path, data, caplog):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    settings = [*data, "--data.random_frames", "--data.sample_n_frames=3", "--seed=0"]
    settings += ["--max_steps=8", "--ckpt_save_steps=3"]
    with caplog.at_level("INFO"):
        records = short_run(whole, *settings)
    assert "shapes of batches: 3 in 8 updates" in caplog.text
    for frames in (1, 2, 3):
        assert caplog.text.count(f"the first batch of shape (1, 3, {frames}, 16, 16)") == 1

    with stopped_at(6):  # updates 4 to 6 are made again
        short_run(stopped, *settings)
    assert len(read_records(stopped)) == 6
    caplog.clear()
    with caplog.at_level("INFO"):
        assert short_run(stopped, *settings, "--resume") == records
    assert "shapes of batches: 3 in 5 updates" in caplog.text
    assert_same_weights(weights(stopped), weights(whole))


def test_a_run_trains_the_model_of_its_weights(tmp_path, data):
    create_model("two_convs").save_weights(tmp_path / "start.ckpt")
    options = [f"--model.from_pretrained={tmp_path}/start.ckpt", "--model.name=null"]
    short_run(tmp_path / "run", *data, *options, "--max_steps=1", "--mode=pynative")
    assert from_pretrained(tmp_path / "run" / "two_convs.ckpt").name == "two_convs"


def test_frozen_parts_stay_as_they_were(tmp_path, data):
    create_model("two_convs").save_weights(tmp_path / "start.ckpt")
    start = read_state_dict(tmp_path / "start.ckpt")
    options = [f"--model.from_pretrained={tmp_path}/start.ckpt", "--model.freeze=[encoder]", "--optim.ema_decay=0.5"]
    short_run(tmp_path / "run", *data, *options, "--max_steps=3", "--ckpt_save_steps=2")
    short_run(tmp_path / "run", *data, *options, "--max_steps=4", "--resume")
    end = weights(tmp_path / "run")
    assert end.keys() == start.keys()
    for name, value in start.items():
        assert np.array_equal(end[name], value) == name.startswith("encoder."), name


@pytest.mark.parametrize("model", ["two_convs", pytest.param("tae", marks=pytest.mark.full)])
def test_a_run_killed_with_sigkill_resumes_to_the_bit(tmp_path, data, model):
    """With fp16 and its loss scale, EMA, accumulation and images, killed between two checkpoints; the TAE compiled."""
    settings = {"model": {"name": model, "dtype": "fp16"}, "mode": "pynative"}
    script, updates, save_every = SMALL_SCRIPT, 24, 6
    if model == "tae":
        settings = {"model": {"name": model, "dtype": "fp16", "config": TAE}, "mode": "graph"}
        script, updates, save_every = SCRIPT, 12, 3
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))

    def start(output: Path, *options: str) -> subprocess.Popen:
        command = [sys.executable, script, *SHORT, "--config", tmp_path / "run.yaml", *data, *EVERYTHING]
        command += ["--data.sample_n_frames=8", "--optim.lr=1e-3", "--optim.init_loss_scale=16384"]
        command += [f"--max_steps={updates}", f"--ckpt_save_steps={save_every}", "--output_path", output, *options]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed, doomed = start(whole), start(killed)
    kill_after(doomed, killed, lines=save_every + 5)
    newest = max(path.name for path in (killed / "checkpoints").glob("step_*"))
    logged = len((killed / "log.jsonl").read_bytes().splitlines())
    assert int(newest[5:]) <= logged < updates
    assert undisturbed.wait() == 0, undisturbed.stderr.read()
    resumed = start(killed, "--resume")
    assert resumed.wait() == 0, resumed.stderr.read()

    records = read_records(whole)
    assert read_records(killed) == records
    assert [record["step"] for record in records] == list(range(updates))
    if model == "tae":  # the scale came down on the way
        assert 0 < records[-1]["skipped"] < 8 and records[-1]["loss_scale"] < 16384
    assert_same_weights(weights(killed, model), weights(whole, model))
    assert (killed / f"{model}.ckpt").read_bytes() == (whole / f"{model}.ckpt").read_bytes()
    np.testing.assert_equal(read_events(killed / "tensorboard"), read_events(whole / "tensorboard"))


# Runs that cannot continue.


def poison(monkeypatch, bad_steps):
    """Let the batches of these steps hold a value that is not a number."""
    batches = ClipLoader.batches

    def poisoned(self, start_step=0):
        for batch in batches(self, start_step):
            if batch.step in bad_steps:
                batch.x[0, 0, 0, 0, 0] = np.nan
            yield batch

    monkeypatch.setattr(ClipLoader, "batches", poisoned)


def test_updates_that_are_not_finite_are_counted_and_skipped(tmp_path, data, monkeypatch, caplog):
    poison(monkeypatch, {2, 3, 5})
    records = short_run(tmp_path, *data, "--max_steps=8", "--optim.warmup_steps=4", "--optim.max_skipped=3")
    assert [record["skipped"] for record in records] == [0, 0, 1, 2, 2, 3, 3, 3]
    assert [record["loss"] is None for record in records] == [False, False, True, True, False, True, False, False]
    climb = [0.0025, 0.005, 0.0075, 0.0075, 0.0075, 0.01, 0.01, 0.01]  # an update left out does not move the rate on
    assert [record["lr"] for record in records] == pytest.approx(climb)
    assert "3 of 8 updates skipped" in caplog.text
    assert all(np.isfinite(value).all() for value in weights(tmp_path).values())


def test_too_many_in_a_row_stop_the_run_also_across_a_resume(tmp_path, data, monkeypatch):
    poison(monkeypatch, range(3, 100))
    message = "not finite in 4 updates in a row, the last being number 7; lower --optim.lr, or train in fp32 or bf16"
    options = [*data, "--max_steps=20", "--ckpt_save_steps=5", "--optim.max_skipped=4"]
    for resume in ([], ["--resume"]):
        with pytest.raises(TrainingError, match=message):
            short_run(tmp_path, *options, *resume)
        assert [record["step"] for record in read_records(tmp_path)] == list(range(7))
    assert not (tmp_path / "two_convs.ckpt").exists()


def test_too_many_unreadable_files_stop_the_run(tmp_path):
    data = write_data(tmp_path)
    for name in ("0.mp4", "1.mp4"):
        (tmp_path / "videos" / name).write_bytes(b"no video")
    with pytest.raises(ValueError, match="of 4 files could not be used, more than max_bad_share = 0.1 allows: .*mp4"):
        short_run(tmp_path / "run", *data, "--max_steps=8")
    records = short_run(tmp_path / "tolerant", *data, "--max_steps=8", "--data.max_bad_share=0.5")
    assert len(records) == 8


@pytest.mark.parametrize(
    "options, message",
    [
        (["--csv_path", "none.csv"], "none.csv: no such CSV file"),
        (["--model.from_pretrained", "none.ckpt"], "none.ckpt"),
        (["--model.name", "vae"], "there is no model 'vae'; the models are "),
        (["--model.config.z_chanels", "3"], "two_convs has no config key 'z_chanels'; did you mean 'z_channels'?"),
        (["--loss.perceptual_weight", "1"], "mg-convert-lpips"),
        (["--loss.latent_weight=1"], "loss.latent_weight is 1.0; it must be 0, two_convs has no first stage"),
        (["--loss.identity_weight=1"], "loss.identity_weight is 1.0; it must be 0, two_convs has no first stage"),
        (["--loss.pixel_weight=0"], "loss.pixel_weight is 0.0; it must be above 0 if latent_weight and identity"),
        (["--loss.pixel_weight=0", "--discriminator.ndf=4"], "pixel_weight is 0.0; it must be above 0 with a discrim"),
        (["--model.freeze=[decodr]"], "names 'decodr', which two_convs doesn't have; its parts are encoder, decoder"),
        (["--model.freeze=[encoder, decoder]"], "must leave some of two_convs to train"),
        (["--model.spatial_from_pretrained=x"], "is x; it must be null, two_convs has only one stage"),
        (["--max_steps", "0"], "max_steps is 0; it must be at least 1"),
        (["--discriminator.ndff", "4"], "unknown option 'discriminator.ndff'; did you mean 'discriminator.ndf'?"),
        (["--discriminator.ndf", "few"], "discriminator.ndf is 'few'; it must be a whole number"),
        (["--discriminator.ndf", "0"], "ndf is 0; it must be at least 1"),
        (["--discriminator", "3"], "discriminator is '3'; it must be null or a section with its own keys"),
        (["--preview_clips", "-1"], "preview_clips is -1; it must be at least 0"),
        (["--ckpt_save_interval", "0"], "ckpt_save_interval is 0; it must be at least 1"),
        (["--data.sample_n_frames", "50"], "too short: 12 frames, 50 needed"),
        (["--device", "ascend"], "device is 'ascend', but there is no Ascend NPU here"),
    ],
)
def test_a_run_that_cannot_begin_says_why(tmp_path, data, options, message):
    with pytest.raises(ValueError) as error:
        short_run(tmp_path / "run", *data, *options)
    assert message in str(error.value)


def test_mistakes_are_one_line_and_code_two_on_the_command_line(tmp_path, data):
    command = [sys.executable, SMALL_SCRIPT, *SHORT, *data, "--output_path", tmp_path / "run"]
    for options, message in (
        (["--csv_path", tmp_path / "none.csv"], "none.csv: no such CSV file"),
        (["--model.from_pretrained", tmp_path / "none.ckpt"], "none.ckpt"),
    ):
        result = subprocess.run([*command, *options], capture_output=True, text=True)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and message in result.stderr
    assert not (tmp_path / "run").exists()


def test_ctrl_c_ends_a_run_with_its_log_whole(tmp_path, data):
    command = [sys.executable, SMALL_SCRIPT, *SHORT, *data, "--output_path", tmp_path, "--epochs", "100000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (
        (tmp_path / "log.jsonl").exists() and len((tmp_path / "log.jsonl").read_bytes().splitlines()) > 3
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 130, said
    assert said.endswith("interrupted\n") and "Traceback" not in said
    assert [record["step"] for record in read_records(tmp_path)] == list(range(len(read_records(tmp_path))))
    assert (tmp_path / "loss.png").exists()


# The specification's commands.


def read_config(model: str, name: str, stage: int = 1) -> TrainConfig:
    """A shipped training config."""
    path = ROOT / "configs" / model / "train" / f"{name}.yaml"
    config = parse_config(TrainConfig, "", ["--config", str(path), "--dataset.data_path", "x.csv"])
    assert config.csv_path == "x.csv" and config.seed == 42 and not config.resume
    assert (config.discriminator is not None) == (stage == 2)
    return config


def test_the_taes_training_configs_hold_the_recipe():
    short, long = (read_config("tae", name) for name in ("mixed_256x256x16", "mixed_256x256x32"))
    for config in (short, long):
        assert (config.optim.lr, config.optim.clip_norm, config.data.batch_size) == (1e-5, 1.0, 1)
        assert (config.data.image_ratio, config.epochs, config.ckpt_save_interval) == (0.2, 2000, 50)
        assert (config.loss.perceptual_weight, config.loss.kl_weight) == (1.0, 1e-6)
        assert (config.data.crop_size, config.model.from_pretrained) == (256, "models/tae_vae2d.ckpt")
    assert (short.data.sample_n_frames, short.model.dtype, short.grad_checkpoint) == (16, "fp32", False)
    assert (long.data.sample_n_frames, long.model.dtype, long.grad_checkpoint) == (32, "bf16", True)


@pytest.mark.parametrize(
    "name, frames, size, stage, grad_checkpoint",
    [
        ("video_dc_ae", 32, 256, 1, False),
        ("video_dc_ae_disc", 32, 256, 2, True),
        ("video_dc_ae_96f", 96, 256, 1, True),
        ("video_dc_ae_512px", 32, 512, 1, True),
    ],
)
def test_dc_aes_training_configs_hold_the_recipe(name, frames, size, stage, grad_checkpoint):
    config = read_config("dc_ae", name, stage)
    assert (config.model.name, config.model.dtype, config.output_path) == ("dc_ae", "bf16", f"outputs/{name}")
    assert config.data.buckets == {f"{size}px_ar1:1": {frames: [1.0, 1]}}
    assert (config.data.image_ratio, config.data.fps_max) == (0.2, 24)
    assert (config.loss.perceptual_weight, config.loss.kl_weight) == (0.5, 0)
    assert (config.epochs, config.ckpt_save_steps, config.ckpt_max_keep) == (100, 3000, 50)
    assert (config.grad_checkpoint, config.model.disc_off_grad_ckpt) == (grad_checkpoint, stage == 2)
    assert (config.optim.lr, config.optim.ema_decay) == (5e-5, 0.99)
    for optim in (config.optim, config.optim_discriminator):
        assert (*optim.optimizer_options().values(), optim.weight_decay) == (0.9, 0.98, 1e-8, 0)
        assert (optim.clip_norm, optim.schedule, optim.warmup_steps) == (1.0, "constant", 0)
    if stage == 2:
        assert config.optim_discriminator.lr == 1e-4
        assert config.discriminator == DiscriminatorConfig(ndf=64, n_layers=5, dropout=0.3, from_pretrained=None)
        assert (config.gen_loss_config.gen_start, config.gen_loss_config.disc_weight) == (0, 0.05)
        assert (config.disc_loss_config.disc_start, config.disc_loss_config.disc_loss_type) == (0, "hinge")


def test_the_temporal_vaes_training_configs_hold_the_recipe():
    first, second, third = stages = [read_config("temporal_vae", f"stage{number}") for number in (1, 2, 3)]
    for number, config in enumerate(stages, 1):
        assert (config.model.name, config.model.dtype, config.grad_checkpoint) == ("temporal_vae", "bf16", True)
        assert config.output_path == f"outputs/temporal_vae_stage{number}"
        assert config.model.config["micro_frame_size"] == 17
        assert config.model.config["micro_batch_size"] is None
        assert (config.data.image_size, config.data.crop_size, config.data.sample_stride) == (256, 256, 1)
        assert (config.data.batch_size, config.optim.accumulation, config.ckpt_save_steps) == (1, 1, 1000)
        assert (config.optim.lr, config.optim.name) == (1e-5, "adamw")
        assert (config.optim.clip_norm, config.optim.weight_decay, config.optim.ema_decay) == (1.0, 0, 0)
        assert (config.loss.perceptual_weight, config.loss.kl_weight, config.loss.kl_per_clip) == (0.1, 1e-6, True)
        assert config.loss.detach_latents
    losses = [(c.loss.pixel_weight, c.loss.latent_weight, c.loss.identity_weight) for c in stages]
    assert losses == [(0, 1, 1), (0, 1, 0), (1, 0, 0)]
    frames = [(c.data.sample_n_frames, c.data.random_frames, c.data.image_ratio) for c in stages]
    assert frames == [(17, False, 0.2), (17, False, 0.2), (34, True, 0)]
    assert [(c.epochs, c.max_steps) for c in stages] == [(100, 380_000), (100, 260_000), (100, 540_000)]
    assert [c.model.freeze for c in stages] == [["spatial_vae"], [], []]
    assert (first.model.from_pretrained, first.model.spatial_from_pretrained) == (None, "models/sdxl_vae")
    for before, after in ((first, second), (second, third)):  # each begins with the weights that the last one wrote
        assert after.model.from_pretrained == f"{before.output_path}/temporal_vae.ckpt"
        assert after.model.spatial_from_pretrained is None


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with scripts/, configs/, a small inflated TAE and LPIPS weights under models/, and a data set."""
    for name in ("scripts", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_data(tmp_path)
    (tmp_path / "models").mkdir()
    create_model("tae", **TAE).save_weights(tmp_path / "models" / "tae_vae2d.ckpt")
    with monkeypatch.context() as patch:
        patch.setattr(LPIPS, "_load", lambda *_: None)
        shapes = {name: parameter.shape for name, parameter in LPIPS("vgg").parameters_dict().items()}
    rng = np.random.default_rng(0)
    random = {name: (0.05 * np.abs(rng.standard_normal(shape))).astype(np.float32) for name, shape in shapes.items()}
    write_state_dict(tmp_path / "models" / "lpips_vgg.safetensors", random)
    return tmp_path


@pytest.mark.full
@pytest.mark.parametrize("name", ["mixed_256x256x16", "mixed_256x256x32"])
def test_the_specifications_command_trains(workplace, name):
    sizes = "--data.image_size 16 --data.crop_size 16 --data.sample_n_frames 8 --max_steps 2 --data.image_ratio 0.5"
    if name.endswith("32"):  # without images, LPIPS and graph mode, which the other run has
        (workplace / "models" / "lpips_vgg.safetensors").unlink()
        sizes += " --data.image_ratio 0 --loss.perceptual_weight 0 --mode pynative"
    command = f"""
        output_dir=outputs/train_tae
        {sys.executable} scripts/train_tae.py \\
        --config configs/tae/train/{name}.yaml \\
        --output_path=$output_dir \\
        --csv_path train.csv  \\
        --video_folder videos {sizes}
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(["bash", "-ec", command], cwd=workplace, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "weights: outputs/train_tae/tae.ckpt\n"
    records = read_records(workplace / "outputs" / "train_tae")
    assert len(records) == 2 and records[-1]["skipped"] == 0
    assert (records[0]["lpips"] > 0) == name.endswith("16")
    assert from_pretrained(workplace / "outputs" / "train_tae" / "tae.ckpt").name == "tae"
