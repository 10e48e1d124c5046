"""Faults that users meet, through every command that meets them: one clear line or a counted skip, and nothing lost.

Each command runs in this process as its script does, with a model of two convolutions where it needs one; a traceback
would be an exception here.
"""

import csv
import errno
import json
import os
import pickle
import re
import resource
import runpy
import struct
import subprocess
import sys
import zipfile
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from image_vaes import TINY as VAE_CONFIG
from image_vaes import image_vae
from small_steps import make
from training_runs import SHORT, TwoConvs

from mg.benchmark.results import ResultRow, Results, read_rows
from mg.checkpoints import atomic_write, naming, read_state_dict, write_state_dict
from mg.data.video import write_image, write_video
from mg.evaluation.table import Table
from mg.models import VideoAutoencoder, register_model
from mg.training.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from mg.training.logs import RunLog, draw_curve, read_log

ROOT = Path(__file__).resolve().parents[1]
CLIPS = ["--num_frames", 4, "--image_size", 16, "--device", "cpu", "--mode", "pynative"]


@register_model
class ScaledConvs(TwoConvs):
    """With the factors that statistics are for."""

    name = "scaled_convs"
    default_config = {**TwoConvs.default_config, "scaling_factor": 1.0, "shift_factor": 0.0}


class Commands:
    """Every command, in this process: its exit code, what it said on stdout, and the last line on stderr."""

    def __init__(self, folder: Path, monkeypatch, capsys):
        self.out, self.monkeypatch, self.capsys = folder / "out", monkeypatch, capsys

    def __call__(self, command: str, *options) -> tuple[int, str, str]:
        script = next(path for path in (ROOT / "scripts" / command, ROOT / "tools" / command) if path.exists())
        self.monkeypatch.setattr(sys, "argv", [command, *map(str, options)])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(script), run_name="__main__")
        said = self.capsys.readouterr()
        errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in said.out + said.err and len(errors) <= 1
        return stopped.value.code or 0, said.out, (errors or [""])[0]

    def train(self, weights, index, *options):
        start = ["--model.from_pretrained", weights] if weights else []
        steps = ["--max_steps", 1, "--mode", "pynative", "--output_path", self.out]
        return self("train_vae.py", *SHORT, *start, "--csv_path", index, *steps, *options)

    def over_clips(self, script, weights, index, *options, models="--ckpt_path"):
        return self(script, models, weights, "--csv_path", index, "--output_path", self.out, *CLIPS, *options)

    def inference(self, *arguments):
        return self.over_clips("inference_vae.py", *arguments)

    def benchmark(self, *arguments):
        without = ["--lpips_weights", "none.safetensors"]  # LPIPS takes no frames as small as these
        return self.over_clips("benchmark.py", *arguments, *without, models="--models")

    def statistics(self, *arguments):
        return self.over_clips("latent_statistics.py", *arguments)

    def encode(self, *arguments):
        return self.over_clips("encode_latents.py", *arguments)

    def convert(self, weights, index=None, *options):
        target = ["--target", self.out / "x.ckpt"]
        return self("convert_checkpoint.py", "--model", "image_vae", "--src", weights, *target, *options)

    def inflate(self, weights, index=None, *options):
        return self("inflate_vae_to_tae.py", "--src", weights, "--target", self.out / "x.ckpt", *options)

    def evaluate(self, real, generated, *options):
        folders = ["--real_video_dir", real, "--generated_video_dir", generated, "--output_path", self.out]
        clips = ["--num_frames", 4, "--resolution", 16, "--crop_size", 16]
        return self("evaluate.py", *folders, *clips, "--metric", "psnr", "--device", "cpu", *options)


WITH_MODEL = ("train", "inference", "benchmark", "encode", "statistics")
WITH_WEIGHTS = (*WITH_MODEL, "convert", "inflate")


@pytest.fixture
def commands(tmp_path, monkeypatch, capsys):
    return Commands(tmp_path, monkeypatch, capsys)


def moving(frames: int = 12, height: int = 32, width: int = 64) -> np.ndarray:
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    return np.stack([128 + 90 * np.sin((x + 2 * t) / 9 + c) * np.cos(y / 11 - c) for c in range(3)], -1).astype(
        np.uint8
    )


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """A CSV of one good video."""
    folder = tmp_path_factory.mktemp("good")
    write_video(folder / "a.mp4", moving(), 8)
    (folder / "set.csv").write_text("video\na.mp4\n")
    return folder / "set.csv"


# Weights.


def good_weights(folder: Path, command: str) -> Path:
    """A file of weights that the command takes."""
    if command in WITH_MODEL:
        (ScaledConvs if command == "statistics" else TwoConvs)({}).save_weights(folder / "w.safetensors")
    else:
        write_state_dict(folder / "w.safetensors", image_vae())
        (folder / "w.json").write_text(json.dumps(VAE_CONFIG))
    return folder / "w.safetensors"


class RunsCode:
    def __init__(self, target: Path):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def break_weights(path: Path, fault: str, canary: Path) -> tuple[Path, str]:
    """The file at fault, made of a good one, and what is to be said about it."""
    if fault == "nan":
        state = {name: array.copy() for name, array in read_state_dict(path).items()}
        broken = sorted(state)[1]
        state[broken].flat[0] = np.nan
        write_state_dict(path, state)
        return path, "hold NaN"
    if fault == "code":
        with zipfile.ZipFile(path.with_suffix(".pt"), "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({"w": RunsCode(canary)}, 2))
        return path.with_suffix(".pt"), "refused, nothing was run"
    if fault == "missing":
        path.unlink()
        return path, "o such file"
    data = bytearray(path.read_bytes())
    if fault == "lie":  # a header that reaches beyond the file
        data[:8] = struct.pack("<Q", len(data) + 1000)
    path.write_bytes(data[:-10] if fault == "cut short" else data)
    return path, "cut short?"


@pytest.mark.parametrize("fault", ["nan", "code", "lie", "cut short", "missing"])
@pytest.mark.parametrize("command", WITH_WEIGHTS)
def test_weights_at_fault_are_named_by_every_command(commands, tmp_path, index, command, fault):
    path, message = break_weights(good_weights(tmp_path, command), fault, tmp_path / "ran")
    code, said, error = getattr(commands, command)(path, index)
    if command == "benchmark" and fault != "missing":  # the other models of a benchmark continue
        error = next(line for line in said.splitlines() if line.startswith("left out: w: "))
        assert code == 1
    else:
        assert code == 2 and error.startswith("error: ")
        assert not (commands.out / "x.ckpt").exists() and not (commands.out / "metrics.csv").exists()
    assert path.name in error and message in error
    if fault == "nan":
        names = [name for name in sorted(read_state_dict(path)) if not np.isfinite(read_state_dict(path)[name]).all()]
        assert (names[0].split(".")[-1] in error and f"of its {len(read_state_dict(path))} parameters" in error) or (
            command == "inflate" and "parameters hold NaN" in error
        )
    assert not (tmp_path / "ran").exists()


def test_the_pickle_of_these_tests_would_have_run(tmp_path):
    pickle.loads(pickle.dumps(RunsCode(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_a_checkpoint_with_nan_is_not_resumed(commands, index, tmp_path):
    assert commands.train(None, index)[0] == 0
    (checkpoint,) = list_checkpoints(commands.out / "checkpoints")
    weights = checkpoint / "model.safetensors"
    break_weights(weights, "nan", tmp_path)
    code, _, error = commands.train(None, index, "--resume", "--max_steps", 2)
    assert code == 2 and str(checkpoint) in error and "hold NaN" in error


# Configs.

REQUIRED = {
    "train_tae.py": ["--csv_path", "x.csv"],
    "train_vae.py": ["--csv_path", "x.csv"],
    "inference_vae.py": ["--ckpt_path", "x.ckpt", "--csv_path", "x.csv"],
    "benchmark.py": ["--models", "x.ckpt", "--csv_path", "x.csv"],
    "evaluate.py": ["--real_video_dir", "x", "--generated_video_dir", "y"],
    "latent_statistics.py": ["--ckpt_path", "x.ckpt", "--csv_path", "x.csv"],
    "encode_latents.py": ["--ckpt_path", "x.ckpt", "--csv_path", "x.csv"],
    "decode_latents.py": ["--latents_path", "x"],
    "convert_checkpoint.py": ["--src", "x.ckpt", "--target", "y.ckpt"],
    "average_checkpoints.py": ["--src", "x.ckpt", "z.ckpt", "--target", "y.ckpt"],
    "inflate_vae_to_tae.py": ["--src", "x.ckpt", "--target", "y.ckpt"],
    "convert_lpips.py": ["--target", "y.ckpt", "--backbone", "x.pth"],
    "make_clips.py": ["--output_dir", "x"],
    "fetch_clips.py": ["--output_dir", "x"],
    "make_cuda_home.py": ["--target", "x"],
    "check_device.py": [],
}


@pytest.mark.parametrize("command", REQUIRED)
def test_a_config_at_fault_is_named_by_every_command(commands, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    Path("unknown.yaml").write_text("no_such_key: 1\n")
    Path("list.yaml").write_text("- 1\n- 2\n")
    Path("broken.yaml").write_text("a: [1\n")
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00")
    typed = {
        "make_clips.py": "train_clips: many",
        "fetch_clips.py": "size: many",
        "evaluate.py": "num_frames: many",
    }.get(command, "device: 7")
    if command.startswith(("convert_checkpoint", "average", "inflate")):
        typed = "dtype: 7"
    if command in ("convert_lpips.py", "make_cuda_home.py"):
        typed = "target: [1]"
    Path("typed.yaml").write_text(f"{typed}\n")
    for file, message in {
        "unknown": "unknown option 'no_such_key'",
        "typed": typed.split(":")[0],
        "list": "list.yaml: a config holds keys and values",
        "broken": "broken.yaml: not a YAML file",
        "binary": "binary.yaml: not a YAML file",
        "none": "none.yaml: No such file",
    }.items():
        code, _, error = commands(command, "--config", f"{file}.yaml", *REQUIRED[command])
        assert code == 2 and message in error, (file, error)
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("command", [name for name, options in REQUIRED.items() if options])
def test_an_option_that_is_missing_is_named_by_every_command(commands, command):
    code, _, error = commands(command)
    assert code == 2 and REQUIRED[command][0].removeprefix("--") in error


# Videos. Of each kind of file whether it is of use, and what is said if not.

KINDS = {
    "ten_bit.mp4": None,
    "odd.mkv": None,
    "variable_rate.mkv": None,
    "rotated.mp4": None,
    "empty.mp4": "the file is empty",
    "cut.mp4": "cut short",
    "no_frames.mp4": "no frame|no video|not a video",
    "sound.mp4": "no video",
    "text.mp4": "not a video",
    "picture.mp4": "too few frames|too short|frames",
    "video.png": "not an image",
    "missing.mp4": "no such file",
}
GOOD = [name for name, reason in KINDS.items() if reason is None]


def encode(path: Path, frames: np.ndarray, pix_fmt: str = "yuv420p", times: list[int] | None = None) -> None:
    """libx264, or a codec of odd sizes, with settings that write_video does not offer; `times` in 1/8 s."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264" if pix_fmt != "bgr0" else "ffv1", rate=8)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times:
                frame.pts, frame.time_base = times[index], Fraction(1, 8)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """A folder with a file of every kind, and its CSV."""
    folder = tmp_path_factory.mktemp("kinds")
    encode(folder / "ten_bit.mp4", moving(), "yuv420p10le")
    encode(folder / "odd.mkv", moving(height=33, width=65), "bgr0")
    encode(folder / "variable_rate.mkv", moving(), times=[0, 1, 2, 5, 9, 10, 11, 17, 18, 30, 31, 32])
    write_video(folder / "rotated.mp4", moving(), 8)
    good = (folder / "rotated.mp4").read_bytes()
    matrix = good.find(b"tkhd") + 44
    turned = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    (folder / "rotated.mp4").write_bytes(good[:matrix] + turned + good[matrix + 36 :])
    (folder / "empty.mp4").touch()
    (folder / "cut.mp4").write_bytes(good[:-60])
    (folder / "text.mp4").write_text("hello " * 99)
    (folder / "video.png").write_bytes(good)
    write_image(folder / "picture.png", moving(1)[0])
    (folder / "picture.png").rename(folder / "picture.mp4")
    with av.open(str(folder / "no_frames.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 64, "yuv420p"
        container.start_encoding()
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    (folder / "set.csv").write_text("video\n" + "".join(f"{name}\n" for name in KINDS))
    return folder


def rows_of(path: Path) -> dict[str, dict]:
    with open(path, encoding="utf-8", newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


@pytest.mark.parametrize("command, file", [("inference", "metrics.csv"), ("benchmark", "results.csv")])
def test_every_kind_of_file_has_a_row_with_figures_or_a_reason(commands, tmp_path, kinds, command, file):
    code, said, _ = getattr(commands, command)(good_weights(tmp_path, command), kinds / "set.csv")
    assert code == 1 and f"{len(GOOD)} of {len(KINDS)}" in said
    rows = rows_of(commands.out / file)
    assert list(rows) == list(KINDS)
    assert_reasons({name: row["error"] for name, row in rows.items()})
    for name in GOOD:
        assert float(rows[name]["psnr"]) > 0 and (rows[name]["frames"], rows[name]["height"]) == ("4", "16")


def assert_reasons(errors: dict[str, str]) -> None:
    """Each of the kinds' errors, "" if there is none, names its file and says what is wrong."""

    for name, reason in KINDS.items():
        if reason is None:
            assert not errors[name], (name, errors[name])
        else:
            assert re.search(reason, errors[name]) and name in errors[name] and "\n" not in errors[name], errors[name]


def test_statistics_are_of_the_files_that_can_be_read(commands, tmp_path, kinds):
    code, said, _ = commands.statistics(good_weights(tmp_path, "statistics"), kinds / "set.csv")
    assert code == 1 and f"{len(GOOD)} of {len(KINDS)} clips measured" in said
    described = json.loads((commands.out / "latent_statistics.json").read_text())
    failures = {failure["name"]: failure["error"] for failure in described["failures"]}
    assert_reasons({name: failures.get(name, "") for name in KINDS})


def test_training_counts_the_files_that_cannot_be_read_and_stops_above_its_share(commands, kinds, caplog):
    options = ["--data.image_ratio", 0.5, "--data.batch_size", len(KINDS), "--data.num_workers", 0]
    options += ["--data.allow_partial", "false"]
    code, _, _ = commands.train(None, kinds / "set.csv", *options, "--data.max_bad_share", 1, "--max_steps", 2)
    assert code == 0
    skipped = [record.getMessage() for record in caplog.records if record.getMessage().startswith("skipped a file")]
    assert len(skipped) == len(KINDS) - len(GOOD)
    reasons = {name: next((line for line in skipped if name in line), "") for name in KINDS}
    assert_reasons(reasons)
    for path in list_checkpoints(commands.out / "checkpoints"):
        load_checkpoint(path, *make())
    commands.out = commands.out.with_name("again")
    code, _, error = commands.train(None, kinds / "set.csv", *options)
    assert code == 2 and f"of {len(KINDS)} files could not be used, more than max_bad_share = 0.1 allows" in error


def test_every_kind_of_file_is_measured_or_has_a_reason(commands, kinds, tmp_path):
    generated = tmp_path / "generated"
    generated.mkdir()
    for name in KINDS:
        write_video(generated / f"{Path(name).stem}.mp4", moving(4), 8)
    real = {path.stem: path for path in kinds.iterdir() if path.suffix != ".csv"}
    code, said, _ = commands.evaluate(kinds, generated)
    assert code == 1 and f"{len(GOOD)} pairs measured, {len(real) - len(GOOD)} failed, 1 unpaired" in said
    rows = rows_of(commands.out / "metrics.csv")
    errors = {name: rows[Path(name).stem]["error"] for name in KINDS if name != "missing.mp4"}
    assert_reasons({**errors, "missing.mp4": "missing.mp4: no such file"})


# One clip that fails, on whatever way, costs no other.


def write_set(folder: Path, clips: dict[str, np.ndarray]) -> Path:
    """Videos, or images where there is one frame, and their CSV."""
    for name, frames in clips.items():
        if name.endswith(".png"):
            write_image(folder / name, frames[0])
        else:
            write_video(folder / name, frames, 8)
    (folder / "set.csv").write_text("video\n" + "".join(f"{name}\n" for name in clips), encoding="utf-8")
    return folder / "set.csv"


def rows_in_order(path: Path) -> list[dict]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


LONG_NAMES = [
    "n" * 246 + ".mp4",
    "/".join(["d" * 120] * 3) + ".mp4",
    "/".join(["d" * 120] * 3) + "2.mp4",
    "é" * 123 + ".mp4",
]


def test_names_as_long_as_a_file_system_takes_them_go_through_every_command(commands, tmp_path):
    names = [*LONG_NAMES, "a.mp4"]
    index = write_set(tmp_path / "videos", {name: moving(5) for name in names})
    for command, table in (
        ("inference", "metrics.csv"),
        ("benchmark", "results.csv"),
        ("statistics", None),
        ("encode", None),
    ):
        commands.out = tmp_path / command
        code, said, error = getattr(commands, command)(good_weights(tmp_path, command), index)
        assert code == 0 and not error, (command, said, error)
        if table:
            assert [row["name"] for row in rows_in_order(commands.out / table)] == names
    latents, out = tmp_path / "encode", tmp_path / "decoded"
    assert commands("decode_latents.py", "--latents_path", latents, "--output_path", out, "--mode", "pynative")[0] == 0
    assert len(list(out.iterdir())) == len(names) == len(list((tmp_path / "inference" / "original").iterdir()))
    folders = tmp_path / "inference" / "original", tmp_path / "inference" / "reconstruction"
    assert commands.evaluate(*folders)[0] == 0


DARK = np.zeros((12, 32, 64, 3), np.uint8)


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError, TypeError, struct.error, cv2.error, OSError])
def test_a_clip_that_fails_in_the_model_affects_neither_its_batch_nor_others(commands, tmp_path, monkeypatch, kind):
    names = ["a.mp4", "dark.mp4", "b.mp4"]
    index = write_set(tmp_path / "videos", {name: DARK if name == "dark.mp4" else moving() for name in names})
    real = VideoAutoencoder.encode_moments

    def failing(self, x):
        if x.asnumpy().max(axis=(1, 2, 3, 4)).min() < -0.9:
            raise kind("no\nway") if kind is not MemoryError else MemoryError
        return real(self, x)

    monkeypatch.setattr(VideoAutoencoder, "encode_moments", failing)
    reason = "MemoryError" if kind is MemoryError else "no way"
    for command, options in (
        ("inference", ["--batch_size", 3]),
        ("benchmark", []),
        ("statistics", ["--batch_size", 2]),
    ):
        commands.out = tmp_path / command
        code, said, error = getattr(commands, command)(good_weights(tmp_path, command), index, *options)
        assert code == 1 and not error and re.search(r"failed: .*dark.mp4: ", said), (command, said, error)
        if command != "statistics":
            rows = rows_in_order(commands.out / {"inference": "metrics.csv", "benchmark": "results.csv"}[command])
            assert [(row["name"], row["status"]) for row in rows] == [*zip(names, ["ok", "error", "ok"])]
            assert rows[1]["error"] == reason and not rows[1]["psnr"]
            assert all(float(row["psnr"]) > 0 and row["tiles"] == "whole" for row in rows[::2])
    commands.out = tmp_path / "encode"
    code, said, _ = commands.encode(good_weights(tmp_path, "encode"), index)
    assert code == 1 and f"failed: dark.mp4: {reason}" in said and "2 videos encoded" in said


def test_an_output_that_cannot_be_written_costs_only_its_clip(commands, tmp_path):
    index = write_set(tmp_path / "videos", {name: moving() for name in ("a.mp4", "b.mp4", "c.mp4")})
    for command, place, table in (
        ("inference", "side_by_side/b.mp4", "metrics.csv"),
        ("benchmark", "clips/error_map/w/b.mp4", "results.csv"),
    ):
        commands.out = tmp_path / command
        (commands.out / place).mkdir(parents=True)  # a folder of the file's name
        code, _, error = getattr(commands, command)(good_weights(tmp_path, command), index)
        rows = rows_in_order(commands.out / table)
        assert code == 1 and not error and [row["status"] for row in rows] == ["ok", "error", "ok"]
        assert place in rows[1]["error"] and not rows[1]["psnr"] and float(rows[2]["psnr"]) > 0
    left = [path.name for path in (tmp_path / "inference" / "reconstruction").iterdir()]
    assert sorted(left) == ["a.mp4", "c.mp4"]  # nothing is left of the one that failed


def test_paths_that_are_not_files_cost_only_their_rows(commands, tmp_path):
    index = write_set(tmp_path / "videos", {"a.mp4": moving(5)})
    videos = index.parent
    os.mkfifo(videos / "pipe.mp4")
    (videos / "folder.mp4").mkdir()
    (videos / "loop.mp4").symlink_to("loop.mp4")
    (videos / "zeros.mp4").symlink_to("/dev/zero")
    odd = ["pipe.mp4", "folder.mp4", "loop.mp4", "zeros.mp4", "x" * 300 + ".mp4", "a.mp4/b.mp4", "."]
    index.write_text("\n".join(["video", *odd, "a.mp4"]) + "\n")
    for command in ("inference", "benchmark", "statistics", "encode"):
        commands.out = tmp_path / command
        code, said, error = getattr(commands, command)(good_weights(tmp_path, command), index)
        assert code == 1 and not error and said.count("failed: ") >= len(odd), (command, said, error)
    assert [row["status"] for row in rows_in_order(tmp_path / "inference" / "metrics.csv")] == ["error"] * 7 + ["ok"]


class limited_files:
    """As `full_disk`, of any size."""

    def __init__(self, size: int):
        self.size = size

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *exception):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def test_a_clip_that_does_not_fit_on_the_disk_does_not_affect_the_others(commands, tmp_path):
    wild = np.random.default_rng(0).integers(0, 256, (4, 256, 256, 3)).astype(np.uint8)
    index = write_set(tmp_path / "videos", {"a.mp4": moving(5), "wild.mp4": wild, "b.mp4": moving(5)})
    options = ["--image_size", 0, "--crop", "False"]
    weights = good_weights(tmp_path, "inference")
    for command, table in (("inference", "metrics.csv"), ("benchmark", "results.csv")):
        commands.out = tmp_path / command
        with limited_files(200_000):
            code, _, _ = getattr(commands, command)(weights, index, *options)
        rows = rows_in_order(commands.out / table)
        assert code == 1 and [row["status"] for row in rows] == ["ok", "error", "ok"]
        assert "wild.mp4: File too large" in rows[1]["error"] and float(rows[0]["psnr"]) > 0
    commands.out = tmp_path / "latents"
    assert commands.encode(weights, index, *options)[0] == 0
    with limited_files(30_000):
        decode = ["--latents_path", commands.out, "--output_path", tmp_path / "decoded", "--mode", "pynative"]
        code, said, _ = commands("decode_latents.py", *decode)
    assert code == 1 and "wild.mp4: File too large" in said and "2 videos decoded" in said
    assert sorted(path.name for path in (tmp_path / "decoded").iterdir()) == ["a.mp4", "b.mp4"]
    assert commands("decode_latents.py", *decode)[0] == 0  # with room the same command makes what is missing


@pytest.mark.parametrize("command", ["inference", "benchmark", "evaluate", "statistics"])
def test_figures_are_printed_even_if_their_files_cannot_be_written(commands, tmp_path, monkeypatch, index, command):
    def full(self, rows, write=Table.write):
        if self.path.exists():
            raise OSError(errno.ENOSPC, "No space left on device", str(self.path))
        write(self, rows)

    def no_room(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "model.csv")

    monkeypatch.setattr(Table, "write", full)
    monkeypatch.setattr(VideoAutoencoder, "save_pretrained", no_room)
    place = index.parent if command == "evaluate" else good_weights(tmp_path, command)
    code, said, error = getattr(commands, command)(place, index.parent if command == "evaluate" else index)
    assert code == 2 and re.search(r"error: .*\.csv: No space left on device", error)
    assert re.search(r"(a|w|scaling_factor) +\d+\.\d+", said), said


@pytest.mark.parametrize("command", ["inference", "evaluate"])
def test_metrics_are_written_as_they_come(commands, tmp_path, monkeypatch, command):
    """A run that ends in the middle leaves the rows that it had, and no summary of an earlier one."""
    index = write_set(tmp_path / "videos", {name: moving(5) for name in ("a.mp4", "b.mp4", "c.mp4")})
    place = tmp_path / "videos" if command == "evaluate" else good_weights(tmp_path, command)
    arguments = place, tmp_path / "videos" if command == "evaluate" else index
    assert getattr(commands, command)(*arguments)[0] == 0 and (commands.out / "metrics.json").exists()
    add, added = Table.add, []

    def killed(self, cells):
        if len(added) == 2:
            raise KeyboardInterrupt
        added.append(cells)
        add(self, cells)

    monkeypatch.setattr(Table, "add", killed)
    assert getattr(commands, command)(*arguments)[0] == 130
    rows = rows_in_order(commands.out / "metrics.csv")
    assert [row["status"] for row in rows] == ["ok", "ok"] and float(rows[0]["psnr"]) > 0
    assert not (commands.out / "metrics.json").exists()


# Indexes.


def test_an_index_of_every_spelling_is_read_by_every_command(commands, tmp_path):
    names = ["plain.mp4", "naïve, «clip» 猫.mp4", 'with "quotes".mp4', "absolute.mp4"]
    for name in names:
        write_video(tmp_path / "videos" / name, moving(5), 8)
    lines = [["path", "text"], [names[0], "a, b"], [f"x/../{names[1]}", "猫"], [names[2], 'say "hi"']]
    lines += [[str(tmp_path / "videos" / names[3]), ""], [names[0], "again"]]
    with open(tmp_path / "set.csv", "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, lineterminator="\r\n").writerows(lines)
    data = (tmp_path / "set.csv").read_bytes()
    assert data.startswith(b"\xef\xbb\xbf") and b"\r\n" in data and b'"x/../na' in data
    for command in WITH_MODEL:
        commands.out = tmp_path / f"out_{command}"
        weights = good_weights(tmp_path, command)
        found = getattr(commands, command)(weights, tmp_path / "set.csv", "--video_folder", tmp_path / "videos")
        assert found[0] == 0, (command, found)
    assert "5 of 5 clips measured" in found[1]
    for file in ("out_inference/metrics.csv", "out_benchmark/results.csv"):
        with open(tmp_path / file, encoding="utf-8", newline="") as opened:
            rows = list(csv.DictReader(opened))
        assert [row["status"] for row in rows] == ["ok"] * 5
        outputs = [row["output"] for row in rows]
        assert len(set(outputs)) == 5 and outputs[0] == "plain" and outputs[4] == "plain_2"
    reconstructed = sorted(path.stem for path in (tmp_path / "out_inference" / "reconstruction").iterdir())
    assert reconstructed == sorted(outputs)  # within the output folder, whatever the index says
    assert sorted(path.name for path in (tmp_path / "videos").iterdir()) == sorted(names)


@pytest.mark.parametrize("command", WITH_MODEL)
def test_an_index_at_fault_is_named_by_every_command(commands, tmp_path, index, command):
    weights = good_weights(tmp_path, command)
    path = tmp_path / "faulty.csv"
    for content, message in {
        b"video\n../a.mp4\n": "faulty.csv, line 2: ../a.mp4 leads outside the folder",
        b"video\n/etc/passwd\n": "faulty.csv, line 2: /etc/passwd leads outside the folder",
        b"name\na.mp4\n": "no column 'video' or 'path'",
        b'video,text\na.mp4,"He said "hi" to me"\n': "faulty.csv, line 2: its quotes do not match",
        b"video;text\na.mp4;x\n": "separated by semicolons",
        b"video\n\xff.mp4\n": "not a CSV file in UTF-8",
        b"video\n": "there is no row below the header",
        b"": "the file is empty",
    }.items():
        path.write_bytes(content)
        code, _, error = getattr(commands, command)(weights, path, "--video_folder", index.parent)
        assert code == 2 and message in error and str(path) in error, error
    code, _, error = getattr(commands, command)(weights, tmp_path / "none.csv")
    assert code == 2 and f"{tmp_path / 'none.csv'}: no such CSV file" in error
    assert not commands.out.exists()


# A full disk, and a kill at any moment.

LIMIT = 2048  # bytes that a file may have while the disk is "full"


def write_text(path: Path, size: int) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(f"{size} " * size)


def write_state(path: Path, size: int) -> None:
    write_state_dict(path, {"w": np.full(size, size, np.float32)})


WRITERS = {
    "w.safetensors": write_state,
    "w.ckpt": write_state,
    "v.mp4": lambda path, size: write_video(path, np.full((3, 8 + size, 64, 3), 9, np.uint8) * noise(size), 8),
    "i.png": lambda path, size: write_image(path, noise(size)[0]),
    "curve.png": lambda path, size: draw_curve([(i, 1.0 + i) for i in range(size)], "unit", path),
    "metrics.csv": write_text,
    "summary.json": write_text,
}


def noise(size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 20, (3, 8 + size, 64, 3)).astype(np.uint8)


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_keeps_the_older_file_and_names_it(tmp_path, name):
    path = tmp_path / name
    WRITERS[name](path, 8)
    before = path.read_bytes()
    with full_disk(), pytest.raises(OSError) as error:
        WRITERS[name](path, 1000)
    assert str(path) in str(error.value) and error.value.errno in (errno.EFBIG, errno.ENOSPC)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    WRITERS[name](path, 1000)
    assert path.read_bytes() != before


class full_disk:  # a context manager, used as a function is
    """No file grows beyond LIMIT bytes: writing more fails as on a full disk, in Python and in libraries alike."""

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, self.before[1]))

    def __exit__(self, *exception):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def test_a_full_disk_keeps_older_checkpoints_and_names_the_file(tmp_path):
    model, step = make()
    save_checkpoint(tmp_path, model, step, {"step": 1}, 2)
    with full_disk(), pytest.raises(OSError, match=r"step_000002\.partial/"):
        save_checkpoint(tmp_path, model, step, {"step": 2, "note": "x" * LIMIT}, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]
    assert load_checkpoint(tmp_path / "step_000001", *make()) == {"step": 1}


def test_rows_that_a_full_disk_has_no_room_for_wait_until_it_has(tmp_path, caplog):
    path = tmp_path / "results.csv"
    results = Results(path)
    rows = [ResultRow(f"{i}{'x' * 500}", "output", "model") for i in range(6)]
    with full_disk():
        for row in rows[:5]:
            results.add(row)
        assert read_rows(path) == rows[:3] and path.read_bytes().endswith(b"\n")  # none is cut short
        with pytest.raises(OSError) as error:
            results.save()
    assert str(path) in str(error.value) and f"{path}: File too large" in caplog.text
    results.add(rows[5])
    assert read_rows(path) == rows


@pytest.mark.parametrize("shown", [1, 30])  # what fills the disk: the log, or TensorBoard's file
def test_a_log_that_a_full_disk_cuts_short_names_the_file_and_ends(tmp_path, shown):
    log = RunLog(tmp_path, 0, 1000)
    with full_disk(), pytest.raises(OSError) as error:
        for step in range(1000):
            log.add(
                step, {"loss": 1.0, "l1": 1.0} | {f"term{i}": 1.0 / 3 if shown > 1 else np.nan for i in range(shown)}
            )
            if step % 10 == 9:
                log.save()
    assert str(tmp_path) in str(error.value) and error.value.filename
    assert len(read_log(tmp_path / "log.jsonl", 1000)) > 1
    log.close()


def test_an_error_keeps_the_file_that_it_names(tmp_path):
    with pytest.raises(FileNotFoundError) as error, naming("other"):
        open(tmp_path / "none")  # noqa: SIM115
    assert error.value.filename == str(tmp_path / "none")


# A process that saves states 1, 2, 3 ... in a loop, of kilobytes to a megabyte, and tells each before and after.
SAVES = """
import os, sys
from pathlib import Path
import numpy as np
from mg.checkpoints import write_state_dict

path, number = Path(sys.argv[1]), int(sys.argv[2])
while True:
    number += 1
    os.write(1, b"begin %d\\n" % number)
    size = 1 + (number * 7919) % 200_000
    write_state_dict(path, {"a": np.full(size, number, np.float32), "b": np.full(3, number, np.float32)})
    os.write(1, b"done %d\\n" % number)
"""


@pytest.mark.parametrize("name", ["w.safetensors", "w.ckpt"])
def test_a_kill_at_any_moment_leaves_the_last_whole_state(tmp_path, name):
    path, last, kills = tmp_path / name, 0, 0
    rng = np.random.default_rng(0)
    for turn in range(15):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVES, str(path), str(last)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )
        # Every second time one save at least comes to its end, however slow the machine is: begin, done, begin.
        told = [process.stdout.readline() for _ in range(1 + turn % 2 * 2)]
        try:
            process.wait(timeout=rng.uniform(0, 0.06))
        except subprocess.TimeoutExpired:
            process.kill()
        told += process.stdout.read().splitlines()
        process.wait()
        done = max([int(line.split()[1]) for line in told if line.startswith("done ")], default=last)
        begun = max(int(line.split()[1]) for line in told if line.startswith("begin "))
        if begun > done:
            kills += 1
        if done == 0 and not path.exists():
            continue
        state = read_state_dict(path)
        number = int(state["b"][0])
        assert done <= number <= begun  # none that was saved is lost
        assert state["a"].size == 1 + (number * 7919) % 200_000 and set(state["a"]) | set(state["b"]) == {number}
        last = number
    assert last > 5 and kills > 5  # most of them within a save
