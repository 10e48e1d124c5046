"""The benchmark of streams: every part runs on the whole video, and a row says what each takes."""

import json
from pathlib import Path

import numpy as np
import pytest
from commands import run_here
from PIL import Image
from training_runs import TwoConvs

from mg.benchmark import speed, streams
from mg.benchmark.loader_speed import make_videos
from mg.benchmark.speed_worker import Job, WorkerError
from mg.benchmark.stream_parts import Video, measure, streams_of, taken
from mg.benchmark.streams import StreamsConfig, format_table, measure_streams
from mg.latents import LatentFolder

TOOL = "tools/benchmark_streams.py"
IMAGE_VAE = {"ch": 8, "ch_mult": [1, 2], "num_res_blocks": 1, "z_channels": 4, "norm_num_groups": 4}
FRAMES = 10


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return make_videos(tmp_path_factory.mktemp("videos"), "16p", FRAMES + 2, count=1)[0].path


@pytest.fixture
def model() -> TwoConvs:
    model = TwoConvs({})
    model.enable_tiling(encode_tile=4, decode_tile=4, decode_overlap=2)
    return model


def test_a_part_on_its_own_goes_through_as_much_as_the_whole(tmp_path, path, model):
    of = streams_of(model, Video(model, path, FRAMES, tmp_path))
    of["encode"].prepare()
    z = LatentFolder(tmp_path / "latents")[path.name].read()
    assert z.shape == (2, FRAMES, 16, 28)
    read = []
    open_video = of["encode"].open
    with open_video() as through:
        np.testing.assert_array_equal(z, model.codec.encode(through(0, FRAMES)).z[0])
    videos = {}
    for name in ("decode", "reconstruct"):
        of[name].prepare()
        videos[name] = (tmp_path / "decoded.mp4").read_bytes()
    assert videos["decode"] == videos["reconstruct"]
    for stream in of.values():
        wrote = []
        stream.write = lambda pieces, wrote=wrote: wrote.extend(piece.shape[2] for piece in pieces)
        stream.writing_only()
        stream.whole()
        assert len(wrote) > 4 and sum(wrote) == 2 * FRAMES and wrote[: len(wrote) // 2] * 2 == wrote
        read.clear()
        stream.run = lambda through, ahead, run=stream.run: run(
            lambda a, b: read.append((a, b)) or through(a, b), ahead
        )
        stream.model_only()
        assert read == stream._bounds and read[0][0] == 0 and read[-1][1] == FRAMES


def test_times_are_those_of_the_parts_that_were_asked_for(path, model):
    found = measure(model, str(path), FRAMES, ["decode"], runs=2)
    assert list(found["times"]) == ["decode"] and found["size"] == "16x28"
    assert {name: len(times) for name, times in found["times"]["decode"].items()} == dict.fromkeys(
        ("read", "model", "write", "whole"), 2
    )


def test_what_comes_in_pieces_is_read_in_order_with_overlaps():
    x = np.arange(12.0).reshape(1, 1, 12, 1, 1)
    read = taken(iter(np.split(x, [5, 6, 9], axis=2)))
    for start, stop in ((0, 4), (2, 7), (6, 7), (6, 12)):
        np.testing.assert_array_equal(read(start, stop), x[:, :, start:stop])


class FakeWorker:
    """A worker whose times are known; torch runs out of memory."""

    jobs: list[Job] = []

    def __init__(self, job: Job):
        self.jobs.append(job)
        if job.task == "export":
            Path(job.folder, "deploy.json").touch()
        if job.engine == "torch":
            raise WorkerError("out of memory")
        times = {"read": [1.0, 1.0], "model": [4.0, 8.0], "write": [1.0, 5.0], "whole": [4.0, 9.0]}
        self.said = {"times": {"encode": times}, "size": "64x114", "tiling": {}, "device": "cpu", "peak_rss": 2**21}

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


def test_the_table_and_the_file_have_a_row_for_each_engine_and_part(tmp_path, path, monkeypatch):
    monkeypatch.setattr(FakeWorker, "jobs", [])
    for module in (streams, speed):
        monkeypatch.setattr(module, "Worker", FakeWorker)
    monkeypatch.setattr(speed, "find_spec", lambda name: None if name == "openvino" else name)
    engines = ["mindspore", "onnxruntime", "openvino", "torch"]
    config = StreamsConfig(engines=engines, video=str(path), frames=FRAMES, device="cpu", output_path=str(tmp_path))
    found = measure_streams(config)
    assert json.loads((tmp_path / "streams.json").read_text()) == found
    first, other = found["records"]
    assert (first["engine"], other["engine"], first["part"]) == ("mindspore", "onnxruntime", "encode")
    assert first["seconds"] == {"read": 1.0, "model": 6.0, "write": 3.0, "whole": 6.5}
    assert first["share"] == {"read": 0.1, "model": 0.6, "write": 0.3} and first["longest"] == "model"
    assert first["frames_per_second"] == FRAMES / 6.5 and first["peak_rss_mb"] == 2
    assert first["whole_by_longest"] == {"median": 1.0625, "min": 1.0, "max": 1.125}
    assert [job.task for job in FakeWorker.jobs] == ["stream", "export", "stream", "stream"]  # exported once
    rows = format_table(found).splitlines()
    assert rows[0].split() == "part engine precision frames/s read s model s write s whole s whole/longest".split()
    assert "6.00 (60%)" in rows[1] and "1.06 (1.00-1.12)" in rows[1]
    assert "tae, 10 frames of 64x114" in rows
    assert rows[-2:] == [
        "left out: tae openvino fp32: openvino is not installed: pip install openvino",
        "FAILED: tae torch fp32: out of memory",
    ]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--frames", "0"], "frames is 0; it must be at least 1"),
        (["--size", "720"], "size has '720'; a size is a video's height"),
        (["--video", "none.mp4", "--runs", "1"], "none.mp4: no such file"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, options, message):
    assert run_here(monkeypatch, TOOL, *options, "--output_path", tmp_path) == 2
    assert message in capsys.readouterr().err


def test_an_image_is_no_stream(tmp_path, monkeypatch, capsys):
    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")
    assert run_here(monkeypatch, TOOL, "--video", tmp_path / "image.png", "--output_path", tmp_path / "out") == 2
    assert "image.png: an image; a stream of 240 frames needs a video" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_an_error_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(streams, "set_up", lambda *options: pytest.fail("it measures"))
    assert run_here(monkeypatch, TOOL, "--output_path", tmp_path / "file") == 2
    assert "file: File exists" in capsys.readouterr().err


@pytest.mark.full
def test_the_command_measures_a_model_and_its_export(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    options = ["--model", "image_vae", "--configs", json.dumps({"image_vae": IMAGE_VAE}), "--mode", "pynative"]
    options += "--size 32p --frames 6 --tile_frames 4 --tile_size 16 --runs 1 --threads 1 --device cpu".split()
    options += ["--engines", "mindspore", "onnxruntime", "--output_path", tmp_path]
    assert run_here(monkeypatch, TOOL, *options) == 0
    found = json.loads((tmp_path / "streams.json").read_text())
    rows = [(record["engine"], record["part"]) for record in found["records"]]
    assert rows == [(e, p) for e in ("mindspore", "onnxruntime") for p in ("encode", "decode", "reconstruct")]
    assert all(record["tiling"] == found["records"][0]["tiling"] for record in found["records"])
    assert "image_vae, 6 frames of 32x56" in capsys.readouterr().out
