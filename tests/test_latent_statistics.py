"""Latent statistics: exact over clips of any shape and order, and a model folder whose latents have unit variance."""

import itertools
import json

import mindspore as ms
import numpy as np
import pytest
from commands import run_here
from tiny_models import DC_AE
from tiny_models import SMALL_TEMPORAL_VAE as TEMPORAL_VAE

from mg.data.clips import load_clip
from mg.data.index import read_index
from mg.data.video import write_image, write_video
from mg.inference.loading import ModelSection
from mg.inference.statistics import Moments, StatisticsConfig, measure_csv, scaling
from mg.models import create_model, from_pretrained

TAE = {"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "z_channels": 4}
RNG = np.random.default_rng(0)


def test_moments_of_two_clips_of_different_sizes_by_hand():
    first = np.array([[[[[1.0, 3.0]]], [[[0.0, 0.0]]]]])  # (1, 2, 1, 1, 2)
    second = np.array([[[[[8.0]]], [[[6.0]]]]])  # (1, 2, 1, 1, 1)
    moments = Moments.of(first) + Moments.of(second)
    assert moments.count == 3
    np.testing.assert_allclose(moments.mean, [4, 2], rtol=1e-15)
    np.testing.assert_allclose(moments.std, [np.sqrt(26 / 3), np.sqrt(8)], rtol=1e-15)
    overall = moments.over_channels()
    assert (overall.count, overall.mean, overall.std**2) == (6, 3, pytest.approx(28 / 3, rel=1e-15))


def test_moments_are_exact_far_from_zero_and_in_any_order():
    clips = [RNG.normal(1e6, [[[[[1e-2]]], [[[1.0]]]]], (1, 2, t, 3, 4)) for t in (1, 2, 5, 7)]
    joined = np.concatenate(clips, axis=2)
    for order in itertools.permutations(clips):
        moments = Moments.of(order[0])
        for clip in order[1:]:
            moments += Moments.of(clip)
        np.testing.assert_allclose(moments.mean, joined.mean((0, 2, 3, 4)), rtol=1e-14)
        np.testing.assert_allclose(moments.std, joined.std((0, 2, 3, 4)), rtol=1e-6)
        np.testing.assert_allclose(moments.over_channels().std, joined.std(), rtol=1e-6)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """An index of two clips of different sizes, an image and a file that is none of these."""
    folder = tmp_path_factory.mktemp("clips")
    t, y, x = np.meshgrid(np.arange(4), np.arange(32), np.arange(64), indexing="ij")
    frames = np.stack([128 + 90 * np.sin((x + 2 * t) / 9 + c) * np.cos(y / 11 - c) for c in range(3)], axis=-1)
    frames = frames.astype(np.uint8)
    write_video(folder / "wide.mp4", frames, fps=8)
    write_video(folder / "square.mp4", frames[:, :, 32:], fps=8)
    write_image(folder / "still.png", frames[0, :, 16:48])
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "index.csv").write_text("video\nwide.mp4\nbroken.mp4\nsquare.mp4\nbroken.mp4\nstill.png\n")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "dc_ae.ckpt"
    create_model("dc_ae", **DC_AE).save_weights(path)
    return path


def configure(clips, path, output, **options):
    return StatisticsConfig(
        ModelSection(str(path)), str(clips / "index.csv"), output_path=str(output), image_size=0, crop=False, **options
    )


def videos(clips, config) -> list[ms.Tensor]:
    rows = [row for row in read_index(clips / "index.csv") if "broken" not in row.name]
    return [ms.Tensor(load_clip(row.path, config)[0][None]) for row in rows]


def latents(model, videos) -> np.ndarray:
    """All latents of the videos, (C, N)."""
    means = [model.encode(x).mean.asnumpy() for x in videos]
    return np.concatenate([mean.transpose(1, 0, 2, 3, 4).reshape(mean.shape[1], -1) for mean in means], axis=1)


def test_the_folder_holds_a_model_whose_latents_have_unit_variance(clips, checkpoint, tmp_path):
    config = configure(clips, checkpoint, tmp_path / "scaled", batch_size=2)
    statistics, factors = measure_csv(config)
    assert statistics.clips == 3 and [name for name, _ in statistics.failures] == ["broken.mp4"] * 2
    plain, scaled = from_pretrained(checkpoint), from_pretrained(tmp_path / "scaled")
    x = videos(clips, config)
    z = latents(plain, x).astype(np.float64)
    assert z.shape == (16, 2 + 1 + 1)
    np.testing.assert_allclose(statistics.channels.mean, z.mean(1), atol=1e-6 * z.std())
    np.testing.assert_allclose(statistics.channels.std, z.std(1), atol=1e-6 * z.std())
    assert factors == {"scaling_factor": pytest.approx(z.std(), rel=1e-6)}
    assert latents(scaled, x).std() == pytest.approx(1, rel=1e-5)
    for video in x:  # decode undoes what encode did
        np.testing.assert_allclose(scaled(video).asnumpy(), plain(video).asnumpy(), atol=1e-4)

    described = json.loads((tmp_path / "scaled" / "latent_statistics.json").read_text())
    assert described["channel_std"] == statistics.channels.std.tolist()
    assert described["scaling_factor"] == described["std"] == scaled.config["scaling_factor"]
    assert (described["clips"], described["failed"], described["values_per_channel"]) == (3, 2, 4)
    assert described["replaced"] == {"scaling_factor": None} and described["checkpoint"] == str(checkpoint)
    assert described["failures"][0]["name"] == "broken.mp4" and described["failures"][0]["error"]
    assert "encode divides" in described["meaning"]

    again, _ = measure_csv(configure(clips, tmp_path / "scaled", tmp_path / "again"))  # of the latents without it
    np.testing.assert_allclose(again.channels.std, statistics.channels.std, rtol=1e-4)
    described = json.loads((tmp_path / "again" / "latent_statistics.json").read_text())
    assert described["replaced"] == factors


def test_if_the_caller_scales_the_factors_are_the_inverse_deviation_and_the_mean(clips, tmp_path):
    create_model("tae", **TAE).save_pretrained(tmp_path / "tae")
    config = configure(clips, tmp_path / "tae", tmp_path / "scaled")
    _, factors = measure_csv(config)
    model = from_pretrained(tmp_path / "scaled")
    assert {key: model.config[key] for key in factors} == factors
    z = (latents(model, videos(clips, config)) - factors["shift_factor"]) * factors["scaling_factor"]
    assert (z.mean(), z.std()) == (pytest.approx(0, abs=1e-4), pytest.approx(1, rel=1e-4))
    described = json.loads((tmp_path / "scaled" / "latent_statistics.json").read_text())
    assert described["meaning"].startswith("for the caller") and described["replaced"]["scaling_factor"] == 1.5305


def test_factors_per_channel_bring_each_channel_to_mean_0_and_deviation_1(clips, tmp_path, monkeypatch, capsys):
    create_model("temporal_vae", **TEMPORAL_VAE).save_pretrained(tmp_path / "vae")
    arguments = ["--ckpt_path", tmp_path / "vae", "--csv_path", clips / "index.csv", "--save_dir", tmp_path / "scaled"]
    assert run_here(monkeypatch, "tools/latent_statistics.py", *arguments, "--image_size", 0, "--crop", "False") == 1
    model, plain = from_pretrained(tmp_path / "scaled"), from_pretrained(tmp_path / "vae")
    assert len(model.config["shift"]) == len(model.config["scale"]) == 4
    x = videos(clips, configure(clips, tmp_path / "vae", tmp_path))
    z = latents(model, x)
    np.testing.assert_allclose(z.mean(1), 0, atol=1e-4)
    np.testing.assert_allclose(z.std(1), 1, rtol=1e-4)
    unscaled = np.concatenate([plain.latents(video)["mean"].asnumpy().reshape(4, -1) for video in x], axis=1)
    np.testing.assert_allclose(model.config["shift"], unscaled.mean(1), atol=1e-5)
    for video in x:  # decode undoes what encode did
        z, frames = model.encode(video).mean, video.shape[2]
        expected = plain.decode(plain.encode(video).mean, frames).asnumpy()
        np.testing.assert_allclose(model.decode(z, frames).asnumpy(), expected, atol=1e-4)

    described = json.loads((tmp_path / "scaled" / "latent_statistics.json").read_text())
    assert described["shift"] == described["channel_mean"] and described["scale"] == described["channel_std"]
    assert described["replaced"] == {key: plain.config[key] for key in ("shift", "scale")}
    said = capsys.readouterr().out
    assert "shift " + " ".join(f"{value:.6g}" for value in described["shift"]) in said


def test_the_tool_says_what_it_measured(clips, checkpoint, tmp_path, monkeypatch, capsys):
    arguments = ["--ckpt_path", checkpoint, "--data_path", clips / "index.csv", "--save_dir", tmp_path / "out"]
    assert run_here(monkeypatch, "tools/latent_statistics.py", *arguments, "--image_size", 32) == 1
    said = capsys.readouterr().out
    described = json.loads((tmp_path / "out" / "latent_statistics.json").read_text())
    assert "3 of 5 clips measured" in said and said.count("failed: broken.mp4") == 2
    assert f"scaling_factor {described['scaling_factor']:.6g}" in said and f"mean {described['mean']:.6g}" in said


def test_nothing_is_written_if_every_clip_fails(clips, checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "index.csv").write_text("video\nnone.mp4\n")
    arguments = ["--ckpt_path", checkpoint, "--csv_path", tmp_path / "index.csv", "--output_path", tmp_path / "out"]
    assert run_here(monkeypatch, "tools/latent_statistics.py", *arguments) == 1
    assert "0 of 1 clips measured" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_the_checkpoints_own_folder_is_refused(clips, checkpoint):
    with pytest.raises(ValueError, match="where the checkpoint is;"):
        measure_csv(configure(clips, checkpoint, checkpoint.parent))


def test_equal_latents_have_no_factor():
    with pytest.raises(ValueError, match=r"all latents are 2.0: no factor"):
        scaling(None, Moments.of(np.full((1, 2, 1, 1, 3), 2.0)))


def test_a_channel_that_never_changes_keeps_its_scale():
    z = np.array([[[[[1.0, 1.0]]], [[[0.0, 4.0]]]]])  # (1, 2, 1, 1, 2)
    assert scaling(create_model("temporal_vae", **TEMPORAL_VAE), Moments.of(z)) == {"shift": [1, 2], "scale": [1, 2]}
