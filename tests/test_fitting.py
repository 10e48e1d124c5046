"""Clips run whole where that fits into memory, else in tiles; what fits neither way is not tried and costs no other."""

import csv
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import run_here
from mindspore import Tensor
from tiny_models import DC_AE, HUNYUAN_VAE, IMAGE_VAE, SMALL_TAE, TEMPORAL_VAE
from training_runs import TwoConvs

from mg.benchmark.footprints import measure_cost
from mg.config import parse_config
from mg.data import clips
from mg.data.clips import ClipOptions, load_clip
from mg.data.errors import reading
from mg.data.video import write_image, write_video
from mg.inference.decode import DecodeConfig, decode_folder
from mg.inference.encode import EncodeConfig, encode_csv
from mg.inference.fitting import DoesNotFit, Fitting
from mg.inference.loading import ModelSection
from mg.inference.reconstruction import InferenceConfig, reconstruct_csv
from mg.latents import open_latents
from mg.models import create_model, memory
from mg.models.memory import MEASURED, Footprint, bytes_needed, tilings
from mg.runtime import forget_graphs, setup
from mg.tiling import TilingConfig

SMALL, LARGE = (1, 3, 4, 64, 64), (1, 3, 4, 256, 256)
GB = 10**9


@pytest.fixture(autouse=True)
def costs(monkeypatch):
    """Two convolutions that cost 10 kB a pixel, and nothing else."""
    monkeypatch.setitem(MEASURED, "two_convs", Footprint(10_000, 10_000, lambda config: 1))
    for name in ("COMPILED", "NOT_COMPILED", "CLIP", "SCORES"):
        monkeypatch.setattr(memory, name, 0)
    monkeypatch.setattr(memory, "OP_BY_OP", 1)


def needs(*sizes: int) -> float:
    """GB that this many pixels cost."""
    return np.prod(sizes) * 10_000 / GB


def two_convs() -> TwoConvs:
    return TwoConvs({})


def test_clips_that_fit_run_whole_and_others_in_the_largest_tiles_that_fit(caplog):
    model, fitting = two_convs(), Fitting(max_memory=needs(4, 128, 128))
    with caplog.at_level("INFO"):
        assert fitting.settle(model, SMALL) == "whole" and model.tiling is None
        assert fitting.settle(model, LARGE) == "in tiles of 32x128x128" and model.tiling.spatial_tile == 128
        assert fitting.settle(model, SMALL) == "whole" and model.tiling is None
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "two_convs: clips of 4x64x64 run whole, about 0.2 GB of memory"
    takes = "about 0.7 GB of memory; whole it would be 2.6 GB, and 0.7 GB are free"
    assert lines[1:] == [f"two_convs: clips of 4x256x256 run in tiles of 32x128x128, {takes}"]


def test_fewer_frames_run_at_a_time_if_no_tile_fits():
    model, fitting = two_convs(), Fitting(max_memory=needs(8, 64, 64))
    assert fitting.settle(model, (1, 3, 64, 512, 512)) == "in tiles of 8x64x64"
    assert (model.tiling.encode_tile, model.tiling.decode_tile, model.tiling.decode_overlap) == (8, 8, 4)


@pytest.mark.parametrize(
    "options, said",
    [
        (
            dict(),
            "whole and 0.2 GB in tiles of 32x64x64, the least possible; 0.0 GB are free: take fewer or smaller",
        ),
        (dict(enable_tile=False), "whole; 0.0 GB are free: --enable_tile auto runs it in tiles"),
        (dict(given=dict(spatial_tile=128)), "whole and 0.7 GB in tiles of 32x128x128, .*: give smaller tiles"),
    ],
)
def test_a_clip_that_fits_neither_way_is_one_line_with_sizes_and_a_remedy(options, said):
    with pytest.raises(DoesNotFit) as error:
        Fitting(max_memory=0.01, **options).settle(two_convs(), LARGE)
    wanted = rf"a clip of 4x256x256 takes about 2.6 GB of memory {said}.*, or set --max_memory GB if it may use more"
    assert re.fullmatch(wanted, str(error.value)), error.value


def test_a_models_own_tiles_stay_and_one_that_does_not_fit_is_named():
    model = two_convs()
    model.enable_tiling(encode_tile=4, decode_tile=4, decode_overlap=0, spatial_tile=128, spatial_overlap=0)
    assert Fitting(max_memory=needs(4, 128, 128)).settle(model, LARGE) == "in tiles of 4x128x128"
    assert Fitting(max_memory=100).settle(model, LARGE) == "in tiles of 4x128x128"
    with pytest.raises(DoesNotFit, match="0.7 GB of memory in tiles of 4x128x128; 0.3 GB are free: give smaller tiles"):
        Fitting(max_memory=0.3).settle(model, LARGE)


def test_given_tile_sizes_are_kept():
    model, given = two_convs(), dict(spatial_tile=64, spatial_overlap=32, encode_tile=2)
    Fitting(given=given, max_memory=needs(4, 64, 64)).settle(model, LARGE)
    assert {name: getattr(model.tiling, name) for name in given} == given


def test_clips_that_do_not_fit_at_once_run_one_by_one():
    fitting = Fitting(max_memory=needs(*SMALL[2:]))
    with pytest.raises(DoesNotFit, match="2 clips of 4x64x64 at once do not fit into 0.2 GB"):
        fitting.settle(two_convs(), (2, *SMALL[1:]))
    assert fitting.settle(two_convs(), SMALL) == "whole"


def test_streams_are_judged_by_a_stretch_of_them():
    model, fitting = two_convs(), Fitting(max_memory=needs(32, 64, 64))
    long = (1, 3, 10_000, 64, 64)
    assert fitting.settle(model, long, ("encode",), streams=True) == "in tiles of 32 frames"
    assert fitting.settle(model, (1, 3, 10_000, 128, 128), ("decode",), streams=True) == "in tiles of 8 frames"


def test_a_model_that_runs_out_of_memory_continues_in_tiles(caplog):
    model, fitting, seen = two_convs(), Fitting(max_memory=100), []

    def call(message="Allocate memory failed"):
        seen.append(model.tiling)
        if model.tiling is None:
            raise RuntimeError(message)
        return "done"

    assert fitting.run(model, LARGE, call) == "done" and seen[0] is None and seen[1].spatial_tile == 128
    assert "clips of 4x256x256 do not run whole: Allocate memory failed" in caplog.text
    assert fitting.run(model, LARGE, call) == "done" and len(seen) == 3  # it is known now
    with pytest.raises(RuntimeError, match="another"):
        fitting.run(model, SMALL, lambda: call("another"))
    model = two_convs()
    with pytest.raises(RuntimeError, match="Allocate"):
        Fitting(enable_tile=False).run(model, SMALL, call)


def test_compiled_graphs_are_forgotten_before_a_clip_is_refused(monkeypatch):
    model, fitting, free, forgotten = two_convs(), Fitting(), [needs(*SMALL[2:]) * GB / 2], []

    def forget(network):
        forgotten.append(network)
        free[0] *= 4

    monkeypatch.setattr("mg.inference.fitting.runtime.is_graph_mode", lambda: True)
    monkeypatch.setattr("mg.inference.fitting.runtime.forget_graphs", forget)
    monkeypatch.setattr("mg.inference.fitting.runtime.free_memory", lambda: free[0])
    with pytest.raises(DoesNotFit):
        fitting.settle(model, SMALL)  # of whose model there is no graph to forget
    assert fitting.settle(model, (1, 3, 1, 64, 64)) == "whole" and not forgotten
    assert fitting.settle(model, SMALL) == "whole" == fitting.settle(model, SMALL) and forgotten == [model]


def test_tiles_that_ran_before_fit_again_however_little_is_left(monkeypatch):
    """What a compiled graph holds, it holds for all clips that are cut into its tiles."""
    model, fitting, free = two_convs(), Fitting(), [needs(4, 128, 128) * GB / 0.9 + 1]
    monkeypatch.setattr("mg.inference.fitting.runtime.is_graph_mode", lambda: True)
    monkeypatch.setattr(
        "mg.inference.fitting.runtime.forget_graphs", lambda _: pytest.fail("nothing is to be forgotten")
    )
    monkeypatch.setattr("mg.inference.fitting.runtime.free_memory", lambda: free[0])
    assert fitting.settle(model, LARGE) == "in tiles of 32x128x128"
    free[0] = 1000
    for height in range(128, 400, 32):
        assert fitting.settle(model, (1, 3, 4, height, 256)) == "in tiles of 32x128x128"


@pytest.mark.full
def test_a_network_whose_graphs_are_forgotten_compiles_them_again():
    setup("cpu", "graph")
    model, x = two_convs(), Tensor(np.random.default_rng(0).normal(size=(1, 3, 2, 8, 8)).astype(np.float32))
    before = model(x).asnumpy()
    assert any(cell.compile_cache for _, cell in model.cells_and_names())
    forget_graphs(model)
    assert not any(cell.compile_cache for _, cell in model.cells_and_names())
    np.testing.assert_array_equal(model(x).asnumpy(), before)


def test_a_model_with_unknown_memory_needs_runs_whole(monkeypatch):
    monkeypatch.delitem(MEASURED, "two_convs")
    assert Fitting(max_memory=1e-9).settle(two_convs(), LARGE) == "whole"


def test_memory_of_earlier_clips_is_used_again(monkeypatch):
    """What a process holds stays its own: a second shape fits as the first did."""
    monkeypatch.setattr("mg.inference.fitting.Fitting._at_start", GB)
    monkeypatch.setattr("mg.inference.fitting.runtime.free_memory", lambda: 2 * GB)
    monkeypatch.setattr("mg.inference.fitting.resident", lambda: 9 * GB)
    assert Fitting()._free() == pytest.approx(0.9 * 10 * GB)
    monkeypatch.setattr("mg.inference.fitting.runtime.is_graph_mode", lambda: True)
    assert Fitting()._free() == pytest.approx(0.9 * 2 * GB)  # what a compiled graph took stays the graph's
    monkeypatch.setattr("mg.inference.fitting.runtime.free_memory", lambda: None)
    assert Fitting()._free() is None and Fitting(max_memory=3)._free() == 3 * GB


# All models.

MODELS = {
    "tae": SMALL_TAE,
    "image_vae": IMAGE_VAE,
    "dc_ae": DC_AE,
    "hunyuan_vae": HUNYUAN_VAE,
    "temporal_vae": TEMPORAL_VAE,
}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_a_footprint_and_tiles_that_it_takes(name):
    model = create_model(name, **MODELS[name])
    shape = (1, 3, 64, 1080, 1920)
    found = tilings(model, {})
    assert len(found) > 4 and found[0].spatial_tile == model.default_tiling.spatial_tile
    for tiling in found:
        model.enable_tiling(**vars(tiling))
    costs = [bytes_needed(model, shape, tiling) for tiling in (None, found[0], found[-1])]
    assert costs[0] > costs[1] > costs[2] > 0 or name == "temporal_vae"
    assert costs[0] > 10 * costs[2]
    assert bytes_needed(model, shape, None, op_by_op=True) >= costs[0]
    released = type(model).default_config
    assert MEASURED[name].width(released) == 128


def test_a_network_sees_padded_clips_of_at_most_a_tile():
    model = create_model("hunyuan_vae", **HUNYUAN_VAE)  # 4k + 1 frames, 8 x 8 pixels
    assert memory.tile_shape(model, (1, 3, 6, 17, 16), None, "encode") == (1, 3, 9, 24, 16)
    tiling = TilingConfig(encode_tile=4, decode_tile=8, decode_overlap=0, spatial_tile=16)
    assert memory.tile_shape(model, (1, 3, 30, 64, 8), tiling, "encode") == (1, 3, 5, 16, 8)
    assert memory.tile_shape(model, (1, 3, 30, 64, 8), tiling, "decode") == (1, 3, 9, 16, 8)
    chunked = create_model("temporal_vae", **TEMPORAL_VAE)  # chunks of 17 frames
    assert memory.tile_shape(chunked, (1, 3, 100, 64, 64), None, "decode")[2] == 17


SIDES = (48, 96)
REALITY = [(name, part, "graph") for name in MEASURED for part in memory.PARTS]
REALITY += [(name, "decode", "pynative") for name in MEASURED]


@pytest.mark.full
@pytest.mark.parametrize("name, part, mode", REALITY)
def test_a_process_needs_the_predicted_memory_within_a_factor(monkeypatch, name, part, mode):
    """The peak of a real process, of small models and clips; no less may be told, or Linux ends what was let run."""
    monkeypatch.undo()
    config = MODELS[name]
    cost = measure_cost(name, part, mode, SIDES, config)
    model = create_model(name, **config)
    frames = 16 if name in ("tae", "image_vae", "dc_ae") else 17
    told = [bytes_needed(model, (1, 3, frames, side, side), None, (part,), mode != "graph") for side in SIDES]
    assert 0.2 * (told[1] - told[0]) < cost.peaks[1] - cost.peaks[0] < 1.1 * (told[1] - told[0]) + 50e6
    assert cost.peaks[1] - cost.before < told[1] < 8 * (cost.peaks[1] - cost.before)


# Through the commands.


@pytest.fixture
def set_of_sizes(tmp_path):
    """A small clip, a large one and a still, and their CSV."""
    rng = np.random.default_rng(0)
    for name, size in (("small.mp4", 64), ("large.mp4", 256), ("again.mp4", 64)):
        write_video(tmp_path / name, rng.integers(0, 256, (4, size, size, 3)).astype(np.uint8), 8)
    write_image(tmp_path / "still.png", np.full((64, 64, 3), 90, np.uint8))
    (tmp_path / "set.csv").write_text("video\nsmall.mp4\nlarge.mp4\nstill.png\nagain.mp4\n")
    TwoConvs({}).save_weights(tmp_path / "w.ckpt")
    options = dict(model=ModelSection(str(tmp_path / "w.ckpt")), csv_path=str(tmp_path / "set.csv"), mode="pynative")
    return dict(options, image_size=0, crop=False, output_path=str(tmp_path / "out"))


def rows_of(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_each_row_says_how_its_clip_ran(tmp_path, set_of_sizes):
    """In batches of two that do not fit at once, by which nothing is lost."""
    config = InferenceConfig(**set_of_sizes, max_memory=needs(4, 128, 128) / 2, batch_size=2, save_videos=False)
    report = reconstruct_csv(config)
    assert [result.tiles for result in report.results] == ["whole", "in tiles of 32x64x64", "whole", "whole"]
    assert [row["tiles"] for row in rows_of(tmp_path / "out" / "metrics.csv")] == [r.tiles for r in report.results]
    whole = reconstruct_csv(replace(config, max_memory=1000, output_path=str(tmp_path / "whole")))
    for tiled, result in zip(report.results, whole.results):
        assert result.tiles == "whole"
        np.testing.assert_allclose(tiled.scores["reconstruction"], result.scores["reconstruction"], rtol=1e-2)


def test_a_clip_that_fits_neither_way_is_a_row_and_the_others_have_their_figures(tmp_path, set_of_sizes, monkeypatch):
    monkeypatch.setattr(memory, "CLIP", 10_000)  # of which tiles save nothing
    arguments = [
        "--ckpt_path",
        tmp_path / "w.ckpt",
        "--csv_path",
        tmp_path / "set.csv",
        "--output_path",
        tmp_path / "out",
    ]
    arguments += ["--image_size", 0, "--crop", "False", "--max_memory", needs(4, 128, 128), "--mode", "pynative"]
    assert run_here(monkeypatch, "scripts/inference_vae.py", *arguments) == 1
    rows = rows_of(tmp_path / "out" / "metrics.csv")
    assert [row["status"] for row in rows] == ["ok", "error", "ok", "ok"]
    assert "a clip of 4x256x256 takes about 5.2 GB of memory whole" in rows[1]["error"] and rows[1]["height"] == "256"


def test_latents_are_encoded_and_decoded_in_tiles_if_frames_do_not_fit(tmp_path, set_of_sizes):
    config = EncodeConfig(**set_of_sizes, max_memory=needs(4, 128, 128))
    report = encode_csv(config)
    assert report.encoded == 4
    latents = open_latents(tmp_path / "out")
    assert [clip.tiles for clip in latents.values()] == [
        "in tiles of 32 frames",
        "in tiles of 32x128x128",
        *["in tiles of 32 frames"] * 2,
    ]
    assert latents.settings["model"]["tiling"] == {"auto": True}
    decode = DecodeConfig(latents_path=str(tmp_path / "out"), output_path=str(tmp_path / "decoded"), mode="pynative")
    assert decode_folder(replace(decode, max_memory=needs(4, 128, 128))).decoded == 4
    again = decode_folder(replace(decode, output_path=str(tmp_path / "none"), max_memory=needs(4, 32, 32)))
    assert {name for name, _ in again.failed} == {"small.mp4", "large.mp4", "again.mp4"}
    assert "in tiles of" in again.failed[0][1] and again.decoded == 1
    again = encode_csv(
        EncodeConfig(**{**set_of_sizes, "output_path": str(tmp_path / "few")}, max_memory=needs(4, 32, 32))
    )
    assert (again.encoded, len(again.failed)) == (1, 3)
    assert encode_csv(EncodeConfig(**{**set_of_sizes, "output_path": str(tmp_path / "few")})).encoded == 3  # with room


def test_a_clip_that_cannot_be_held_is_not_read(tmp_path, set_of_sizes, monkeypatch):
    monkeypatch.setattr(clips, "available_memory", lambda: 10_000_000)
    options = ClipOptions(image_size=0, crop=False)
    assert load_clip(tmp_path / "small.mp4", options)[0].shape == (3, 4, 64, 64)
    with pytest.raises(
        ValueError, match=r"large.mp4: 4 frames of 256x256 take 0.0 GB .* 0.0 GB of memory are free: take"
    ):
        load_clip(tmp_path / "large.mp4", options)
    assert load_clip(tmp_path / "large.mp4", ClipOptions(image_size=64))[0].shape == (3, 4, 64, 64)


def test_a_video_that_failed_for_lack_of_memory_is_encoded_by_the_next_run(tmp_path, set_of_sizes, monkeypatch):
    config = EncodeConfig(**set_of_sizes)
    real = clips.open_video

    def starved(path, **options):
        with reading(path):
            if path.name == "large.mp4":
                raise MemoryError
            return real(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(clips, "open_video", starved)
        report = encode_csv(config)
    assert report.encoded == 3 and "large.mp4: it cannot be read (not enough memory)" in report.failed[0][1]
    report = encode_csv(config)
    assert (report.encoded, report.there, report.failed) == (1, 3, [])


def test_the_option_is_understood_in_all_its_forms():
    def read(*words):
        return parse_config(InferenceConfig, "", ["--ckpt_path", "x", "--csv_path", "y", *words]).enable_tile

    assert read() == "auto" == read("--enable_tile", "auto") == read("--enable_tile=auto")
    assert read("--enable_tile") is True is read("--enable_tile", "true") is read("--enable_tile=True")
    assert read("--enable_tile=False") is False is read("--enable_tile", "false")
    with pytest.raises(ValueError, match="enable_tile is 'maybe'; it must be true, false or auto"):
        read("--enable_tile=maybe")
