"""Reconstructing a CSV: every line is accounted for, files land where they should, scores are those of the clips."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from commands import run_here
from mindspore import Tensor
from tiny_models import InTiles
from training_runs import TwoConvs

from mg.config import parse_config
from mg.data.clips import Clip, load_clip
from mg.data.index import read_index
from mg.data.video import open_video, read_image, write_image, write_video
from mg.inference import loading, reconstruction
from mg.inference.batches import group_by_shape
from mg.inference.loading import ClipsConfig, ModelSection, TileFields, load_model, noise_for
from mg.inference.outputs import LABEL_HEIGHT, output_names, side_by_side
from mg.inference.reconstruction import (
    InferenceConfig,
    Report,
    Result,
    format_table,
    reconstruct,
    reconstruct_csv,
    score,
)
from mg.inference.statistics import StatisticsConfig, measure
from mg.losses.reconstruction import LossConfig
from mg.models import create_model
from mg.tiling import TilingConfig

ROOT = Path(__file__).parents[1]
TINY = {"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "z_channels": 4}
RNG = np.random.default_rng(0)


def clip(frames, height, width):
    """A smooth moving picture, so that H.264 keeps it nearly as it is."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    planes = [128 + 90 * np.sin((x + 2 * t) / 9 + c) * np.cos(y / 11 - c) for c in range(3)]
    return np.stack(planes, axis=-1).astype(np.uint8)


def write_index(folder, names):
    path = folder / "index.csv"
    path.write_text("\n".join(["video,caption", *(f"{name},a clip" for name in names)]) + "\n")
    return str(path)


@pytest.fixture
def videos(tmp_path):
    """Three clips of 9 frames, two of them of one name, an image, a broken file and one that is too short."""
    folder = tmp_path / "videos"
    for name in ("a/x.mp4", "b/x.mp4", "c.mp4"):
        write_video(folder / name, clip(9, 48, 64), fps=10)
    write_video(folder / "short.mp4", clip(2, 48, 64), fps=10)
    write_image(folder / "still.png", clip(1, 50, 40)[0])
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


class Offset(InTiles):
    """A model that adds a constant, padding as a real one does, and notes what it was shown."""

    name = "offset"
    temporal_compression = spatial_compression = 8
    two_stages = False

    def __init__(self, offset=0.1):
        self.offset, self.shapes = offset, []

    def latent_shape(self, shape):
        return (*shape[:3], shape[3] + -shape[3] % 8, shape[4] + -shape[4] % 8)

    @property
    def codec(self):
        return self

    def latents(self, x, noise=None):
        self.shapes.append(x.shape)
        pad = [(0, wanted - size) for size, wanted in zip(x.shape, self.latent_shape(x.shape))]
        mean = np.pad(x, pad, mode="edge")
        z = mean if noise is None else mean + 0.5 + 0 * noise
        return {"code": z, "z": z, "mean": mean, "logvar": np.zeros_like(mean), "target": None}

    def video(self, code, shape):
        return (code + self.offset)[..., : shape[3], : shape[4]]


@pytest.fixture
def models(monkeypatch):
    """Models that add an offset instead of checkpoints, by path; that of `bad.ckpt` is larger."""
    made = {}

    def load(path, name, dtype, **config):
        return made.setdefault(path, Offset(0.3 if "bad" in path else 0.1))

    monkeypatch.setattr(loading, "from_pretrained", load)
    return made


def configure(folder, videos, names, **options):
    settings = dict(csv_path=write_index(folder, names), video_folder=str(videos), image_size=32)
    settings["model"] = ModelSection("tae.ckpt", **options.pop("model", {}))
    return InferenceConfig(**{**settings, "output_path": str(folder / "out"), **options})


def read_metrics(folder):
    with open(folder / "out" / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file)), json.loads((folder / "out" / "metrics.json").read_text())


def test_every_line_of_the_index_has_one_row_in_its_order_errors_included(tmp_path, videos, models):
    names = ["broken.mp4", "a/x.mp4", "short.mp4", "still.png", "missing.mp4", "b/x.mp4"]
    report = reconstruct_csv(configure(tmp_path, videos, names, num_frames=5, batch_size=2))
    rows, summary = read_metrics(tmp_path)
    assert [row["name"] for row in rows] == names
    assert [row["status"] for row in rows] == ["error", "ok", "error", "ok", "error", "ok"]
    assert all(bool(row["error"]) == (row["status"] == "error") == (row["psnr"] == "") for row in rows)
    assert "the video has 2 frames; 5 are needed" in rows[2]["error"]
    assert [rows[1][key] for key in ("frames", "height", "width")] == ["5", "32", "32"]
    assert [rows[3][key] for key in ("frames", "height", "width")] == ["1", "32", "32"]
    assert (summary["clips"], summary["succeeded"], summary["failed"]) == (6, 3, 3)
    assert [failure["name"] for failure in summary["failures"]] == ["broken.mp4", "short.mp4", "missing.mp4"]
    psnrs = [float(row["psnr"]) for row in rows if row["psnr"]]
    assert summary["mean"]["reconstruction"]["psnr"] == pytest.approx(np.mean(psnrs))
    assert summary["config"]["num_frames"] == 5
    assert report.means()["reconstruction"][0] == pytest.approx(np.mean(psnrs))


def test_a_clip_is_written_while_the_next_is_computed_and_fails_alone(tmp_path, videos, models, monkeypatch):
    second, model, write = Event(), Offset(), reconstruction.write_frames
    models["tae.ckpt"], video = model, model.video

    def noticed(code, shape):
        if len(model.shapes) == 2:
            second.set()
        return video(code, shape)

    def late(path, frames, fps):
        if not second.wait(60):
            raise RuntimeError("the next clip waited for the files of this one")
        if path.stem == "c" and path.parent.name == "side_by_side":
            raise OSError("no space left")
        write(path, frames, fps)

    monkeypatch.setattr(model, "video", noticed)
    monkeypatch.setattr(reconstruction, "write_frames", late)
    reconstruct_csv(configure(tmp_path, videos, ["a/x.mp4", "c.mp4", "still.png"], num_frames=5))
    rows, _ = read_metrics(tmp_path)
    assert [row["error"] for row in rows] == ["", "no space left", ""]
    assert rows[1]["psnr"] == "" and not list((tmp_path / "out").rglob("c.*"))


def test_reconstruction_original_and_side_by_side_are_written_under_names_that_do_not_collide(tmp_path, videos, models):
    config = configure(tmp_path, videos, ["a/x.mp4", "b/x.mp4", "still.png", "a/x.mp4"], num_frames=5, baseline=True)
    reconstruct_csv(config)
    out = tmp_path / "out"
    for kind in ("reconstruction", "original", "side_by_side"):
        assert sorted(path.name for path in (out / kind).iterdir()) == ["a_x.mp4", "a_x_2.mp4", "b_x.mp4", "still.png"]
    original, shown = open_video(out / "original" / "a_x.mp4"), open_video(out / "side_by_side" / "a_x.mp4")
    assert (original.num_frames, original.height, original.width, original.fps) == (5, 32, 32, 10)
    assert (shown.num_frames, shown.height, shown.width) == (5, 32 + LABEL_HEIGHT, 3 * 32)
    still, original = read_image(out / "reconstruction" / "still.png"), read_image(out / "original" / "still.png")
    assert np.abs(still.astype(int) - np.minimum(original + 0.1 * 127.5, 255)).max() <= 1


def test_compared_checkpoints_and_the_baseline_are_scored_like_the_reconstruction(tmp_path, videos, models):
    config = configure(tmp_path, videos, ["c.mp4"], compare=["bad.ckpt", "other/bad.ckpt"], baseline=True)
    report = reconstruct_csv(config)
    assert report.methods == ["reconstruction", "bad", "bad_2", "baseline"]
    (row,), summary = read_metrics(tmp_path)
    assert float(row["psnr_bad"]) == float(row["psnr_bad_2"]) < float(row["psnr"])
    assert set(summary["mean"]) == set(report.methods)
    assert 0 < float(row["ssim_baseline"]) < 1
    table = format_table(report)
    assert f"{float(row['psnr']):.2f}" in table and f"{float(row['ssim_bad']):.4f}" in table and "mean" in table


def test_without_a_number_of_frames_the_whole_video_is_reconstructed_at_any_odd_size(tmp_path, videos, models):
    report = reconstruct_csv(configure(tmp_path, videos, ["c.mp4"], image_size=33, crop=False))
    assert [(r.frames, r.height, r.width) for r in report.results] == [(9, 33, 44)]
    report = reconstruct_csv(configure(tmp_path, videos, ["c.mp4"], image_size=0, crop=False))
    assert [(r.frames, r.height, r.width) for r in report.results] == [(9, 48, 64)]
    report = reconstruct_csv(configure(tmp_path, videos, ["c.mp4"], image_size=0, frame_stride=4))
    assert [(r.frames, r.height, r.width) for r in report.results] == [(3, 48, 48)]
    assert open_video(tmp_path / "out" / "original" / "c.mp4").fps == 2.5


def test_a_model_meets_one_batch_shape_per_clip_shape(tmp_path, videos, models):
    names = ["a/x.mp4", "still.png", "b/x.mp4", "c.mp4"]
    reconstruct_csv(configure(tmp_path, videos, names, batch_size=2, save_videos=False))
    assert models["tae.ckpt"].shapes.count((2, 3, 9, 32, 32)) == 2  # the second filled up from one clip
    assert models["tae.ckpt"].shapes.count((1, 3, 1, 32, 32)) == 1
    assert not (tmp_path / "out" / "original").exists()


def test_batches_hold_one_shape_each_and_few_clips_wait():
    shapes = [RNG.integers(1, 9) for _ in range(60)]
    clips = [Clip(i, np.empty((3, shape, 1, 1)), 1.0, False) for i, shape in enumerate(shapes)]
    drawn, sizes, out = 0, {}, []

    def draw():
        nonlocal drawn
        for one in clips:
            drawn += 1
            yield one

    for batch, size in group_by_shape(draw(), 3):
        (shape,) = {one.x.shape for one in batch}
        out += [one.index for one in batch]
        assert len(batch) <= size == sizes.setdefault(shape, size) <= 3
        assert drawn - len(out) < 12
    assert sorted(out) == list(range(60))


def test_scores_are_those_of_the_float_reconstruction(videos):
    x = np.full((3, 2, 16, 16), 0.25, np.float32)
    assert score(x, x + 0.02)[0] == pytest.approx(40, abs=1e-3)  # 0.02 of [-1, 1] is 0.01 of [0, 1]
    assert score(x, x) == (100, pytest.approx(1))
    with pytest.raises(ValueError, match="not finite"):
        score(x, x * np.nan)


def test_a_reconstruction_that_is_not_finite_is_an_error_row(tmp_path, videos, models):
    models["tae.ckpt"] = Offset(np.nan)
    report = reconstruct_csv(configure(tmp_path, videos, ["c.mp4"]))
    assert "not finite" in report.results[0].error and report.means() == {}
    assert read_metrics(tmp_path)[1]["mean"] == {}


def test_a_loss_that_is_not_finite_is_an_error_row(tmp_path, videos, models):
    models["tae.ckpt"] = Offset(np.inf)
    report = reconstruct_csv(configure(tmp_path, videos, ["c.mp4"], loss=LossConfig(perceptual_weight=0)))
    assert "the loss is not finite" in report.results[0].error
    rows, summary = read_metrics(tmp_path)
    assert rows[0]["psnr"] == rows[0]["loss"] == "" and summary["loss"] == {}


def test_the_mean_is_decoded_unless_a_sample_is_requested(tmp_path, videos):
    x, model = np.zeros((1, 3, 2, 17, 16), np.float32), Offset(0.1)
    assert reconstruct(model, x)[0].max() == pytest.approx(0.1)
    config = configure(tmp_path, videos, [])
    assert noise_for(model, x, ["a.mp4"], config) is None
    noise = noise_for(model, x, ["a.mp4"], replace(config, sample_posterior=True))
    sampled, _ = reconstruct(model, x, noise)
    assert sampled.shape == x.shape and sampled.max() == pytest.approx(0.6)
    model.geometry = replace(model.geometry, has_posterior=False)  # then there is nothing to sample
    assert noise_for(model, x, ["a.mp4"], replace(config, sample_posterior=True)) is None


def test_clips_are_reconstructed_in_tiles_if_the_model_has_them():
    model, x = TwoConvs({}), RNG.uniform(-1, 1, (1, 3, 4, 16, 32)).astype(np.float32)
    whole, _ = reconstruct(model, x)
    model.enable_tiling(encode_tile=2, decode_tile=2, decode_overlap=0, spatial_tile=16, spatial_overlap=0)
    tiled, _ = reconstruct(model, x)
    assert np.array_equal(tiled, model(Tensor(x)).asnumpy())
    assert np.abs(tiled - whole).max() > 1e-3


def test_a_sample_depends_only_on_the_seed_and_the_name(tmp_path, videos):
    TwoConvs({}).save_weights(tmp_path / "w.ckpt")

    def scores(names, **options):
        config = configure(tmp_path, videos, names, num_frames=5, save_videos=False, compare=[str(tmp_path / "w.ckpt")])
        config = replace(config, model=ModelSection(str(tmp_path / "w.ckpt")), sample_posterior=True, **options)
        found = {result.name: list(result.scores.values()) for result in reconstruct_csv(config).results}
        config = StatisticsConfig(**{each.name: getattr(config, each.name) for each in fields(ClipsConfig)})
        statistics = measure(load_model(config), read_index(config.csv_path, config.video_folder), config)
        return found, statistics.channels.std

    names = ["a/x.mp4", "still.png", "b/x.mp4", "c.mp4"]
    wanted, deviation = scores(names)
    assert wanted["a/x.mp4"][0] != wanted["b/x.mp4"][0]  # two names of one picture
    for order, batch_size in ((names, 2), (names[::-1], 3), (["c.mp4"], 1)):
        found, again = scores(order, batch_size=batch_size)
        for name in order:
            np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5)
            np.testing.assert_allclose(found[name][0], found[name][1], rtol=1e-5)  # the compared one, of those weights
        if len(order) == len(names):
            np.testing.assert_allclose(again, deviation, rtol=1e-5)
    assert scores(["c.mp4"], seed=7)[0]["c.mp4"] != wanted["c.mp4"]


def test_scores_are_of_the_clipped_reconstruction_and_losses_of_the_whole_from_one_pass(tmp_path, videos, models):
    models["tae.ckpt"] = Offset(3)
    loss = LossConfig(perceptual_weight=0, kl_weight=0.5)
    options = dict(num_frames=5, batch_size=2, save_videos=False)
    report = reconstruct_csv(configure(tmp_path, videos, ["a/x.mp4", "broken.mp4", "c.mp4"], loss=loss, **options))
    assert models["tae.ckpt"].shapes == [(2, 3, 5, 32, 32)]
    rows, summary = read_metrics(tmp_path)
    x = np.stack(
        [load_clip(videos / name, configure(tmp_path, videos, [], **options))[0] for name in ("a/x.mp4", "c.mp4")]
    )
    kl = 0.5 * (x**2).sum((1, 2, 3, 4)) / 5
    for row, clip, divergence in zip((rows[0], rows[2]), x, kl):
        assert float(row["psnr"]) == pytest.approx(score(clip, np.ones_like(clip))[0], abs=1e-4)
        assert float(row["loss_l1"]) == pytest.approx(3, rel=1e-5)
        assert float(row["loss_pixel"]) == pytest.approx(3 * 3 * 32 * 32, rel=1e-5)
        assert float(row["loss_kl"]) == pytest.approx(divergence, rel=1e-5)
        assert float(row["loss"]) == pytest.approx(3 * 3 * 32 * 32 + 0.5 * divergence, rel=1e-5)
    assert rows[1]["loss"] == rows[1]["loss_kl"] == ""
    assert summary["loss"]["kl"] == pytest.approx(kl.mean(), rel=1e-5)
    assert f"mean kl: {summary['loss']['kl']:.6g}" in format_table(report)


def test_without_a_loss_nothing_of_it_is_written(tmp_path, videos, models):
    report = reconstruct_csv(configure(tmp_path, videos, ["c.mp4"], save_videos=False))
    rows, summary = read_metrics(tmp_path)
    assert list(rows[0]) == ["name", "output", "status", "frames", "height", "width", "psnr", "ssim", "tiles", "error"]
    assert "loss" not in summary and "loss" not in format_table(report)


def test_folders_may_be_next_to_the_output_folder(tmp_path, videos, models):
    reconstruct_csv(configure(tmp_path, videos, ["c.mp4", "still.png"], separate_folders=True))
    for folder in ("out_ori", "out_rec", "out/side_by_side"):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == ["c.mp4", "still.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["metrics.csv", "metrics.json", "side_by_side"]
    assert not (tmp_path / "out_spatial").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(spatial=True), "spatial is true, but offset has no spatial half"),
        (
            dict(loss=LossConfig(perceptual_weight=0, latent_weight=1)),
            "loss.latent_weight .* offset has only one stage",
        ),
        (dict(loss=LossConfig(lpips_weights="nowhere.safetensors")), "nowhere.safetensors"),
    ],
)
def test_what_a_model_cannot_do_is_named_before_anything_is_written(tmp_path, videos, models, options, message):
    with pytest.raises(ValueError, match=message):
        reconstruct_csv(configure(tmp_path, videos, ["c.mp4"], separate_folders=True, **options))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.csv", "videos"]


def test_tiles_are_set_on_every_model_only_where_they_are_enabled(tmp_path, videos, models):
    reconstruct_csv(configure(tmp_path, videos, ["c.mp4"], compare="bad.ckpt", save_videos=False))
    assert [model.tiling for model in models.values()] == [None, None]
    options = dict(compare="bad.ckpt", save_videos=False)
    tiles = TileFields(spatial_tile=64, last="short")
    reconstruct_csv(configure(tmp_path, videos, ["c.mp4"], enable_tile=True, tiling=tiles, **options))
    assert [model.tiling for model in models.values()] == [TilingConfig(spatial_tile=64, last="short")] * 2
    for sizes, tiling in [
        (dict(use_spatial_tiling=True), TilingConfig(0, 0, 0, 0, 256, 64, "short")),
        (dict(use_temporal_tiling=True, temporal_tile_size=64), TilingConfig(64, 16, 64, 16, 0, 0, "short")),
        (
            dict(use_spatial_tiling=True, use_temporal_tiling=True, spatial_tile_size=64, tile_overlap_factor=0.5),
            TilingConfig(32, 16, 32, 16, 64, 32, "short"),
        ),
    ]:
        reconstruct_csv(configure(tmp_path, videos, ["c.mp4"], model=sizes, **options))
        assert [model.tiling for model in models.values()] == [tiling] * 2


def test_fast_videos_are_thinned_and_play_at_the_speed_that_they_had(tmp_path, videos, models):
    for limits, frames, fps in [(dict(fps_max=9), 5, 5), (dict(fps_max=9, frame_stride=2), 3, 2.5), ({}, 9, 10)]:
        report = reconstruct_csv(configure(tmp_path, videos, ["c.mp4"], **limits))
        written = open_video(tmp_path / "out" / "original" / "c.mp4")
        assert (report.results[0].frames, written.num_frames, written.fps) == (frames, frames, fps)
    report = reconstruct_csv(configure(tmp_path, videos, ["c.mp4"], fps_max=4, num_frames=4))
    assert "the video has 9 frames; 10 are needed" in report.results[0].error


def test_columns_are_side_by_side_under_labels():
    left, right = (np.full((2, 16, 40, 3), value, np.uint8) for value in (10, 20))
    shown = side_by_side({"original": left, "a long label": right})
    assert shown.shape == (2, 16 + LABEL_HEIGHT, 80, 3)
    labels, frames = np.split(shown, [LABEL_HEIGHT], axis=1)
    assert set(np.unique(frames[:, :, :40])) == {10} and set(np.unique(frames[:, :, 40:])) == {20}
    assert labels[:, :, :40].max() > 200 and labels[:, :, 40:].max() > 200


def test_names_from_the_index_become_file_names_of_their_own():
    names = ["a/x.mp4", "a_x.mp4", "A/x.avi", "x.y.mp4", "/abs/x.mp4", "a/x.mp4"]
    assert output_names(names) == ["a_x", "a_x_2", "A_x_3", "x.y", "abs_x", "a_x_4"]


def test_a_report_without_any_success_still_has_a_table():
    report = Report(["reconstruction"], [Result("a.mp4", "a", error="no such file")])
    assert "failed: a.mp4: no such file" in format_table(report)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(batch_size=0), "batch_size is 0; it must be at least 1"),
        (dict(num_frames=0), "num_frames is 0; it must be at least 1"),
        (dict(image_size=8), "image_size is 8; it must be at least 11, or 0"),
        (dict(fps=0.0), "fps is 0.0; it must be positive"),
        (dict(fps_max=-1.0), "fps_max is -1.0; it must be above 0"),
        (dict(enable_tile=True), "enable_tile and model.use_spatial_tiling"),
    ],
)
def test_settings_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        InferenceConfig(ModelSection("tae.ckpt", use_temporal_tiling=True), "index.csv", **options)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*/inference/*.yaml")), ids=lambda p: p.stem)
def test_the_shipped_configurations_are_valid(path):
    config = parse_config(InferenceConfig, "", ["--config", str(path), "--ckpt_path", "x", "--data_path", "index.csv"])
    assert (config.model.from_pretrained, config.csv_path) == ("x", "index.csv")
    if config.enable_tile is True:
        replace(create_model(config.model.name, **TINY).default_tiling, **config.tiling.given()).encode_axes(8, 8)


def test_the_names_of_the_specifications_are_all_understood(tmp_path):
    file = tmp_path / "dc_ae.yaml"
    file.write_text("save_dir: ./samples\nmodel: {use_spatial_tiling: true}\ndataset: {data_path: a.csv}")
    arguments = ["--config", str(file), "--model.from_pretrained", "x.safetensors"]
    config = parse_config(InferenceConfig, "", arguments)
    assert (config.output_path, config.csv_path, config.model.use_spatial_tiling) == ("./samples", "a.csv", True)
    for name in ("--save-dir", "--save_dir", "--output_path"):
        assert parse_config(InferenceConfig, "", [*arguments, name, "samples/dcae"]).output_path == "samples/dcae"
    assert parse_config(InferenceConfig, "", [*arguments, "--dataset.data_path", "b.csv"]).csv_path == "b.csv"


def test_every_option_has_a_help_text(capsys):
    with pytest.raises(SystemExit):
        parse_config(InferenceConfig, "", ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in ("model.from_pretrained", "model.use_spatial_tiling", "csv_path", "tiling.encode_tile", "fps"):
        after = text.split(f"--{name} ", 1)[1].split(maxsplit=1)[1]  # past the placeholder
        assert after[0].islower() or after.startswith("CSV"), (name, after[:40])
    assert "Also --ckpt_path, --ckpt-path." in text and "Also --save_dir, --save-dir." in text


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "tae.ckpt"
    create_model("tae", **TINY).save_weights(path)
    return path


def test_the_command_of_the_specification_reconstructs_with_a_real_model(tmp_path, videos, checkpoint):
    index = write_index(tmp_path, ["a/x.mp4", "broken.mp4", "b/x.mp4"])
    command = (
        f"{sys.executable} scripts/inference_vae.py --ckpt_path {checkpoint} --batch_size 2 --num_frames=9 "
        f"--image_size 32 --csv_path {index} --video_folder {videos} --enable_tile=False "
        f"--output_path {tmp_path / 'out'} --baseline True"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command.split(), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr  # one of them failed
    assert "2 of 3 clips reconstructed" in done.stdout and "failed: broken.mp4" in done.stdout
    rows, summary = read_metrics(tmp_path)
    assert [row["status"] for row in rows] == ["ok", "error", "ok"]
    assert float(rows[0]["psnr_baseline"]) > float(rows[0]["psnr"]) > 0  # the model is untrained
    assert list(summary["mean"]) == ["reconstruction", "baseline"]


@pytest.mark.full
def test_tiled_inference_with_a_real_model_keeps_every_frame_and_pixel(tmp_path, videos, checkpoint, monkeypatch):
    index = write_index(tmp_path, ["c.mp4", "still.png"])
    tiles = {"encode_tile": 8, "decode_tile": 16, "decode_overlap": 8, "spatial_tile": 32, "spatial_overlap": 16}
    code = run_here(
        monkeypatch,
        "scripts/inference_vae.py",
        *("--ckpt_path", checkpoint, "--csv_path", index, "--video_folder", videos, "--output_path", tmp_path / "out"),
        *("--image_size", 0, "--crop", "False", "--enable_tile"),
        *(f"--tiling.{name}={value}" for name, value in tiles.items()),
    )
    assert code == 0
    reader = open_video(tmp_path / "out" / "reconstruction" / "c.mp4")
    assert (reader.num_frames, reader.height, reader.width) == (9, 48, 64)
    assert read_image(tmp_path / "out" / "reconstruction" / "still.png").shape == (50, 40, 3)


def test_the_command_ends_with_1_if_no_clip_worked(tmp_path, videos, checkpoint, monkeypatch, capsys):
    index = write_index(tmp_path, ["broken.mp4", "missing.mp4"])
    arguments = ["--ckpt_path", checkpoint, "--csv_path", index, "--video_folder", videos]
    assert run_here(monkeypatch, "scripts/inference_vae.py", *arguments, "--output_path", tmp_path / "out") == 1
    assert "0 of 2 clips reconstructed" in capsys.readouterr().out
    assert len(read_metrics(tmp_path)[0]) == 2


@pytest.mark.parametrize(
    "options, message",
    [
        (["--ckpt_path", "nowhere/tae.ckpt"], "nowhere/tae.ckpt"),
        (["--csv_path", "nowhere.csv"], "nowhere.csv: no such CSV file"),
        (["--video_folder", "nowhere"], "nowhere: no such video folder"),
        (["--model.name", "tea"], "no model 'tea'"),
        (["--model", "tea"], "model is 'tea'; it must be a section"),
        (["--model.dtype", "int8"], "model.dtype is 'int8'; it must be one of fp32, fp16, bf16"),
        (["--enable_tile=True", "--tiling.decode_tile=12"], "decode_tile is 12"),
        (["--number_frames=16"], "did you mean 'num_frames'"),
        (["--model.config", "{ch: 64}"], "tae.ckpt"),
        (["--model.use_temporal_tiling", "--model.temporal_tile_size=12"], "temporal_tile_size is 12"),
    ],
)
def test_a_users_mistake_is_one_line_and_code_2(tmp_path, videos, checkpoint, monkeypatch, capsys, options, message):
    index = write_index(tmp_path, ["c.mp4"])
    arguments = ["--ckpt_path", checkpoint, "--csv_path", index, "--video_folder", videos]
    arguments += ["--output_path", tmp_path / "out", *options]
    assert run_here(monkeypatch, "scripts/inference_vae.py", *arguments) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert not (tmp_path / "out").exists()
