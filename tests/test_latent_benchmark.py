"""How well a denoiser learns on several autoencoders' latents: one network for all, continued runs, failures."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import run_here
from tiny_models import randomized
from tiny_text import t5_folder
from training_runs import Stop, write_data

from mg import runtime
from mg.config import parse_config
from mg.generation import latent_learning
from mg.generation.latent_benchmark import format_results, run_latent_benchmark
from mg.generation.latent_learning import LatentBenchmarkConfig
from mg.generation.samples import read_rows
from mg.latents import open_latents
from mg.models import create_model
from mg.text.store import EncodeTextConfig, TextEncoderConfig, encode_texts

# Of two levels: 2x2x2 and 1x2x2.
TAE = dict(ch=8, ch_mult=[1, 1], num_res_blocks=1, z_channels=4, norm_num_groups=4, temporal_downsample_level=[0])
IMAGE_VAE = dict(ch=8, ch_mult=[1, 1], num_res_blocks=1, z_channels=4, norm_num_groups=4)
TINY = "--denoiser.depth 1 --denoiser.hidden_size 24 --denoiser.num_heads 2 --batch_size 2 --max_steps 2".split()
TINY += "--bands 2 --validation_clips 2 --samples 1 --num_sampling_steps 1 --num_frames 4 --image_size 8".split()
TINY += "--device cpu --mode pynative".split()


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """A picture takes longer than the updates that it is of."""
    monkeypatch.setattr("mg.training.logs.draw_curve", lambda *_: None)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Three videos, two autoencoders, and a broken weight file."""
    runtime.setup("cpu", "pynative")
    folder = tmp_path_factory.mktemp("place")
    write_data(folder, videos=3, frames=4)
    (folder / "train.csv").write_text("video\n" + "".join(f"{number}.mp4\n" for number in range(3)))
    randomized(create_model("tae", **TAE, temporal_upsample_level=[1])).save_pretrained(folder / "tae")
    randomized(create_model("image_vae", **IMAGE_VAE)).save_pretrained(folder / "image")
    (folder / "broken.safetensors").write_text("no weights")
    return folder


def config(place: Path, *more: object, models: tuple = ("image", "tae")) -> LatentBenchmarkConfig:
    clips = ["--csv_path", place / "train.csv", "--test_csv_path", place / "train.csv"]
    clips += ["--video_folder", place / "videos", "--test_video_folder", place / "videos"]
    clips += ["--models", *(place / model for model in models), "--output_path", place / "out"]
    return parse_config(LatentBenchmarkConfig, "", [*map(str, clips), *TINY, *map(str, more)])


@pytest.fixture(scope="module")
def found(place):
    """A run of an image VAE, a file without weights and a TAE."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mg.training.logs.draw_curve", lambda *_: None)
        return run_latent_benchmark(config(place, models=("image", "broken.safetensors", "tae")))


def test_all_are_learnt_by_the_same_network_whose_tokens_stand_for_the_same_pixels(place, found):
    image, tae = found.results["image"], found.results["tae"]
    assert (image["latents"], image["patch"]) == ("4x4x4x4", "2x1x1")
    assert (tae["latents"], tae["patch"]) == ("4x2x4x4", "1x1x1")
    assert image["tokens"] == tae["tokens"] == "2x4x4" and image["compression"] * 2 == tae["compression"] == 6
    assert image["values_per_pixel"] == 4 / 4 and tae["updates"] == image["updates"] == 2
    for result in (image, tae):
        assert [step for step, _ in result["validation"]] == [0, 1, 2]
        assert result["share"] == result["loss"] / result["baseline"] and list(result["bands"]) == ["0-0.5", "0.5-1"]
        (sample,) = result["samples"]
        assert (place / "out" / sample).is_file()
    folders = [place / "out/models" / label / "2x4x4/run" for label in ("image", "tae")]
    runs = [json.loads((folder / "config.json").read_text()) for folder in folders]
    differing = {key for key in runs[0] if runs[0][key] != runs[1][key]}
    assert differing == {"output_path", "latents_path", "model", "validation"}


def test_latents_are_brought_to_unit_variance(place, found):
    folder = open_latents(place / "out/models/tae/train")
    factors = folder.settings["scaling"]["factors"]
    z = np.stack([latents.read() for latents in folder.values()])
    scaled = (z - factors["shift_factor"]) * factors["scaling_factor"]
    assert abs(scaled.mean()) < 1e-3 and scaled.std() == pytest.approx(1, abs=1e-3)


def test_a_model_that_fails_costs_its_row(place, found):
    assert not found.complete and "error" in found.results["broken"]
    rows = list(csv.DictReader((place / "out/results.csv").open()))
    assert [(row["model"], row["status"]) for row in rows] == [
        ("image", "ok"), ("broken", "error"), ("tae", "ok")
    ]  # fmt: skip
    assert rows[1]["error"] == found.results["broken"]["error"] and float(rows[2]["0.5-1"]) > 0
    report = found.report.read_text()
    assert report.count("<video") == 2 and report.count('<svg class="plot"') == 4 and rows[1]["error"][:20] in report
    text = format_results(found.results).splitlines()
    assert text[-1].startswith("failed: broken: ") and text[2].startswith("tae  ")


def test_finished_work_is_not_repeated(place, found, monkeypatch):
    def train(*_):
        raise Stop

    monkeypatch.setattr(latent_learning, "train", train)
    monkeypatch.setattr(latent_learning, "measure_csv", train)
    again = run_latent_benchmark(config(place))
    assert again.complete and again.results == {label: found.results[label] for label in again.results}
    with pytest.raises(ValueError, match=r"settings.json: the results there .* training.seed was 42 and is 7 now"):
        run_latent_benchmark(config(place, "--seed=7"))


@pytest.mark.full
def test_a_killed_run_ends_like_an_uninterrupted_one(place, found, tmp_path, monkeypatch):
    def generate(*_):
        raise KeyboardInterrupt

    settings = replace(config(place, models=("tae",)), tokens=[2, 4, 4], output_path=str(tmp_path))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(latent_learning, "generate", generate)
        run_latent_benchmark(settings)
    ours, theirs = run_latent_benchmark(settings).results["tae"], found.results["tae"]
    assert {**ours, "samples": 0} == {**theirs, "samples": 0}
    wanted = (place / "out" / theirs["samples"][0]).read_bytes()
    assert (tmp_path / ours["samples"][0]).read_bytes() == wanted


@pytest.mark.full
def test_captions_reach_a_network_that_uses_them(place, tmp_path):
    rows = "".join(f"{number}.mp4,a cat {number}\n" for number in range(3))
    (place / "captions.csv").write_text("video,caption\n" + rows)
    encoder = TextEncoderConfig(str(t5_folder(tmp_path / "t5")), "t5", 4)
    stored = {"csv_path": str(place / "captions.csv"), "output_path": str(tmp_path / "embeddings")}
    encode_texts(EncodeTextConfig(encoder, device="cpu", mode="pynative", **stored))
    clips = ["--csv_path", place / "captions.csv", "--test_csv_path", place / "captions.csv", "--samples=2"]
    network = ["--denoiser.type=STDiT3-XL/2", f"--text_encoder.embeddings={tmp_path / 'embeddings'}"]
    settings = config(place, *clips, *network, f"--output_path={tmp_path / 'out'}", models=("tae",))
    result = run_latent_benchmark(settings).results["tae"]
    prompts = [row.prompt for row in read_rows(tmp_path / "out/models/tae/2x4x4/samples").values()]
    assert prompts == ["a cat 0", "a cat 1"] and len(result["samples"]) == 2 and not result["failed_samples"]


@pytest.mark.parametrize("wrong, message", [
    (["--denoiser.type=STDiT3-XL/2"], "denoiser.type is STDiT3-XL/2, which needs captions; give text_encoder.embedd"),
    (["--crop=false"], "crop is False; it must be true, with num_frames and image_size: all clips have one size"),
    (["--denoiser.patch_size", "1", "2", "2"], "patch_size is [1, 2, 2]; it must be null: it follows from the latents"),
    (["--tokens", "2", "2"], "tokens is [2, 2]; it must be three numbers, along frames, rows and columns"),
    (["--max_steps=0"], "max_steps is 0; it must be at least 1"),
])  # fmt: skip
def test_settings_that_cannot_be_compared_are_one_line(place, wrong, message):
    with pytest.raises(ValueError) as error:
        config(place, *wrong)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_the_command_names_a_missing_model(place, monkeypatch, capsys):
    clips = ["--csv_path", place / "train.csv", "--test_csv_path", place / "train.csv"]
    assert run_here(monkeypatch, "scripts/benchmark_latents.py", *clips, "--models", place / "none") == 2
    assert "none: no such file or folder" in capsys.readouterr().err
