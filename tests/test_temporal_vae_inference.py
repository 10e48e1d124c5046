"""scripts/inference_vae.py with the shipped Open-Sora 1.2 VAE configs, on a tiny model: three folders, and losses."""

import csv
import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from commands import run_here
from mindspore import Tensor
from tiny_models import SMALL_TEMPORAL_VAE as TINY

from mg import runtime
from mg.checkpoints import write_state_dict
from mg.data.clips import load_clip
from mg.data.transforms import to_uint8_frames
from mg.data.video import open_video, read_image, write_image, write_video
from mg.inference.loading import ModelSection
from mg.inference.reconstruction import InferenceConfig, score
from mg.losses.lpips import LPIPS
from mg.losses.reconstruction import AutoencoderLoss, LossConfig
from mg.models import create_model, from_pretrained
from mg.models.temporal_vae.temporal_vae import OpenSoraVAE

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "temporal_vae" / "inference"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A checkpoint and LPIPS' weights, both random; two clips of 7 frames, an image, a broken file, one too short."""
    folder, rng = tmp_path_factory.mktemp("workplace"), np.random.default_rng(0)
    model = create_model("temporal_vae", **TINY)
    for name, p in model.named_weights():
        p.set_data(Tensor(rng.normal(float(name.endswith("gamma")), 0.1, p.shape).astype(np.float32)))
    model.save_weights(folder / "vae.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LPIPS, "_load", lambda *_: None)
        shapes = {name: p.shape for name, p in LPIPS("vgg", "").parameters_dict().items()}
    scales = {name: 20 if name.startswith("linear") else 1 / np.prod(shape[1:]) for name, shape in shapes.items()}
    lpips = {name: np.abs(rng.normal(0, scales[name], shape)).astype(np.float32) for name, shape in shapes.items()}
    write_state_dict(folder / "models" / "lpips_vgg.safetensors", lpips)

    t, y, x = np.meshgrid(np.arange(7), np.arange(32), np.arange(40), indexing="ij")
    frames = np.stack([128 + 90 * np.sin((x + 2 * t) / 9 + c) * np.cos(y / 11 - c) for c in range(3)], axis=-1)
    frames = frames.astype(np.uint8)
    for name, clip in (("a/moving.mp4", frames), ("moving.mp4", frames[::-1]), ("short.mp4", frames[:2])):
        write_video(folder / "videos" / name, clip, fps=8)
    write_image(folder / "videos" / "still.png", frames[0])
    (folder / "videos" / "broken.mp4").write_bytes(b"no video")
    names = ("a/moving.mp4", "broken.mp4", "still.png", "short.mp4", "moving.mp4")
    (folder / "videos" / "index.csv").write_text("\n".join(["path", *names]) + "\n")
    (folder / "videos" / "one.csv").write_text("path\nshort.mp4\n")
    return folder


def run_script(monkeypatch, workplace, config, folder, *options) -> int:
    """The command's exit code, run in this process where models/ holds LPIPS' weights, at 32 pixels.

    In fp32: in bf16, which the configs have, CPUs that round otherwise give other figures.
    """
    arguments = ["--config", CONFIGS / config, "--ckpt_path", workplace / "vae.safetensors", "--save_dir", folder]
    arguments += ["--model.dtype=fp32"]
    arguments += ["--data_path", workplace / "videos" / "index.csv", "--image_size=32", *options]
    monkeypatch.chdir(workplace)
    return run_here(monkeypatch, "scripts/inference_vae.py", *arguments)


def read_metrics(folder) -> tuple[dict, dict]:
    with open(folder / "metrics.csv", newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}, json.loads((folder / "metrics.json").read_text())


def check_rows(workplace, folder, num_frames, perceptual_weight, said):
    """Scores and losses of a run are those of the model's own pass, worked out here; so are the means that it said."""
    rows, summary = read_metrics(folder)
    loss = AutoencoderLoss(LossConfig(perceptual_weight=perceptual_weight, kl_weight=1e-6, kl_per_clip=True))
    model = from_pretrained(workplace / "vae.safetensors")
    sizes = InferenceConfig(ModelSection(""), "", image_size=32, num_frames=num_frames)
    totals = []
    for name in [name for name, row in rows.items() if row["status"] == "ok"]:
        x = load_clip(workplace / "videos" / name, sizes)[0]
        latents = model.latents(Tensor(x[None]))
        code, target = latents["code"], latents["target"]
        y = model.reconstruct(code, (1, *x.shape))
        value, terms = loss(Tensor(x[None]), y, **latents)
        l1, lpips, kl, outlier = terms.asnumpy().tolist()
        assert kl > 0 and outlier == 0 and (lpips > 0.1) == (perceptual_weight > 0)
        wanted = {"loss": float(value), "loss_l1": l1, "loss_lpips": lpips, "loss_kl": kl, "loss_outlier": 0}
        wanted["loss_pixel"] = wanted["loss"] - 1e-6 * kl
        wanted["loss_latent"] = np.abs(target.asnumpy() - code.asnumpy()).sum((1, 3, 4)).mean()
        flat = np.clip(model.spatial_vae(Tensor(x[None])).asnumpy()[0], -1, 1)
        for suffix, shown in (("", np.clip(y.asnumpy()[0], -1, 1)), ("_spatial", flat)):
            wanted[f"psnr{suffix}"], wanted[f"ssim{suffix}"] = score(x, shown)
        assert {key: float(rows[name][key]) for key in wanted} == pytest.approx(wanted, rel=1e-3, abs=1e-4)
        assert abs(wanted["psnr"] - wanted["psnr_spatial"]) > 0.01
        totals.append(wanted)
    for name, mean in summary["loss"].items():
        key = "loss" if name == "loss" else f"loss_{name}"
        assert mean == pytest.approx(np.mean([total[key] for total in totals]), rel=1e-3)
        assert f"mean {name}: {mean:.6g}\n" in said
    assert summary["config"]["loss"]["kl_weight"] == 1e-6
    assert list(summary["loss"]) == ["loss", "pixel", "l1", "lpips", "kl", "outlier", "latent"]
    return rows


@pytest.mark.full
def test_the_shipped_config_writes_three_folders_and_prints_the_losses(tmp_path, workplace, monkeypatch, capsys):
    passes = []
    encode_frames = OpenSoraVAE.encode_frames
    monkeypatch.setattr(OpenSoraVAE, "encode_frames", lambda *a: passes.append(a[1].shape) or encode_frames(*a))
    assert run_script(monkeypatch, workplace, "video.yaml", tmp_path / "D", "--num_frames=7", "--batch_size=2") == 1
    assert sorted(passes) == [(1, 3, 1, 32, 32), (2, 3, 7, 32, 32)]  # one encode for all that is shown and measured
    rows = check_rows(workplace, tmp_path / "D", 7, 0.1, capsys.readouterr().out)
    assert "needed" in rows["short.mp4"]["error"] and rows["broken.mp4"]["error"]
    assert [rows[name]["loss"] for name in ("short.mp4", "broken.mp4")] == ["", ""]

    names = ["a_moving.mp4", "moving.mp4", "still.png"]
    for folder in ("D_ori", "D_rec", "D_spatial", "D/side_by_side"):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == names
        for name in names[:2]:
            assert open_video(tmp_path / folder / name).num_frames == 7
    assert sorted(path.name for path in (tmp_path / "D").iterdir()) == ["metrics.csv", "metrics.json", "side_by_side"]

    model = from_pretrained(workplace / "vae.safetensors")
    x = load_clip(workplace / "videos" / "still.png", InferenceConfig(ModelSection(""), "", image_size=32))[0]
    for folder, wanted in (("D_ori", x), ("D_spatial", model.spatial_vae(Tensor(x[None])).asnumpy()[0])):
        shown = read_image(tmp_path / folder / "still.png").astype(int)
        assert np.abs(shown - to_uint8_frames(wanted)[0]).max() <= 1


@pytest.mark.full
def test_the_shipped_config_for_images_takes_the_first_frame_of_a_video(tmp_path, workplace, monkeypatch, capsys):
    assert run_script(monkeypatch, workplace, "image.yaml", tmp_path / "D", "--loss.perceptual_weight=0") == 1
    rows = check_rows(workplace, tmp_path / "D", 1, 0, capsys.readouterr().out)
    assert [rows[name]["frames"] for name in ("a/moving.mp4", "short.mp4", "still.png")] == ["1"] * 3
    assert read_image(tmp_path / "D_spatial" / "still.png").shape == (32, 32, 3)


def test_whole_videos_of_any_length_and_size_come_back(tmp_path, workplace, monkeypatch):
    options = ["--num_frames=null", "--image_size=33", "--crop=False", "--loss=null"]
    assert run_script(monkeypatch, workplace, "video.yaml", tmp_path / "D", *options) == 1
    rows, summary = read_metrics(tmp_path / "D")
    for name, size in (
        ("moving.mp4", ["7", "33", "41"]),
        ("short.mp4", ["2", "33", "41"]),
        ("still.png", ["1", "33", "41"]),
    ):
        assert [rows[name][key] for key in ("frames", "height", "width")] == size
    assert "loss" not in rows["moving.mp4"] and "loss" not in summary
    for folder in ("D_ori", "D_rec", "D_spatial"):
        assert [open_video(tmp_path / folder / name).num_frames for name in ("moving.mp4", "short.mp4")] == [7, 2]


@pytest.mark.full
def test_graph_mode_measures_the_same(tmp_path, workplace, monkeypatch, capsys):
    runtime.setup("cpu", "graph", seed=0)
    options = ["--data_path", workplace / "videos" / "one.csv", "--num_frames=2", "--loss.perceptual_weight=0"]
    assert run_script(monkeypatch, workplace, "video.yaml", tmp_path / "D", *options, "--save_videos=False") == 0
    ms.set_context(mode=ms.PYNATIVE_MODE)
    check_rows(workplace, tmp_path / "D", 2, 0, capsys.readouterr().out)
    assert [path.name for path in tmp_path.iterdir()] == ["D"]


def test_a_sample_of_the_latents_has_other_losses_and_the_same_spatial_half(tmp_path, workplace, monkeypatch):
    options = ["--data_path", workplace / "videos" / "one.csv", "--loss.perceptual_weight=0"]
    for name, sampled in (("mean", "False"), ("sample", "True")):
        run_script(monkeypatch, workplace, "image.yaml", tmp_path / name, *options, f"--sample_posterior={sampled}")
    mean, sample = (read_metrics(tmp_path / name)[1] for name in ("mean", "sample"))
    assert mean["mean"]["spatial"] == sample["mean"]["spatial"] and mean["loss"]["kl"] == sample["loss"]["kl"]
    assert abs(mean["loss"]["latent"] / sample["loss"]["latent"] - 1) > 1e-3


@pytest.mark.parametrize(
    "options, message",
    [
        (["--loss.lpips_weights=nowhere.safetensors"], "no LPIPS weights at 'nowhere.safetensors'"),
        (["--model.use_temporal_tiling"], "it must be 0: temporal_vae already cuts time into chunks"),
        (["--model.config", "{micro_frame_size: 0}"], "micro_frame_size is 0"),
        (["--loss.kl_weight=-1"], "kl_weight is -1.0; it must be at least 0"),
    ],
)
def test_a_users_mistake_is_one_line_before_anything_is_written(
    tmp_path, workplace, monkeypatch, capsys, options, message
):
    assert run_script(monkeypatch, workplace, "video.yaml", tmp_path / "D", *options) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert not list(tmp_path.iterdir())


def test_a_model_of_one_stage_has_no_spatial_half(tmp_path, workplace, monkeypatch, capsys):
    tae = {"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "z_channels": 4}
    create_model("tae", **tae).save_pretrained(tmp_path / "tae")
    options = ["--model.name=tae", "--ckpt_path", tmp_path / "tae"]
    assert run_script(monkeypatch, workplace, "video.yaml", tmp_path / "D", *options) == 2
    assert "spatial is true, but tae has no spatial half" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["tae"]
