"""The loader's benchmark: a row for each source, decoder, kind and number of workers, and one line for a mistake."""

import json

import pytest
from commands import run_here

from mg.benchmark import loader_speed
from mg.benchmark.loader_speed import LoaderSpeedConfig, format_table, make_videos, measure_loader
from mg.data.video import write_image

TOOL = "tools/benchmark_loader.py"


def test_the_table_and_the_file_have_a_row_for_all_that_was_asked(tmp_path, monkeypatch, capsys):
    options = "--sizes 64p --num_frames 3 --image_size 32 --decoders av --workers 1 2 --clips 2 --runs 2".split()
    options += "--repeats 1 8 --large 64p 128p".split()
    assert run_here(monkeypatch, TOOL, *options, "--output_path", tmp_path) == 0
    found = json.loads((tmp_path / "loader.json").read_text())
    setups = [(record["source"], record["decoder"], record["kind"], record["workers"]) for record in found["records"]]
    assert setups == [("64p", "av", kind, workers) for kind in ("processes", "threads") for workers in (1, 2)]
    for record in found["records"]:
        assert len(record["seconds_of_runs"]) == 2 and record["clips_per_second"] > 0 and not record["unreadable"]
        assert (record["peak_worker_mb"] is None) == (record["kind"] == "threads")
    assert found["records"][0]["speedup"] == {"median": 1, "min": 1, "max": 1}
    assert found["versions"]["av"] and found["settings"]["clips"] == 2
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].split()[:4] == ["source", "decoder", "workers", "kind"] and len(rows) == 1 + 4 + 6 + 2 + 1
    assert [record["container"] for record in found["lengths"]] == ["mp4", "mp4", "mkv", "mkv", "ts", "ts"]
    for short, long in zip(found["lengths"][::2], found["lengths"][1::2]):
        assert long["file_mb"] > 4 * short["file_mb"]
        assert long["first_clip_mb_read"] and long["clip_seconds"] > 0
    assert [record["height"] for record in found["large"]] == [64, 128]


def test_a_users_own_videos_are_measured_and_unreadable_ones_are_counted(tmp_path):
    good = make_videos(tmp_path, "64p", 6)[0]
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    write_image(tmp_path / "still.png", loader_speed.read_photograph("coffee.png"))
    (tmp_path / "index.csv").write_text(f"video\n{good.name}\nbad.mp4\nstill.png\n")
    options = dict(num_frames=3, image_size=32, decoders=["av"], kinds=["threads"], workers=[1], clips=2, runs=1)
    options.update(repeats=[], large=[])
    config = LoaderSpeedConfig(csv_path=str(tmp_path / "index.csv"), output_path=str(tmp_path / "out"), **options)
    found = measure_loader(config)
    assert [record["source"] for record in found["records"]] == ["index.csv"] and not found["failed"]
    assert found["records"][0]["unreadable"] > 0 and "of index.csv, which could not be read" in format_table(found)
    (tmp_path / "index.csv").write_text("video\nbad.mp4\n")
    found = measure_loader(config)
    assert not found["records"] and "none of its videos can be read: " in found["failed"][0]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--sizes", "720"], "sizes has '720'; a size is a video's height"),
        (["--sizes", "15p"], "sizes has '15p'"),
        (["--workers", "0"], "workers is [0]; it must be numbers of at least 1"),
        (["--clips", "0"], "clips is 0; it must be at least 1"),
        (["--csv_path", "none.csv"], "none.csv: no such CSV file"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(options, message, monkeypatch, capsys, tmp_path):
    assert run_here(monkeypatch, TOOL, *options, "--output_path", tmp_path) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and message in said.err, said.err
