"""Benchmarking models on one set of clips: a row for every video and model, kept through kills, and their sum."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import run_here
from lpips_weights import write_random_weights
from mindspore import Tensor
from tiny_models import InTiles
from training_runs import TwoConvs

from mg.benchmark import contestants, quality
from mg.benchmark.quality import (
    BenchmarkConfig,
    error_map,
    report_command,
    run_benchmark,
)
from mg.benchmark.summary import format_summary
from mg.codec import Encoded
from mg.config import parse_config
from mg.data.clips import load_clip
from mg.data.video import open_video, write_image, write_video
from mg.evaluation.baseline import area_trilinear_baseline, dct_baseline
from mg.evaluation.metrics import psnr
from mg.inference.loading import ModelSection
from mg.inference.reconstruction import InferenceConfig, reconstruct_csv
from mg.models import create_model

ROOT = Path(__file__).parents[1]
NAMES = ["a.mp4", "truncated.mp4", "empty.mp4", "one.mp4", "b.mp4", "missing.mp4"]


def picture(frames: int, shift: int = 0) -> np.ndarray:
    t, y, x = np.meshgrid(np.arange(frames), np.arange(32), np.arange(32), indexing="ij")
    planes = [128 + 90 * np.sin((x + 2 * t + shift) / 6 + c) * np.cos(y / 8 - c) for c in range(3)]
    return np.stack(planes, axis=-1).astype(np.uint8)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two good videos of 6 frames, one cut short, an empty file, one of a single frame, and an image."""
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "a.mp4", picture(6), fps=8)
    write_video(folder / "b.mp4", picture(6, 30), fps=8)
    write_video(folder / "one.mp4", picture(1), fps=8)
    write_image(folder / "still.png", picture(1)[0])
    (folder / "empty.mp4").touch()
    whole = (folder / "a.mp4").read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two models of two convolutions, a latent of 2 channels per pixel."""
    folder = tmp_path_factory.mktemp("checkpoints")
    paths = [folder / "first.ckpt", folder / "second.ckpt"]
    for path in paths:
        TwoConvs({}).save_weights(path)
    return [str(path) for path in paths]


@pytest.fixture
def configure(tmp_path, videos, checkpoints):
    def configure(names=NAMES, models=checkpoints, **options) -> BenchmarkConfig:
        (tmp_path / "index.csv").write_text("\n".join(["video", *names]) + "\n")
        settings = dict(csv_path=str(tmp_path / "index.csv"), video_folder=str(videos), models=list(models))
        settings |= dict(output_path=str(tmp_path / "out"), image_size=32, num_frames=4, metric=["psnr", "ssim"])
        return BenchmarkConfig(**{**settings, **options})

    return configure


def read_csv(folder: Path) -> list[dict]:
    with open(folder / "out" / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_every_video_has_one_row_per_model_even_next_to_a_broken_one(tmp_path, configure):
    found = run_benchmark(configure())
    rows = read_csv(tmp_path)
    assert [(row["model"], row["name"]) for row in rows] == [(m, n) for m in ("first", "second") for n in NAMES]
    assert [row["status"] for row in rows] == ["ok", "error", "error", "error", "ok", "error"] * 2
    why = ["cut short|damaged|decoded", "the file is empty", "the video has 1 frames; 4 are needed", "no such file"]
    for row, reason in zip([row for row in rows if row["status"] == "error"], why * 2):
        assert re.search(reason, row["error"]) and row["psnr"] == row["encode_seconds"] == ""
    for row in rows:
        if row["status"] == "ok":
            assert [row[key] for key in ("frames", "height", "width", "error")] == ["4", "32", "32", ""]
            assert (row["latents"], row["cell"]) == ("2x4x32x32", "1x1x1")
            assert float(row["encode_seconds"]) > 0 and float(row["decode_seconds"]) > 0 and float(row["ssim"]) < 1
            assert row["lpips"] == row["flolpips"] == ""
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary == found.summary and not found.complete and found.unwritten is None
    for label in ("first", "second"):
        model, good = summary["models"][label], [row for row in rows if row["model"] == label and row["psnr"]]
        assert (model["videos"], model["succeeded"], model["failed"], model["frames"]) == (6, 2, 4, 8)
        assert [failure["name"] for failure in model["failures"]] == [NAMES[i] for i in (1, 2, 3, 5)]
        assert model["mean"]["psnr"] == pytest.approx(np.mean([float(row["psnr"]) for row in good]))
        seconds = sum(float(row["encode_seconds"]) for row in good)
        assert model["encode_frames_per_second"] == pytest.approx(8 / seconds)
        assert model["compression"] == {"ratio": 1.5, "values_per_pixel": 2, "cell": "1x1x1", "channels": 2}
        assert model["peak_memory"]["of"] == "process" and model["peak_memory"]["bytes"] > 50e6
        assert model["resolutions"] == {"4x32x32": 2} and model["dtype"] == "fp32" and len(model["sha256"]) == 64
    assert (tmp_path / "out" / "report.html").is_file()


def test_without_a_number_of_frames_one_frame_and_an_image_are_clips_too(tmp_path, configure):
    found = run_benchmark(configure(["one.mp4", "still.png", "a.mp4"], num_frames=None))
    assert [(row.frames, row.status) for row in found.rows] == [(1, "ok"), (1, "ok"), (6, "ok")] * 2
    kept = tmp_path / "out" / "clips"
    assert sorted(path.name for path in (kept / "reconstruction" / "first").iterdir()) == [
        "a.mp4",
        "one.png",
        "still.png",
    ]
    assert (
        open_video(kept / "error_map" / "first" / "a.mp4").num_frames == 6 and (kept / "original" / "one.png").is_file()
    )


def test_a_measure_without_weights_is_left_out_with_a_message(tmp_path, configure):
    options = dict(metric=["psnr", "lpips"], lpips_weights=str(tmp_path / "none.safetensors"))
    summary = run_benchmark(configure(["a.mp4"], **options)).summary
    assert "none.safetensors" in summary["left_out"]["lpips"] and list(summary["measures"]) == ["psnr"]
    assert "lpips" not in summary["models"]["first"]["mean"]
    assert "none.safetensors" in (tmp_path / "out" / "report.html").read_text()


def test_flolpips_is_reported_with_its_flow(tmp_path, configure):
    weights = write_random_weights(tmp_path / "lpips.safetensors")
    options = dict(metric=["psnr", "flolpips"], lpips_weights=str(weights), flow="farneback")
    found = run_benchmark(configure(["a.mp4", "still.png"], models=configure().models[:1], **options))
    assert [(row["flow"], bool(row["flolpips"])) for row in read_csv(tmp_path)] == [("farneback", True), ("", False)]
    assert found.summary["models"]["first"]["measured_videos"] == {"psnr": 2, "flolpips": 1}
    assert "flolpips (farneback)" in format_summary(found.summary)
    assert "FloLPIPS (farneback)" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    "baseline, made, latents, cell, ratio",
    [
        ("4x8", lambda x: area_trilinear_baseline(x, 4, 8), "3x1x4x4", "4x8x8", 256),
        ("dct", dct_baseline, "16x1x4x4", "8x8x8", 48),  # 4 frames fill half a block
    ],
)
def test_a_baseline_has_its_cells_compression_and_no_speed(configure, videos, baseline, made, latents, cell, ratio):
    config = configure(["a.mp4"], baseline=[baseline])
    found = run_benchmark(config)
    x, _ = load_clip(videos / "a.mp4", config)
    frames = [(value.transpose(1, 2, 3, 0) + 1) / 2 for value in (x, np.clip(made(x), -1, 1))]
    row = found.rows[-1]
    assert (row.model, row.latents, row.cell) == (f"baseline_{baseline}", latents, cell)
    assert row.psnr == pytest.approx(psnr(*frames).mean())
    model = found.summary["models"][f"baseline_{baseline}"]
    assert model["compression"]["ratio"] == ratio and model["peak_memory"] is model["encode_frames_per_second"] is None


class Slow(InTiles):
    """A model that repeats its input. By its own clock a call takes 0.1 s, and the first of a shape 10 s."""

    name = "slow"
    temporal_compression = spatial_compression = 1
    fails_on = ()

    def __init__(self):
        self.seen, self.shapes, self.now = set(), [], 0.0

    def _wait(self, key):
        self.now += 0.1 if key in self.seen else 10
        self.seen.add(key)

    def encode(self, x):
        self.shapes.append(x.shape)
        if x.shape in self.fails_on:
            raise RuntimeError("out of\nmemory")
        self._wait(("encode", x.shape))
        return Encoded(x, x, None)

    def decode(self, z, frames):
        self._wait(("decode", z.shape))
        return Tensor(z.asnumpy() * 0.9)


def test_the_first_run_of_a_shape_is_not_timed(configure, monkeypatch):
    model = Slow()
    monkeypatch.setattr(contestants, "load_model", lambda _: model)
    monkeypatch.setattr(contestants.time, "perf_counter", lambda: model.now)
    found = run_benchmark(configure(["a.mp4", "b.mp4", "still.png"], models=configure().models[:1]))
    assert [row.status for row in found.rows] == ["ok"] * 3
    for row in found.rows:
        assert row.encode_seconds == pytest.approx(0.1) and row.decode_seconds == pytest.approx(0.1)
    assert [shape[2] for shape in model.shapes] == [4, 4, 4, 1, 1]


def test_a_clip_that_a_model_cannot_take_costs_one_row(configure, monkeypatch):
    model = Slow()
    model.fails_on = [(1, 3, 1, 32, 32)]
    monkeypatch.setattr(contestants, "load_model", lambda _: model)
    found = run_benchmark(configure(["still.png", "a.mp4"], models=configure().models[:1]))
    assert [(row.status, row.error) for row in found.rows] == [("error", "out of memory"), ("ok", "")]


def test_a_model_that_cannot_be_built_is_left_out_and_the_others_continue(tmp_path, configure, checkpoints):
    (tmp_path / "bad.ckpt").write_bytes(b"no weights")
    found = run_benchmark(configure(["a.mp4"], models=[str(tmp_path / "bad.ckpt"), checkpoints[0]]))
    assert [row.model for row in found.rows] == ["first"] and not found.complete
    assert "bad.ckpt" in found.summary["left_out"]["bad"] == found.summary["models"]["bad"]["error"]


def test_a_killed_run_continues_after_its_last_whole_row(tmp_path, configure, monkeypatch):
    whole = [(row.model, row.name, row.status, row.psnr) for row in run_benchmark(configure()).rows]
    results, filled, enough = tmp_path / "out" / "results.csv", [], 3
    results.unlink()
    fill = quality._fill

    def stop(row, *arguments):
        if len(filled) == enough:
            raise KeyboardInterrupt
        filled.append(row)
        fill(row, *arguments)

    monkeypatch.setattr(quality, "_fill", stop)
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(configure())
    enough = None
    before = results.read_text()
    assert before.count("\n") == 1 + 10  # all but the second model's b.mp4 and missing.mp4
    results.write_text(before + "missing.mp4,missing,second,err")
    filled.clear()
    found = run_benchmark(configure())
    assert [(row.model, row.name) for row in filled] == [("second", "b.mp4")]
    assert results.read_text().startswith(before) and len(read_csv(tmp_path)) == 12
    assert [(row.model, row.name, row.status, row.psnr) for row in found.rows] == whole
    filled.clear()
    assert run_benchmark(configure()).rows == found.rows and not filled
    assert run_benchmark(configure(resume=False)).rows != found.rows and len(filled) == 4  # timed again


@pytest.mark.full
def test_a_killed_process_leaves_rows_to_continue_from(tmp_path, configure, videos):
    tiny = {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "z_channels": 4}
    create_model("image_vae", **tiny).save_weights(tmp_path / "tiny.ckpt")
    names = ["a.mp4", "b.mp4"] * 8
    options = configure(names, models=[str(tmp_path / "tiny.ckpt")])
    command = [sys.executable, ROOT / "scripts" / "benchmark.py", *arguments(options), "--mode", "pynative"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    results = tmp_path / "out" / "results.csv"
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if results.exists() and results.read_bytes().count(b"\n") > 2:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = results.read_bytes()
    kept = before[: before.rindex(b"\n") + 1]
    assert 2 < kept.count(b"\n") < 17
    found = run_benchmark(options)
    assert results.read_bytes().startswith(kept) and len(found.rows) == len(read_csv(tmp_path)) == 16
    assert [row.output for row in found.rows][:4] == ["a", "b", "a_2", "b_2"] and found.complete


def test_ctrl_c_ends_a_compiled_run_cleanly(tmp_path, configure, checkpoints):
    code = """
import os, runpy, signal, sys
import training_runs
from mg.benchmark import quality
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background shells ignore it
add = quality.Results.add
quality.Results.add = lambda *row: (add(*row), os.kill(os.getpid(), signal.SIGINT))
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""
    script = str(ROOT / "scripts" / "benchmark.py")
    command = [sys.executable, "-c", code, script, *arguments(configure(["a.mp4", "b.mp4"], models=checkpoints[:1]))]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 130 and done.stderr.endswith("interrupted\n"), done.stderr
    assert "Traceback" not in done.stderr and len(read_csv(tmp_path)) == 1


def arguments(config: BenchmarkConfig) -> list[str]:
    words = [f"--{name}={getattr(config, name)}" for name in ("csv_path", "video_folder", "output_path")]
    words += [f"--{name}={getattr(config, name)}" for name in ("image_size", "num_frames")]
    return [*words, "--metric", *config.metric, "--models", *config.models, "--device", "cpu"]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(num_frames=3), "clips.num_frames was 4 and is 3 now"),
        (dict(metric=["psnr"]), "measures.ssim was .* and is not there now"),
        (dict(names=["a.mp4", "b.mp4"]), "videos.count was 1 and is 2 now"),
        (dict(baseline=["8x8"]), "models.baseline_8x8.name was not there"),
    ],
)
def test_rows_of_other_settings_are_refused_and_kept(tmp_path, configure, changes, message):
    run_benchmark(configure(["a.mp4"]))
    before = (tmp_path / "out" / "results.csv").read_bytes(), (tmp_path / "out" / "settings.json").read_bytes()
    with pytest.raises(ValueError, match=f"settings.json: the results there were made with different .*{message}"):
        run_benchmark(configure(**{"names": ["a.mp4"], **changes}))
    assert before == (
        (tmp_path / "out" / "results.csv").read_bytes(),
        (tmp_path / "out" / "settings.json").read_bytes(),
    )


def test_other_weights_under_the_same_name_are_other_settings(tmp_path, configure):
    path = tmp_path / "vae.ckpt"
    TwoConvs({}).save_weights(path)
    run_benchmark(configure(["a.mp4"], models=[str(path)]))
    TwoConvs({}).save_weights(path)
    with pytest.raises(ValueError, match="models.vae.sha256 was"):
        run_benchmark(configure(["a.mp4"], models=[str(path)]))


def test_results_of_an_older_version_can_be_continued(tmp_path, configure, monkeypatch):
    run_benchmark(configure(["a.mp4", "b.mp4"]))
    path, rows = tmp_path / "out" / "results.csv", read_csv(tmp_path)
    with open(path, "w", newline="") as file:  # without the second model's second row, and what rows did not say then
        writer = csv.DictWriter(file, [name for name in rows[0] if name != "tiles"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows[:3])
    run_benchmark(configure(["a.mp4", "b.mp4"]))
    assert [row["psnr"] for row in read_csv(tmp_path)] == [row["psnr"] for row in rows]
    assert [row["tiles"] for row in read_csv(tmp_path)] == ["", "", "", "whole"]


def test_failed_clips_are_retried_on_request(tmp_path, configure, videos, monkeypatch):
    names = ["a.mp4", "late.mp4"]
    assert [row.ok for row in run_benchmark(configure(names)).rows] == [True, False] * 2
    (videos / "late.mp4").write_bytes((videos / "b.mp4").read_bytes())
    try:
        assert [row.ok for row in run_benchmark(configure(names)).rows] == [True, False] * 2
        found = run_benchmark(configure(names, retry_failed=True))
    finally:
        (videos / "late.mp4").unlink()
    assert [row.ok for row in found.rows] == [True] * 4 and found.complete and len(read_csv(tmp_path)) == 4


def test_malformed_results_are_refused(tmp_path, configure):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="results.csv: its columns are not those"):
        run_benchmark(configure(["a.mp4"]))
    assert (tmp_path / "out" / "results.csv").read_text() == "a,b\n1,2\n"


# Which models.


def test_a_config_gives_model_precision_and_tiles_but_no_clips(tmp_path, configure, checkpoints):
    file = tmp_path / "video.yaml"
    model = {"name": "two_convs", "from_pretrained": checkpoints[0], "dtype": "bf16", "use_spatial_tiling": True}
    file.write_text(yaml.safe_dump({"model": model, "num_frames": 99, "image_size": 512, "batch_size": 3}))
    config = configure(["a.mp4"], models=[str(file), f"{file}={checkpoints[1]}", checkpoints[1]])
    found = run_benchmark(config)
    assert [row.model for row in found.rows] == ["two_convs_video", "second", "second_2"]
    assert [row.frames for row in found.rows] == [4, 4, 4]
    first, second, plain = found.summary["models"].values()
    assert (first["checkpoint"], second["checkpoint"]) == tuple(checkpoints)
    assert first["dtype"] == second["dtype"] == "bf16" and plain["dtype"] == "fp32"
    assert first["tiling"]["spatial_tile_size"] == 256 and plain["tiling"] == {
        "auto": "where a clip does not fit whole"
    }
    assert [row.tiles for row in found.rows] == ["in tiles of 256x256 pixels"] * 2 + ["whole"]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*/inference/*.yaml")), ids=lambda p: p.stem)
def test_the_shipped_configurations_are_models_of_a_benchmark(path, configure, checkpoints):
    (contestant,) = contestants.read_models(configure(models=[f"{path}={checkpoints[0]}"]).models)
    shipped = yaml.safe_load(path.read_text())["model"]
    assert contestant.label == "first" and contestant.settings["dtype"] == shipped["dtype"]
    assert contestant.config.model.name == shipped["name"]


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "benchmark").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_shipped_benchmarks_are_valid_and_name_every_option(path):
    given = ["--config", str(path), "--csv_path", "index.csv", "--models", "a.yaml", "b.ckpt"]
    config = parse_config(BenchmarkConfig, "", given)
    assert config.models == ["a.yaml", "b.ckpt"]
    brought = {"csv_path", "video_folder", "models", "output_path"}
    assert set(yaml.safe_load(path.read_text())) == {option.name for option in fields(config)} - brought


@pytest.mark.parametrize(
    "model, message",
    [
        ("none.ckpt", "none.ckpt: no such file or folder"),
        ("none.yaml", "none.yaml: No such file"),
        ("{folder}/empty.yaml", "empty.yaml names no checkpoint: write .*empty.yaml=CHECKPOINT"),
        ("{folder}/wrong.yaml", "wrong.yaml: unknown option 'imagesize'; did you mean 'image_size'"),
    ],
)
def test_a_missing_model_is_named_before_anything_is_written(tmp_path, configure, checkpoints, model, message):
    (tmp_path / "empty.yaml").write_text("model: {name: tae}\n")
    (tmp_path / "wrong.yaml").write_text("imagesize: 3\n")
    with pytest.raises(ValueError, match=message):
        run_benchmark(configure(["a.mp4"], models=[checkpoints[0], model.format(folder=tmp_path)]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(models=[]), "models is \\[\\]; it must be one or more"),
        (dict(baseline=["8"]), "baseline is .*; it must be one or more cells"),
        (dict(baseline=["0x8"]), "baseline is"),
        (dict(image_size=8), "image_size is 8; it must be at least 11, or 0"),
        (dict(metric=["psrn"]), "metric is"),
        (dict(num_frames=0), "num_frames is 0"),
    ],
)
def test_settings_out_of_range_are_named(configure, options, message):
    with pytest.raises(ValueError, match=message):
        configure(**options)


def test_an_error_map_is_black_where_nothing_differs_and_brightest_from_its_range_on():
    real = np.zeros((1, 2, 3, 3))
    generated = real.copy()
    generated[0, 0, 1], generated[0, 0, 2] = quality.ERROR_MAP_RANGE, 1
    shown = error_map(real, generated)
    assert shown.shape == (1, 2, 3, 3) and shown.dtype == np.uint8
    assert shown[0, 0, 0].max() < 5 and shown[0, 0, 1].sum() > 600
    assert np.array_equal(shown[0, 0, 1], shown[0, 0, 2])


# The command line.


def test_the_command_prints_its_results_and_the_path_of_the_report(tmp_path, configure, monkeypatch, capsys):
    assert run_here(monkeypatch, "scripts/benchmark.py", *arguments(configure(["a.mp4"]))) == 0
    arguments_again = arguments(configure())
    assert run_here(monkeypatch, "scripts/benchmark.py", *arguments_again, "--resume=False") == 1  # some clips failed
    said = capsys.readouterr().out
    assert re.search(r"first +\d+\.\d+ .* 2 of 6", said) and "failed: second: empty.mp4" in said
    assert f"report: {tmp_path / 'out' / 'report.html'}" in said
    assert run_here(monkeypatch, "scripts/benchmark.py", *arguments(configure(["empty.mp4"])), "--resume=False") == 1
    assert run_here(monkeypatch, "scripts/benchmark.py", *arguments(configure(["empty.mp4"])), "--num_frames", 5) == 2
    assert "clips.num_frames was 4 and is 5 now" in capsys.readouterr().err


def test_inference_gives_the_command_that_makes_a_report_of_its_run(
    tmp_path, configure, checkpoints, monkeypatch, capsys
):
    clips = configure(["a.mp4", "empty.mp4"])
    model = ModelSection(checkpoints[0], dtype="bf16")
    config = InferenceConfig(
        model,
        clips.csv_path,
        str(tmp_path / "samples"),
        video_folder=clips.video_folder,
        image_size=32,
        num_frames=4,
        crop=False,
        compare=checkpoints[1:],
    )
    reconstruct_csv(config)
    words = shlex.split(report_command(config))
    assert words[0] == "mg-benchmark"
    assert run_here(monkeypatch, "scripts/benchmark.py", *words[1:], "--metric", "psnr") == 1  # empty.mp4
    summary = json.loads((tmp_path / "samples" / "benchmark" / "summary.json").read_text())
    assert list(summary["models"]) == ["samples", "second"] and summary["settings"]["clips"]["crop"] is False
    assert [model["dtype"] for model in summary["models"].values()] == ["bf16", "bf16"]
    assert summary["models"]["samples"]["resolutions"] == {"4x32x32": 1}
