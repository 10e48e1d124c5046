"""The Open-Sora 1.2 VAE trains as its three recipes say: by which losses, which half, at any length with few graphs."""

import json
import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from mindspore.common import api
from tiny_models import SMALL_TEMPORAL_VAE
from training_runs import read_records, write_data

from mg import runtime
from mg.checkpoints import read_state_dict, write_state_dict
from mg.data.index import IndexRow
from mg.data.loader import ClipLoader, DataConfig
from mg.losses.reconstruction import AutoencoderLoss, LossConfig
from mg.models import create_model
from mg.training.optim import OptimConfig
from mg.training.step import TrainStep

ROOT = Path(__file__).parents[1]
TINY = {
    **SMALL_TEMPORAL_VAE,
    "spatial_block_out_channels": [8, 8],
    "filters": 8,
    "norm_num_groups": 4,  # of two channels: a bias before a norm of one alone would never move
    "micro_batch_size": None,
}
LATENTS = dict(pixel_weight=0, kl_weight=0, latent_weight=1.0)
PIXELS = dict(perceptual_weight=0, kl_weight=0.1, kl_per_clip=True)


def make(mode: str = "pynative", loss: dict = LATENTS, **config):
    """A tiny model whose branches are not silent, and its training step; the same ones every time."""
    runtime.setup("cpu", mode, seed=0)
    model = create_model("temporal_vae", **{**TINY, **config})
    rng = np.random.default_rng(0)
    for parameter in model.trainable_params():
        noise = 0.1 * rng.standard_normal(parameter.shape)
        parameter.set_data(Tensor((parameter.asnumpy() + noise).astype(np.float32)))
    return model, TrainStep(model, AutoencoderLoss(LossConfig(**loss)), OptimConfig(lr=1e-3), 100)


def clip(model, frames: int, size: int = 8):
    """A video and noise for its latents."""
    rng = np.random.default_rng(frames)
    x = rng.uniform(-1, 1, (1, 3, frames, size, size)).astype(np.float32)
    return x, rng.standard_normal(model.latent_shape(x.shape), dtype=np.float32)


def gradients(model, step, x, noise, valid=None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The loss with its terms, and the gradient of every parameter."""
    step.accumulate(x, noise, None, valid)
    ((_, report),) = step._reports
    step._reports = []
    found = step.updater.gathered()
    step.updater.forget()
    return report.asnumpy(), found


def largest(gradients: dict[str, np.ndarray], part: str) -> float:
    return max(np.abs(value).max() for name, value in gradients.items() if name.startswith(f"{part}."))


# Losses.


def test_an_aligned_clip_has_the_loss_and_gradients_of_the_clip_itself():
    model, step = make(loss={**PIXELS, "latent_weight": 0.5, "identity_weight": 0.5})
    for frames, added in ((1, 1), (3, 1), (6, 1), (8, 1)):
        x, noise = clip(model, frames)
        aligned, valid = model.align_frames(x)
        assert aligned.shape[2] == len(valid) == frames + added
        plain, wanted = gradients(model, step, x, noise)
        report, found = gradients(model, step, aligned, noise, valid)
        assert report == pytest.approx(plain, rel=1e-5)
        assert (report[step._accumulate.terms.index("identity")] > 0) == (frames == 1)
        scale = np.sqrt(sum(float((g**2).sum()) for g in wanted.values()))
        assert min(largest(wanted, part) for part in ("spatial_vae", "temporal_vae")) > 0.01 * scale
        for name, gradient in wanted.items():
            assert np.abs(found[name] - gradient).max() <= 2e-5 * scale, (frames, name)


def test_every_chunks_posterior_enters_the_kl():
    model, _ = make()
    loss = AutoencoderLoss(LossConfig(pixel_weight=0, latent_weight=1.0, kl_weight=1.0, kl_per_clip=True))
    x, noise = map(Tensor, clip(model, 12))
    latents = model.latents(x, noise)
    mean, logvar = latents["mean"], latents["logvar"]
    assert mean.shape[2] == 3 + 3 + 1  # of chunks of 5, 5 and 2 frames
    _, terms = loss(x, None, **latents)
    m, v = mean.asnumpy(), logvar.asnumpy()
    chunks = [
        0.5 * (m[:, :, a:b] ** 2 + np.exp(v[:, :, a:b]) - 1 - v[:, :, a:b]).sum() for a, b in ((0, 3), (3, 6), (6, 7))
    ]
    assert min(chunks) > 0
    assert terms.asnumpy()[loss.terms.index("kl")] == pytest.approx(sum(chunks), rel=1e-5)
    slope = ms.grad(lambda mean: loss(x, None, **{**latents, "mean": mean})[0])(mean).asnumpy()
    np.testing.assert_allclose(slope, m, rtol=1e-5)  # of all three chunks: KL grows with mean squared / 2


@pytest.mark.parametrize(
    "loss, trained",
    [
        ({**LATENTS, "kl_weight": 0.1}, False),
        ({**LATENTS, "kl_weight": 0.1, "detach_latents": False}, True),
        ({**PIXELS, "latent_weight": 1.0}, True),
    ],
)
def test_without_pixels_the_spatial_half_learns_only_if_it_is_not_detached(loss, trained):
    """From latents alone it would learn to make ones that are easy to reproduce but say nothing about the picture."""
    model, step = make(loss=loss)
    _, found = gradients(model, step, *clip(model, 5))
    assert (largest(found, "spatial_vae") > 0) == trained and largest(found, "temporal_vae") > 0


@pytest.mark.parametrize("detached", [True, False])
def test_no_gradient_comes_through_the_detached_target(detached):
    model, _ = make()
    loss = AutoencoderLoss(LossConfig(**LATENTS, detach_latents=detached))
    x, noise = map(Tensor, clip(model, 5))

    def through_the_target(x):
        latents = model.latents(x, noise)
        latents["code"] = ms.ops.stop_gradient(latents["code"])
        return loss(x, None, **latents)[0]

    slopes = ms.grad(through_the_target, None, ms.ParameterTuple(model.spatial_vae.trainable_params()))(x)
    assert any(np.abs(slope.asnumpy()).max() > 0 for slope in slopes) == (not detached)


@pytest.mark.parametrize("loss, made", [(LATENTS, False), (PIXELS, True)])
def test_pixels_are_made_only_where_a_loss_sees_them(loss, made, monkeypatch):
    model, step = make(loss=loss)
    calls = []
    reconstruct = model.reconstruct
    monkeypatch.setattr(model, "reconstruct", lambda *inputs: calls.append(1) or reconstruct(*inputs), raising=False)
    _, found = gradients(model, step, *clip(model, 4))
    assert bool(calls) == (largest(found, "spatial_vae.decoder") > 0) == made


# Compilations.


def lengths(frames: int, count: int = 100) -> list[int]:
    """The random numbers of frames of a run's first steps."""
    config = DataConfig(sample_n_frames=frames, random_frames=True, image_ratio=0.0)
    loader = ClipLoader([IndexRow(Path("video.mp4"), "video.mp4")], config, seed=42)
    return [loader.num_frames(step) for step in range(count)]


def test_a_hundred_random_lengths_up_to_34_have_ten_shapes():
    model = create_model(
        "temporal_vae",
        **{**TINY, "temporal_downsample": [True, True], "channel_multipliers": [1] * 3, "micro_frame_size": 17},
    )
    drawn = lengths(34)
    assert len(set(drawn)) > 25
    aligned = {model.align_frames(np.zeros((1, 1, frames, 1, 1), np.float32))[0].shape[2] for frames in drawn}
    assert sorted(aligned) == [4, 8, 12, 16, 17, 21, 25, 29, 33, 34]


def compilations(drawn: list[int]) -> tuple[list[str], np.ndarray]:
    """What is compiled for batches of these lengths, and the loss with its terms of each."""
    model, step = make("graph", spatial_block_out_channels=[8])  # without pixels there is less to compile
    compiled = []
    compile_cell = api._cell_graph_executor.compile

    def counting(cell, *args, **kwargs):
        phase, anew = compile_cell(cell, *args, **kwargs)
        if anew:
            compiled.append(type(cell).__name__)
        return phase, anew

    api._cell_graph_executor.compile = counting
    for frames in drawn:
        x, noise = clip(model, frames, size=4)
        aligned, valid = model.align_frames(x)
        step.accumulate(aligned, noise, None, valid)
    return compiled, np.array([report.asnumpy() for _, report in step._reports])


@pytest.mark.full
def test_a_hundred_random_lengths_compile_once_per_aligned_shape():
    """In a process of its own: behind hundreds of graphs MindSpore's compiler failed, "pointer[manager] is null"."""
    drawn = lengths(4)
    assert set(drawn) == {1, 2, 3, 4}
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
        compiled, report = alone.submit(compilations, drawn).result()
    assert compiled == ["_Accumulate"] * 2  # for 2 and 4 frames
    assert len(report) == 100 and np.isfinite(report).all()


# Runs.


def train(stage: int, workplace: Path, *options: object) -> tuple[dict[str, np.ndarray], list[dict], str]:
    """Train by a shipped config; returns the weights, the log and the terminal."""
    command = [sys.executable, ROOT / "scripts" / "train_vae.py", "--config"]
    command += [ROOT / "configs" / "temporal_vae" / "train" / f"stage{stage}.yaml", "--data-path", "train.csv"]
    command += ["--video_folder", "videos", "--model.config", json.dumps(TINY), "--model.dtype=fp32", "--device=cpu"]
    command += ["--data.image_size=8", "--data.crop_size=8", "--data.num_workers=1", "--optim.lr=1e-3", *options]
    result = subprocess.run([*map(str, command)], cwd=workplace, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    output = Path(f"outputs/temporal_vae_stage{stage}")
    assert result.stdout == f"weights: {output}/temporal_vae.ckpt\n"
    return read_state_dict(workplace / output / "temporal_vae.ckpt"), read_records(workplace / output), result.stderr


def moved(before: dict[str, np.ndarray], after: dict[str, np.ndarray], part: str) -> set[bool]:
    """Whether parameters of a part changed: all, none, or some."""
    assert before.keys() == after.keys()
    names = [name for name in before if name.startswith(f"{part}.")]
    return {not np.array_equal(before[name], after[name]) for name in names}


@pytest.mark.full
def test_the_three_stages_train_one_after_the_other_by_the_shipped_configs(tmp_path):
    write_data(tmp_path)
    spatial = create_model("temporal_vae", **TINY).spatial_vae
    start = {name: p.asnumpy() for name, p in spatial.named_weights()}
    file = tmp_path / "models" / "sdxl_vae" / "diffusion_pytorch_model.safetensors"
    file.parent.mkdir(parents=True)
    write_state_dict(file, spatial.original_weights(start, spatial.config))

    options = ["--max_steps=20", "--ckpt_save_steps=10", "--data.sample_n_frames=5"]
    first, records, said = train(1, tmp_path, *options)
    for name, value in start.items():
        np.testing.assert_array_equal(first[f"spatial_vae.{name}"], value, err_msg=name)
    halfway = read_state_dict(tmp_path / "outputs/temporal_vae_stage1/checkpoints/step_000010/model.safetensors")
    assert moved(halfway, first, "spatial_vae") == {False} and moved(halfway, first, "temporal_vae") == {True}
    videos, images = (np.array([r["latent"] for r in records if (r["identity"] > 0) == image]) for image in (0, 1))
    assert (len(videos), len(images)) == (16, 4)
    assert videos[-4:].mean() < 0.7 * videos[:4].mean() and images[-1] < images[0]
    identity = [record["identity"] for record in records if record["identity"] > 0]
    assert identity[-1] < identity[0]
    assert "l1" not in records[0] and records[0]["kl"] > 0 and records[-1]["skipped"] == 0
    assert "shapes of batches: 2 in 20 updates" in said

    options = ["--max_steps=2", "--data.sample_n_frames=5", "--data.image_ratio=0"]
    second, records, _ = train(2, tmp_path, *options, "--mode=pynative")  # the graph would be stage 1's
    assert moved(first, second, "temporal_vae") == {True}
    assert moved(first, second, "spatial_vae") == {False}  # unfrozen, but loss.detach_latents
    assert records[0]["latent"] < 1.2 * videos[-4:].mean() and records[0]["identity"] == 0

    options = ["--max_steps=5", "--data.sample_n_frames=4", "--loss.perceptual_weight=0"]
    third, records, said = train(3, tmp_path, *options)
    assert moved(second, third, "spatial_vae") == moved(second, third, "temporal_vae") == {True}
    assert {"l1", "kl"} < records[0].keys() and "latent" not in records[0]
    for frames in (2, 4):
        shape = f"the first batch of shape (1, 3, {frames}, 8, 8); the step is compiled for it"
        assert said.count(shape) == 1
    assert "shapes of batches: 2 in 5 updates" in said
