"""Two folders are compared by name: what is measured is right, and whatever is not measured is said and counted."""

import csv
import json
import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from lpips_weights import write_random_weights

from mg.config import parse_config
from mg.data.video import open_video, read_image, write_image, write_video
from mg.evaluation.measures import Measures, MeasuresConfig
from mg.evaluation.metrics import psnr
from mg.evaluation.pairs import EvaluateConfig, evaluate_folders, find_pairs, format_table, read_frames
from mg.runtime import setup

SCRIPT = Path(__file__).parents[1] / "scripts" / "evaluate.py"


def video(frames=6, height=40, width=56, seed=0):
    """uint8 (T, H, W, 3) that moves."""
    pattern = np.random.default_rng(seed).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    wide = cv2.resize(pattern, (width + frames, height), interpolation=cv2.INTER_CUBIC)
    return np.stack([wide[:, t : t + width] for t in range(frames)])


def noisy(frames, seed=1):
    noise = np.random.default_rng(seed).normal(0, 12, frames.shape)
    return np.clip(frames + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return str(write_random_weights(tmp_path_factory.mktemp("weights") / "lpips_alex.safetensors"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """good pairs: first (a video in other containers), second, still (an image); the others are at fault."""
    root = tmp_path_factory.mktemp("folders")
    real, generated = root / "A_ori", root / "A_rec"
    for folder, change in ((real, lambda frames: frames), (generated, noisy)):
        folder.mkdir()
        write_video(folder / "second.mp4", change(video(7, seed=2)), 12)
        write_image(folder / "still.png", change(video(1))[0])
        write_video(folder / "short.mp4", change(video(3)), 12)
    write_video(real / "first.mp4", video(), 12)
    write_video(generated / "first.mkv", noisy(video()), 24)
    write_video(real / "cut.mp4", video(), 12)
    (generated / "cut.mp4").write_bytes((real / "cut.mp4").read_bytes()[:1500])
    write_video(real / "empty.mp4", video(), 12)
    (generated / "empty.mp4").touch()
    write_video(real / "narrow.mp4", video(), 12)
    write_video(generated / "narrow.mp4", video(width=44), 12)
    write_video(real / "lost.mp4", video(), 12)
    write_video(generated / "stray.mp4", video(), 12)
    write_video(real / "twice.mp4", video(), 12)
    write_video(generated / "twice.mp4", video(), 12)
    write_video(generated / "twice.avi.mkv", video(), 12)  # another name: twice.avi
    write_image(generated / "twice.png", video(1)[0])
    (real / "notes.txt").write_text("first")
    (real / ".hidden.mp4").touch()
    (generated / "deeper").mkdir()
    return real, generated


def config(folders, output, **settings):
    settings = {"metric": ["psnr", "ssim"], "num_frames": 5, **settings}
    return EvaluateConfig(
        real_video_dir=str(folders[0]), generated_video_dir=str(folders[1]), output_path=str(output), **settings
    )


@pytest.fixture(scope="module")
def report(folders, weights, tmp_path_factory):
    setup("cpu", "pynative", blocking=True)
    output = tmp_path_factory.mktemp("output") / "new"
    settings = config(folders, output, metric=["ssim", "psnr", "flolpips", "lpips"], lpips_weights=weights)
    return evaluate_folders(settings), settings


def rows(report):
    return {row.name: row for row in report.folders.rows}


def frames_of(path, count):
    with open_video(path) as reader:
        return reader.read(range(count)) / 255


def test_pairs_are_found_by_name_and_measured(folders, report, weights):
    found = rows(report[0])
    assert [row.name for row in report[0].rows("ok")] == ["first", "second", "still"]
    assert (found["first"].real.name, found["first"].generated.name) == ("first.mp4", "first.mkv")
    measures = Measures(MeasuresConfig(["ssim", "psnr", "flolpips", "lpips"], lpips_weights=weights))
    expected = measures.of(frames_of(folders[0] / "first.mp4", 5), frames_of(folders[1] / "first.mkv", 5))
    assert found["first"].measures == pytest.approx(expected, rel=1e-5)
    assert (found["first"].frames, found["first"].height, found["first"].width) == (5, 40, 56)
    a, b = (read_image(folder / "still.png")[None] / 255 for folder in folders)
    assert found["still"].measures["psnr"] == pytest.approx(psnr(a, b).mean(), rel=1e-5)
    assert "flolpips" not in found["still"].measures and "lpips" in found["still"].measures


def test_means_are_over_the_rows_that_have_the_measure(report):
    found, means = rows(report[0]), report[0].means()
    for name, videos in {"psnr": ["first", "second", "still"], "flolpips": ["first", "second"]}.items():
        assert means[name] == pytest.approx(np.mean([found[video].measures[name] for video in videos]))


@pytest.mark.parametrize(
    "name, status, message",
    [
        ("cut", "error", "A_rec/cut.mp4: "),
        ("empty", "error", "A_rec/empty.mp4: the file is empty"),
        ("short", "error", "A_ori/short.mp4: the video has 3 frames; 5 are needed"),
        ("narrow", "error", "frames of 56x40 and 44x40 cannot be compared; image_size and crop_size"),
        ("twice", "error", "A_rec has twice.mp4 and twice.png of this name"),
        ("lost", "unpaired", "A_rec"),
        ("stray", "unpaired", "A_ori"),
        ("twice.avi", "unpaired", "A_ori"),
    ],
)
def test_an_unmeasured_pair_has_a_row_that_says_why(name, status, message, report):
    row = rows(report[0])[name]
    assert row.status == status and message in row.error and "\n" not in row.error and not row.measures


def test_every_name_is_in_the_files_once(report):
    folder = Path(report[1].output_path)
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.csv", "metrics.json"]
    with open(folder / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["name"] for row in table] == [row.name for row in report[0].folders.rows] and len(table) == 11
    by_name = {row["name"]: row for row in table}
    columns = ["name", "real", "generated", "status", "frames", "height", "width"]
    assert list(table[0]) == [*columns, "ssim", "psnr", "flolpips", "lpips", "flow", "error"]
    for name, row in rows(report[0]).items():
        assert by_name[name]["status"] == row.status and by_name[name]["error"] == row.error
        for key in ("ssim", "psnr", "flolpips", "lpips"):
            assert by_name[name][key] == str(row.measures.get(key, ""))
        assert by_name[name]["flow"] == ("dis" if "flolpips" in row.measures else "")

    summary = json.loads((folder / "metrics.json").read_text())
    counts = {key: summary[key] for key in ("names", "measured", "failed", "unpaired")}
    assert counts == {"names": 11, "measured": 3, "failed": 5, "unpaired": 3}
    assert summary["mean"] == report[0].means()
    assert summary["videos"] == {"ssim": 3, "psnr": 3, "flolpips": 2, "lpips": 3}
    assert "OpenCV DIS" in summary["measures"]["flolpips"] and summary["left_out"] == {}
    assert [failure["name"] for failure in summary["failures"]] == ["cut", "empty", "narrow", "short", "twice"]
    assert [entry["name"] for entry in summary["unpaired_names"]] == ["lost", "stray", "twice.avi"]
    assert list(summary["not_looked_at"].values()) == [["notes.txt"], ["deeper"]]
    assert summary["config"]["num_frames"] == 5


def test_the_table_says_it_all(report):
    text = format_table(*report)
    lines = text.splitlines()
    assert lines[0].split() == ["video", "ssim", "psnr", "flolpips", "(dis)", "lpips"]
    assert [line.split()[0] for line in lines[1:5]] == ["first", "second", "still", "mean"]
    still = rows(report[0])["still"].measures
    assert lines[3].split()[1:] == [f"{still['ssim']:.4f}", f"{still['psnr']:.2f}", "-", f"{still['lpips']:.4f}"]
    assert "flolpips: for 2 of 3 pairs; a single frame has none" in lines
    assert any(line.startswith("flolpips: ") and "OpenCV DIS" in line for line in lines)
    for start in ("failed: cut: ", "failed: twice: ", "unpaired: lost: ", "unpaired: stray: "):
        assert sum(line.startswith(start) for line in lines) == 1
    assert f"ignored in {report[1].real_video_dir}: 1 that are" in text and "(notes.txt)" in text
    assert f"ignored in {report[1].generated_video_dir}: 1 that are" in text and "(deeper)" in text


def test_the_first_frames_are_taken_every_nth_resized_and_cropped_in_the_middle(folders, tmp_path):
    path = folders[0] / "second.mp4"
    settings = config(folders, tmp_path, num_frames=3, frame_stride=3, image_size=20, crop_size=16)
    with open_video(path) as reader:
        frames = reader.read([0, 3, 6])
    expected = np.stack([cv2.resize(frame, (28, 20), interpolation=cv2.INTER_AREA) for frame in frames])
    found = read_frames(path, settings)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected[:, 2:18, 6:22] / 255, atol=1e-6)
    with pytest.raises(ValueError, match="second.mp4: the video has 7 frames; 10 are needed"):
        read_frames(path, config(folders, tmp_path, num_frames=4, frame_stride=3))
    with pytest.raises(ValueError, match="second.mp4: frames of 56x40 are smaller than crop_size, 48"):
        read_frames(path, config(folders, tmp_path, crop_size=48))
    assert read_frames(path, config(folders, tmp_path, num_frames=None)).shape == (7, 40, 56, 3)


def test_sizes_that_resizing_and_cropping_make_equal_are_compared(folders, tmp_path):
    found = rows(evaluate_folders(config(folders, tmp_path, image_size=24, crop_size=24)))
    assert found["narrow"].status == "ok" and (found["narrow"].height, found["narrow"].width) == (24, 24)


def test_whole_videos_must_be_of_one_length(tmp_path):
    for name, count in (("a", 4), ("b", 5)):
        (tmp_path / name).mkdir()
        write_video(tmp_path / name / "x.mp4", video(count), 12)
    report = evaluate_folders(config((tmp_path / "a", tmp_path / "b"), tmp_path / "out", num_frames=None))
    assert rows(report)["x"].error == "4 and 5 frames cannot be compared; num_frames sets how many to compare"
    assert report.means() == {} and json.loads((tmp_path / "out" / "metrics.json").read_text())["mean"] == {}


def test_batches_change_only_the_reading(folders, tmp_path):
    one, three = (rows(evaluate_folders(config(folders, tmp_path, batch_size=size))) for size in (1, 3))
    assert one == three


def test_folders_and_settings_at_fault_are_named(folders, tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        find_pairs(folders[0], tmp_path / "nowhere")
    nothing = config(folders, tmp_path / "out", metric=["lpips"], lpips_weights=str(tmp_path / "none.safetensors"))
    with pytest.raises(ValueError, match="nothing can be measured: no LPIPS weights at .*none.safetensors"):
        evaluate_folders(nothing)
    assert not (tmp_path / "out").exists()
    for setting, value in (("num_frames", 0), ("frame_stride", 0), ("batch_size", 0), ("crop_size", -1)):
        with pytest.raises(ValueError, match=f"{setting} is {value}; it must be"):
            config(folders, tmp_path, **{setting: value})
    with pytest.raises(ValueError, match="crop_size is 32; it must be at most image_size, 16"):
        config(folders, tmp_path, crop_size=32, image_size=16)


def run(monkeypatch, *arguments):
    """Run the script as a command line does; returns its exit code."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return exit_.value.code or 0


def test_the_specifications_command_is_understood():
    command = (
        "--batch_size 2 --real_video_dir D_ori --generated_video_dir D_rec --device cuda --sample_fps 24 "
        "--crop_size 256 --resolution 256 --num_frames 17 --sample_rate 1 --metric ssim psnr lpips flolpips"
    )
    found = parse_config(EvaluateConfig, "", command.split())
    assert found.metric == ["ssim", "psnr", "lpips", "flolpips"]
    assert (found.device, found.sample_fps, found.batch_size, found.num_frames) == ("gpu", 24, 2, 17)
    assert (found.frame_stride, found.image_size, found.crop_size) == (1, 256, 256)


def test_the_command_writes_next_to_the_generated_folder_and_says_what_it_left_out(folders, monkeypatch, capsys):
    monkeypatch.chdir(folders[0].parent)  # no models/ here
    arguments = "--real_video_dir A_ori --generated_video_dir A_rec/ --num_frames 5 --device cpu --mode pynative"
    assert run(monkeypatch, *arguments.split(), "--metric", "ssim", "psnr", "lpips", "flolpips") == 1
    output = folders[1].parent / "A_rec_metrics"
    text = capsys.readouterr().out
    assert text.splitlines()[-1] == f"3 pairs measured, 5 failed, 3 unpaired; see {output}"
    for name in ("lpips", "flolpips"):
        assert f"left out: {name}: no LPIPS weights at 'models/lpips_alex.safetensors'" in text
    summary = json.loads((output / "metrics.json").read_text())
    assert list(summary["left_out"]) == ["lpips", "flolpips"] and list(summary["mean"]) == ["ssim", "psnr"]


def test_exit_codes_without_a_pair_and_with_a_mistake(tmp_path, monkeypatch, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_video(tmp_path / name / f"{name}.mp4", video(2), 12)
    folders = ["--real_video_dir", tmp_path / "a", "--generated_video_dir", tmp_path / "b", "--device", "cpu"]
    assert run(monkeypatch, *folders, "--metric", "psnr") == 1
    assert "0 pairs measured, 0 failed, 2 unpaired" in capsys.readouterr().out
    assert run(monkeypatch, *folders, "--metric", "psnr", "fvd") == 2
    assert "one or more of psnr, ssim, lpips, flolpips" in capsys.readouterr().err
