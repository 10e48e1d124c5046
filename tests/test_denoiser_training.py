"""Training a denoiser: random draws, computed and stored latents, exact resume, the originals' configs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import run_here
from denoisers import DATA, array, inputs, original
from mindspore import Tensor
from shared_tokens import given_by
from tiny_text import clip_folder, t5_folder
from training_runs import assert_same_weights, read_records, stopped_at, write_data
from workers import finish, start

from mg import runtime
from mg.checkpoints import read_state_dict
from mg.config import gives_section, parse_config
from mg.data.loader import Batch, OpenSoraDataConfig
from mg.diffusion.networks import create_denoiser
from mg.diffusion.schedules import create_schedule
from mg.generation.codec import AUTOENCODERS
from mg.generation.config import AutoencoderSection, TextEncoderSection
from mg.generation.training.config import (
    DenoiserTrainConfig,
    TrainedDenoiserSection,
    TrainingSchedulerSection,
    ValidationSection,
)
from mg.generation.training.latents import StoredLatents, _whole
from mg.generation.training.step import DenoiserStep
from mg.inference.encode import EncodeConfig, encode_csv
from mg.inference.loading import ModelSection
from mg.latents import open_latents
from mg.runtime import Runtime
from mg.text.store import EncodeTextConfig, TextEncoderConfig, encode_texts
from mg.training.optim import OptimConfig
from mg.training.trainer import TrainingError, train

ROOT = Path(__file__).parents[1]
AUTOENCODER = DATA / "video_autoencoder_kl"
ORIGINALS = json.loads((DATA / "train_configs.json").read_text(encoding="utf-8"))
TINY = "--model.hidden_size 24 --model.depth 1 --model.num_heads 2 --model.patch_size 1 2 2".split()
RUN = "--dtype fp32 --device cpu --mode pynative --num_workers 0 --lr 1e-2 --ema_decay 0.9 --log_every 2".split()
SECTIONS = {
    "model": TrainedDenoiserSection,
    "vae": AutoencoderSection,
    "text_encoder": TextEncoderSection,
    "scheduler": TrainingSchedulerSection,
    "validation": ValidationSection,
    "data": OpenSoraDataConfig,
}
MASKS = '--mask_ratios={"quarter_head": 0.4, "image_random": 0.3}'


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """A picture takes longer than the updates that it is of."""
    monkeypatch.setattr("mg.training.logs.draw_curve", lambda *_: None)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with videos of four frames, their captions, and a text encoder."""
    runtime.setup("cpu", "pynative")  # the other fixtures run networks before a test's own setup
    folder = tmp_path_factory.mktemp("place")
    write_data(folder, videos=4, frames=4)
    lines = (folder / "train.csv").read_text().splitlines()
    captions = [lines[0], *(line.replace("moving", f"a cat {number}") for number, line in enumerate(lines[1:]))]
    (folder / "train.csv").write_text("\n".join(captions) + "\n")
    t5_folder(folder / "t5")
    return folder


def options(place: Path, *more: object, model: str = "STDiT3-XL/2", scheduler: str = "rflow") -> list[str]:
    """Of a run on clips of 4 x 16 x 24."""
    data = [f"--data-path={place / 'train.csv'}", f"--video_folder={place / 'videos'}", "--batch-size=2"]
    clips = "--dataset.num_frames 4 --dataset.image_size 16 24".split()
    vae = ["--vae.type=VideoAutoencoderKL", f"--vae.from_pretrained={AUTOENCODER}"]
    text = [f"--text_encoder.from_pretrained={place / 't5'}", "--text_encoder.model_max_length=4"]
    network = [f"--model.type={model}", f"--scheduler.type={scheduler}", *TINY]
    return [*network, *RUN, *data, *clips, *vae, *text, *map(str, more)]


def parse(*arguments: str) -> DenoiserTrainConfig:
    return parse_config(DenoiserTrainConfig, "", list(arguments))


def run(output: Path, arguments: list[str], *more: object) -> list[dict]:
    train(parse(*arguments, f"--outputs={output}", *map(str, more)))
    return read_records(output)


def built(arguments: list[str], worker: Runtime | None = None):
    """A run's task, ready for batches."""
    task = parse(*arguments).task()
    task.build(task.read_rows(), worker or Runtime("cpu"), None)
    return task


# Losses.


@pytest.mark.parametrize("network, kind, extra", [
    ("stdit2", "iddpm", ("height", "width", "num_frames", "ar", "fps")),
    ("stdit3", "rflow", ("height", "width", "fps")),
])  # fmt: skip
def test_the_step_has_the_original_s_loss_and_gradients(network, kind, extra):
    case = f"{kind}_loss"
    model = original(network)
    given = {name: value.asnumpy() for name, value in inputs(network, "mask").items()}
    step = DenoiserStep(model, create_schedule(kind), OptimConfig(lr=1e-9, clip_norm=0), 1)
    x0, noise, x_mask = (array(case, name) for name in ("x0", "noise", "x_mask"))
    y, mask = (value.asnumpy() for value in model._caption(Tensor(given["y"]), Tensor(given["mask"]), len(x0)))
    sizes = [np.resize(given[name], len(x0)).astype(np.float32) for name in extra]
    step.accumulate(x0, array(case, "t"), noise, x_mask, y, mask, *sizes)
    result = step.update()
    assert result.loss == pytest.approx(array(case, "masked_loss").mean(), rel=1e-5)
    assert result.grad_norm == pytest.approx(array(case, "masked_grad_norm").item(), rel=1e-4)


# Draws.


@pytest.fixture(scope="module")
def speedy(place):
    return built(options(place, MASKS, "--caption_dropout=0.5", model="STDiT2-XL/2", scheduler="iddpm-speed"))


def batch_of(task, step: int = 3, repeat: int = 1) -> Batch:
    rows = task.read_rows()[:4]
    x = np.stack([task.loader._reader.read(row, 4, (16, 24), (0, number)) for number, row in enumerate(rows)])
    return Batch(step, 0, x, [row.name for row in rows], rows, 4, (16, 24))


def test_two_workers_draw_what_one_draws_for_all(speedy):
    whole = batch_of(speedy)
    wanted = speedy.prepare(whole)
    parts = []
    try:
        for rank in range(2):
            speedy.worker = Runtime("cpu", rank, 2)
            half = slice(2 * rank, 2 * rank + 2)
            parts.append(
                speedy.prepare(whole._replace(x=whole.x[half], names=whole.names[half], rows=whole.rows[half]))
            )
    finally:
        speedy.worker = Runtime("cpu")
    for one, *both in zip(wanted, *parts, strict=True):
        np.testing.assert_array_equal(np.concatenate(both), one)
    again, later = speedy.prepare(whole), speedy.prepare(whole._replace(step=4))
    assert all(np.array_equal(a, b) for a, b in zip(again, wanted))
    assert not any(np.array_equal(a, b) for a, b in zip(later[:3], wanted[:3])), "latents, times and noise"


def test_the_network_gets_the_same_conditions_as_in_generation(speedy):
    _, t, _, x_mask, y, mask, *sizes = speedy.prepare(batch_of(speedy))
    known = dict(zip(speedy.model.extra_inputs, sizes, strict=True))
    wanted = {"height": 16, "width": 24, "num_frames": 4, "ar": 16 / 24, "fps": 8}
    assert known.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(known[name], [value] * 4, rtol=1e-6)
    image = speedy.prepare(batch_of(speedy)._replace(x=batch_of(speedy).x[:, :, :1], num_frames=1))
    assert image[-1].tolist() == [120] * 4, "an image's frames per second"
    assert y.shape == (4, 1, 4, 16) and mask.shape == (4, 4) and t.shape == (4,)
    assert x_mask.shape == (4, 4) and x_mask.any(1).all()


def test_captions_are_dropped_at_their_ratio(speedy, monkeypatch):
    monkeypatch.setattr(speedy, "latents", lambda batch, seeds: np.zeros((len(batch.x), 4, 4, 2, 3), np.float32))
    null, batch = speedy.model.null_caption, batch_of(speedy)

    def dropped(ratio: float, steps: int) -> list[bool]:
        monkeypatch.setattr(speedy.config, "caption_dropout", ratio)
        captions = (y for step in range(steps) for y in speedy.prepare(batch._replace(step=step))[4])
        return [np.array_equal(y[0], null) for y in captions]

    assert 1 <= sum(dropped(0.1, 8)) <= 9
    assert dropped(0, 1) == [False] * 4 and dropped(1, 1) == [True] * 4


# Latents.


@pytest.fixture(scope="module")
def stored(place):
    """Latents and embeddings of the place, as the commands store them."""
    data = {"csv_path": str(place / "train.csv"), "video_folder": str(place / "videos")}
    for name, posterior in (("latents", True), ("means", False)):
        clips = dict(num_frames=4, image_size=16, crop=True, mode="pynative", device="cpu", posterior=posterior)
        model = ModelSection(str(AUTOENCODER), AUTOENCODERS["VideoAutoencoderKL"])
        encode_csv(EncodeConfig(model=model, output_path=str(place / name), **data, **clips))
    encoder = TextEncoderConfig(str(place / "t5"), "t5", 4)
    texts = {"csv_path": data["csv_path"], "output_path": str(place / "embeddings"), "mode": "pynative"}
    encode_texts(EncodeTextConfig(encoder, device="cpu", **texts))
    return place


def from_stores(place: Path, latents: str, *more: object) -> list[str]:
    """Of a run that loads neither autoencoder nor text encoder."""
    network = ["--model.type=STDiT3-XL/2", "--scheduler.type=rflow", *TINY]
    kept = [f"--latents_path={place / latents}", f"--text_encoder.embeddings={place / 'embeddings'}", "--batch-size=2"]
    return [*network, *RUN, *kept, MASKS, *map(str, more)]


@pytest.mark.parametrize("latents", ["latents", pytest.param("means", marks=pytest.mark.full)])
def test_stored_latents_and_embeddings_give_the_losses_of_those_that_are_made(stored, tmp_path, latents):
    bucket = ["--data.bucket_sizes=computed", '--bucket_config={"16px_ar1:1": {4: [1.0, 2]}}']
    sampled = f"--sample_posterior={latents == 'latents'}"
    made = options(stored, *bucket, MASKS, sampled, "--max_steps=2")
    wanted = run(tmp_path / "made", made)
    found = run(tmp_path / "stored", from_stores(stored, latents, "--max_steps=2"))
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_the_rows_of_a_folder_are_what_was_encoded(stored):
    latents = StoredLatents(open_latents(stored / "latents"), {})
    known = [(row.name, row.num_frames, row.height, row.width, row.fps) for row in latents.rows]
    assert known[0] == ("0.mp4", 4, 16, 16, 8) and known[-1] == ("still.png", 1, 16, 16, None)
    assert latents.rows[1].caption == "a cat 1" and latents.latent_size(latents.rows[0]) == (4, 2, 2)
    assert [(place.bucket.num_frames, place.size) for place in latents.groups(latents.rows, 2).places] == [
        (4, (16, 16)),
        (1, (16, 16)),
    ]


@pytest.mark.parametrize("pixels, latents, whole", [(426, 54, 53), (240, 30, 30), (4, 1, 1), (20, 3, 2)])
def test_padded_latents_are_cut(pixels, latents, whole):
    assert _whole(pixels, latents) == whole


# Runs.


def validated(place: Path, *more: object) -> list[str]:
    """Of a run that is validated, too."""
    section = [f"--validation.latents_path={place / 'latents'}", "--validation.clips=3", "--validation.bands=2"]
    return from_stores(place, "latents", *section, "--validation.every=2", *more)


def validations(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "validation.jsonl").read_text().splitlines()]


def test_a_killed_run_and_a_loaded_one_continue_to_the_bit(stored, tmp_path):
    settings = validated(stored, "--max_steps=2", "--ckpt_every=1", "--model.freeze_y_embedder=true")
    settings += ["--validation.every=1"]
    wanted, first = run(tmp_path / "whole", settings), tmp_path / "whole/checkpoints/step_000001"
    assert len(wanted) == 2 and wanted[0]["loss"] != wanted[1]["loss"]
    with stopped_at(2):
        run(tmp_path / "killed", settings)
    assert run(tmp_path / "killed", settings, "--resume") == wanted
    assert run(tmp_path / "loaded", settings, f"--load={first}") == wanted[1:]
    losses = validations(tmp_path / "whole")
    assert [record["step"] for record in losses] == [0, 1, 2], "before the first update, too"
    assert validations(tmp_path / "killed") == losses and validations(tmp_path / "loaded") == losses[1:]
    board = b"".join(file.read_bytes() for file in (tmp_path / "killed/tensorboard").iterdir())
    assert board.count(b"validation/0.5-1") == len(losses)
    for name in ("killed", "loaded"):
        for file in ("checkpoints/step_000002/model.safetensors", "checkpoints/step_000002/state.safetensors"):
            assert_same_weights(read_state_dict(tmp_path / name / file), read_state_dict(tmp_path / "whole" / file))
    with pytest.raises(TrainingError, match=r"holds checkpoints of a run, and the newest is step_000002; continue it"):
        run(tmp_path / "killed", settings, f"--load={first}")

    state, weights = read_state_dict(first / "state.safetensors"), read_state_dict(first / "model.safetensors")
    name = "x_embedder.proj.weight"
    np.testing.assert_array_equal(weights[name], state[f"ema.{name}"], "the moving average is what is saved")
    assert not np.array_equal(weights[name], state[f"parameters.{name}"])
    assert not any("y_embedder" in key for key in state), "what is frozen"
    model = create_denoiser("STDiT3-XL/2", tmp_path / "whole" / "stdit3.ckpt")  # as mg-generate takes it
    assert model.config["depth"] == 1 and model.config["caption_channels"] == 16

    arguments = [*settings, f"--load={first}", "--start_from_scratch", f"--outputs={tmp_path / 'afresh'}"]
    afresh = built(arguments)
    assert afresh.find_checkpoint() is None
    np.testing.assert_array_equal(dict(afresh.model.named_weights())[name].asnumpy(), weights[name])


# Validation.


@pytest.fixture(scope="module")
def measured(stored):
    """A task with a step, and what it measures before the first update."""
    task = built(validated(stored, "--validation.times=2"))
    task.begin(1, False)
    return task, task.validate(0)


def test_the_loss_of_a_band_is_that_of_clips_noised_in_it(measured):
    task, found = measured
    batches = [list(task.validation._noised(place)) for place in range(3)]
    times = np.array([[t.item() for _, t, *_ in each] for each in batches])
    assert times.shape == (3, 4) and (times[:, :2] < 500).all() and (times[:, 2:] > 500).all()
    assert len(set(times.ravel().tolist())) == times.size, "every time and noise is another one"
    losses = np.array([[task.step.losses(*batch).item() for batch in each] for each in batches])
    assert list(found) == ["loss", "baseline", "0-0.5", "0.5-1"]
    assert found["0-0.5"] == pytest.approx(losses[:, :2].mean()) and found["loss"] == pytest.approx(losses.mean())
    assert task.validate(1) is not None and task.validate(3) is None, "every two updates, and after the last, the first"

    x0 = np.stack([each[0][0][0] for each in batches])
    noise = np.stack([batch[2][0] for each in batches for batch in each])
    predicted = x0.mean((0, 2, 3, 4)).reshape(1, -1, 1, 1, 1)
    assert found["baseline"] == pytest.approx(np.square(predicted - (x0.repeat(4, 0) - noise)).mean(), rel=1e-5)


def test_measurements_do_not_depend_on_how_training_runs(stored, measured):
    others = ["--batch-size=1", "--mask_ratios=null", "--caption_dropout=1", "--lr=1e-5", "--validation.every=1"]
    task = built([*validated(stored, "--validation.times=2"), *others])
    task.begin(5, False)
    assert task.validate(0) == measured[1]


@pytest.mark.full
def test_training_does_not_depend_on_validation(stored, tmp_path):
    losses = run(tmp_path / "with", validated(stored, "--max_steps=3"))
    assert run(tmp_path / "without", from_stores(stored, "latents", "--max_steps=3")) == losses
    assert not (tmp_path / "without/validation.jsonl").exists()


@pytest.mark.full
def test_encoded_clips_have_the_validation_losses_of_stored_ones(stored, measured):
    videos = [f"--validation.csv_path={stored / 'train.csv'}", f"--validation.video_folder={stored / 'videos'}"]
    vae = ["--vae.type=VideoAutoencoderKL", f"--vae.from_pretrained={AUTOENCODER}"]
    clips = ["--data.bucket_sizes=computed", '--bucket_config={"16px_ar1:1": {4: [1.0, 2]}}', "--validation.bands=2"]
    text = [f"--text_encoder.embeddings={stored / 'embeddings'}", "--validation.clips=3", "--validation.times=2"]
    network = ["--model.type=STDiT3-XL/2", "--scheduler.type=rflow", *TINY, *RUN]
    rows = [f"--data-path={stored / 'train.csv'}", f"--video_folder={stored / 'videos'}"]
    task = built([*network, *rows, *videos, *vae, *clips, *text])
    task.begin(1, False)
    assert task.validate(0) == pytest.approx(measured[1], rel=0.2), "other noise, as another order of the clips"
    assert task.validate(0)["baseline"] == pytest.approx(measured[1]["baseline"], rel=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("plugin", [[], ["--plugin=zero2", "--mode=graph"]], ids=["whole", "zero2"])
def test_two_workers_make_the_updates_of_one(stored, tmp_path, plugin):
    """And one continues where they were."""
    settings = validated(stored, "--max_steps=3", "--ckpt_every=2", "--lr=1e-3")
    wanted = run(tmp_path / "one", settings)
    both = [*settings, "--batch-size=1", f"--outputs={tmp_path / 'two'}", *plugin]
    process = start(tmp_path / "logs", ROOT / "scripts/train.py", *both, cwd=ROOT, PYTHONPATH=str(ROOT))
    said = finish(process, tmp_path / "logs", timeout=600)
    assert process.returncode == 0, said
    assert ("zero2: gradients, averages and optimizer take " in said) == bool(plugin)

    def assert_same_run(name: str):
        for ours, theirs in zip(read_records(tmp_path / name), wanted, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        for file in ("stdit3.ckpt", "checkpoints/step_000003/state.safetensors"):
            found, right = (read_state_dict(tmp_path / run / file) for run in (name, "one"))
            assert found.keys() == right.keys()
            for key, value in right.items():
                np.testing.assert_allclose(found[key], value, atol=1e-6, err_msg=key)

    assert_same_run("two")
    ours, theirs = validations(tmp_path / "two"), validations(tmp_path / "one")
    assert ours[0] == (pytest.approx(theirs[0], rel=1e-5) if plugin else theirs[0]), "the same network, to the bit"
    assert ours[-1] == pytest.approx(theirs[-1], rel=1e-5) and len(ours) == len(theirs) == 3
    shutil.rmtree(tmp_path / "two/checkpoints/step_000003")
    run(tmp_path / "two", settings, "--resume")
    assert_same_run("two")


@pytest.mark.full
def test_workers_that_share_tokens_count_as_one(stored, tmp_path):
    """Of four workers, which share optimizer states too, two have the first half of a batch and two the second."""
    settings = from_stores(stored, "latents", "--max_steps=3", "--lr=1e-3")
    wanted = run(tmp_path / "one", settings)
    options = [*settings, "--batch-size=1", "--sp_size=2", "--plugin=zero2-seq", f"--outputs={tmp_path / 'four'}"]
    process = start(tmp_path / "logs", ROOT / "tests/shared_tokens.py", tmp_path, *options, workers=4)
    said = finish(process, tmp_path / "logs", timeout=900)
    assert process.returncode == 0, said
    for ours, theirs in zip(read_records(tmp_path / "four"), wanted, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    state = json.loads((tmp_path / "four/checkpoints/step_000003/state.json").read_text())
    assert (state["workers"], state["clips"]) == (2, None)
    found, right = (read_state_dict(tmp_path / name / "stdit3.ckpt") for name in ("four", "one"))
    for name, value in right.items():
        np.testing.assert_allclose(found[name], value, atol=1e-6, err_msg=name)

    for size in (2, 4):
        for rank in range(4):
            exchanged = np.load(tmp_path / f"rank_{rank}.npz")
            first = rank // size * size
            each = [given_by(member, size) for member in range(first, first + size)]
            gathered, summed = np.concatenate(each), sum(each)[rank - first : rank - first + 1]
            np.testing.assert_array_equal(exchanged[f"gathered_{size}"], gathered)
            np.testing.assert_array_equal(exchanged[f"gathered_{size}_gradient"], 2 * size * each[rank - first])
            np.testing.assert_array_equal(exchanged[f"summed_{size}"], summed)
            np.testing.assert_array_equal(exchanged[f"summed_{size}_gradient"], 2 * sum(each))


@pytest.mark.full
@pytest.mark.parametrize("mode", ["graph", "pynative"])
@pytest.mark.parametrize(
    "model, scheduler", [("STDiT-XL/2", "iddpm"), ("STDiT2-XL/2", "iddpm-speed"), ("DiT-XL/2", "iddpm")]
)
def test_every_network_trains_in_both_modes(place, tmp_path, mode, model, scheduler):
    settings = options(place, "--max_steps=3", f"--mode={mode}", "--grad_checkpoint", model=model, scheduler=scheduler)
    settings += [f"--validation.csv_path={place / 'train.csv'}", f"--validation.video_folder={place / 'videos'}"]
    settings += ["--validation.clips=2", "--validation.bands=3"]
    if model.startswith("DiT"):
        folder = clip_folder(tmp_path / "clip")
        settings += ["--text_encoder.type=clip", f"--text_encoder.from_pretrained={folder}", "--model.condition=text"]
    else:
        settings.append(MASKS)
    records = run(tmp_path / "run", settings)
    assert all(np.isfinite(record["loss"]) and record["grad_norm"] > 0 for record in records), records
    assert len(records) == 3 and records[-1]["skipped"] == 0
    before, after = validations(tmp_path / "run")
    assert after["loss"] < before["loss"] and all(np.isfinite(list(after.values())))
    assert list(after)[2:] == ["baseline", "0-0.33", "0.33-0.67", "0.67-1"]


# What is told.


@pytest.mark.parametrize("wrong, message", [
    ({"sp_size": 2, "model": {"type": "DiT-XL/2"}}, "sp_size: devices cannot share the tokens of model.type DiT-XL/2"),
    ({"plugin": "zero2-seq"}, "sp_size is 1; it must be above 1 with plugin zero2-seq"),
    ({"mask_ratios": {"mask_head": 0.5}}, "mask_ratios has no mask 'mask_head'; it may be one of quarter_head, "),
    ({"model": {"type": "DiT-XL/2"}, "mask_ratios": {}}, "mask_ratios: model.type DiT-XL/2 has no frame masks; use"),
    ({"dataset_type": "VariableVideoTextDataset"}, "dataset_type is VariableVideoTextDataset; it must be VideoText"),
    ({"transform_name": "center"}, "transform_name is center; it must be resize_crop for 16 x 24, no square"),
    ({"start_from_scratch": True}, "load is None; it must be given with start_from_scratch"),
    ({"latents_path": "latents"}, "it must be given, or latents_path in its place; one of them and not both"),
    ({"data": {"buckets": {"241p": {4: [1, 1]}}}}, "bucket 241p: resolution is '241p'; did you mean '240p'?"),
    ({"scheduler": {"type": "dpm-solver"}}, "scheduler.type is dpm-solver, which only samples; train with iddpm"),
    ({"validation": {"every": 0}}, "every is 0; it must be at least 1"),
    ({"validation": {"csv_path": "a", "latents_path": "b"}}, "latents_path is b; it must be null with csv_path"),
    ({"vae": {}}, "vae.from_pretrained must be given: weights, a file or a folder"),
    ({"model": {"from_pretrained": "none"}}, "model.from_pretrained: none: no such file or folder; download the we"),
])  # fmt: skip
def test_impossible_settings_are_one_line_before_anything_is_loaded(place, wrong, message):
    settings = {"csv_path": "train.csv", "data": {"frame_size": [16, 24]}, "vae": {"from_pretrained": AUTOENCODER}}
    settings |= {"text_encoder": {"from_pretrained": place / "t5"}, **wrong}
    with pytest.raises(ValueError) as error:
        sections = {name: section(**settings.pop(name, {})) for name, section in SECTIONS.items()}
        DenoiserTrainConfig(**sections, **settings).task()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_missing_captions_are_named_at_once(stored, tmp_path):
    (tmp_path / "train.csv").write_text("video,caption\n0.mp4,a dog\n1.mp4,a cat 1\n")
    rows = [f"--data-path={tmp_path / 'train.csv'}", f"--text_encoder.embeddings={stored / 'embeddings'}"]
    with pytest.raises(TrainingError, match=r"has no embeddings of 1 of 2 captions of .*, such as 'a dog'; store them"):
        built([*options(stored), *rows])
    (tmp_path / "train.csv").write_text("video\n0.mp4\n")
    with pytest.raises(TrainingError, match="no row has a caption; it needs a column 'caption' or 'text'"):
        parse(*options(stored), *rows).task().read_rows()


def test_a_network_for_one_size_is_not_trained_on_several(stored):
    with pytest.raises(TrainingError, match=r"is for latents of one size, and there are 2 .*; train STDiT2 or STDiT3"):
        built([*from_stores(stored, "means"), "--model.type=STDiT-XL/2", "--batch-size=1"])


def test_the_command_trains_a_denoiser_if_the_config_has_a_scheduler(monkeypatch, capsys):
    config = ROOT / "configs/generation/opensora-v1-1/train/stage1.yaml"
    assert run_here(monkeypatch, "scripts/train.py", "--config", config, "--data-path=train.csv") == 2
    assert capsys.readouterr().err.startswith(
        "error: vae.from_pretrained: models/sd-vae-ft-ema: no such file or folder"
    )


# Sizes of Open-Sora 1.x.


def test_buckets_have_the_sizes_of_open_sora_1():
    data = OpenSoraDataConfig(buckets={"240p": {16: [1.0, 1]}})
    sizes = data.sizes_by_shape("240p", 8)
    assert sizes[0.56] == (240, 426) and sizes[1.78] == (426, 240) and len(sizes) == 17
    computed = OpenSoraDataConfig(buckets=data.buckets, bucket_sizes="computed").sizes_by_shape("240p", 8)
    assert all(height % 8 == width % 8 == 0 for height, width in computed.values())
    assert OpenSoraDataConfig(frame_size=[240, 426]).size == (240, 426) and OpenSoraDataConfig().size == (256, 256)


# Configs.


QUICK = ("opensora-v1-0/train/16x256x256-mask", "opensora-v1-1/train/stage2", "opensora-v1-2/train/stage1")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.full) for name in ORIGINALS]
)
def test_a_config_has_the_originals_values(name):
    config = parse(str(ROOT / f"configs/generation/{name}.yaml"), "--data-path=train.csv")
    wanted = ORIGINALS[name]
    data, optim, of = config.data, config.optim, wanted["dataset"]
    assert (optim.lr, optim.clip_norm, config.dtype) == (wanted["lr"], wanted["grad_clip"], wanted["dtype"])
    assert optim.ema_decay == wanted.get("ema_decay", 0.9999) and optim.optimizer_options()["eps"] == wanted.get(
        "adam_eps", 1e-8
    )
    assert optim.warmup_steps == wanted.get("warmup_steps", 0)
    assert (config.epochs, config.log_every, config.seed) == (wanted["epochs"], wanted["log_every"], wanted["seed"])
    assert config.ckpt_save_steps == wanted["ckpt_every"] and config.grad_checkpoint == wanted["grad_checkpoint"]
    assert (config.plugin, config.sp_size) == (wanted["plugin"], wanted.get("sp_size", 1))
    assert data.sample_stride == of.get("frame_interval", 1)
    if "bucket_config" in wanted:
        found = {name: {str(frames): entry for frames, entry in table.items()} for name, table in data.buckets.items()}
        assert found == wanted["bucket_config"]
    else:
        assert (data.sample_n_frames, data.frame_size) == (of["num_frames"], of["image_size"])
        assert data.batch_size == wanted["batch_size"]
    for section in ("model", "vae", "text_encoder", "scheduler"):
        for key, value in wanted[section].items():
            key = key.replace("flashattn", "flash_attn")
            if value and key not in WITHOUT_EFFECT:
                found = getattr(getattr(config, section), key)
                assert found == pytest.approx(value) or (found is None and key in DEFAULTS), (section, key)
    ratios = [ratio for ratio in wanted.get("mask_ratios", {}).values() if ratio]
    assert list((config.mask_ratios or {}).values()) == ratios


# What networks have by default, and what configs need not say here.
DEFAULTS = {"qk_norm", "input_sq_size", "space_scale", "time_scale"}
WITHOUT_EFFECT = {
    *("from_pretrained", "local_files_only", "shardformer"),
    *("enable_layernorm_kernel", "enable_sequence_parallelism"),
}


def test_every_config_of_a_training_is_proved():
    folder = ROOT / "configs/generation"
    files = {str(path.relative_to(folder))[: -len(".yaml")] for path in folder.rglob("train/*.yaml")}
    assert files == set(ORIGINALS)


def test_the_guides_training_config_is_read_as_it_is_written(tmp_path):
    guide = yaml.safe_load("""
        dataset: {type: VariableVideoTextDataset, data_path: null, num_frames: null, frame_interval: 3,
                  image_size: [null, null], transform_name: resize_crop}
        bucket_config: {"240p": {1: [0.1, 20], 16: [0.9, 17]}, "512": {128: [0.0, null], 1: [0.5, 86]}}
        mask_ratios: {identity: 0.75, quarter_random: 0.025, image_head: 0.225}
        num_workers: 8
        num_bucket_build_workers: 16
        dtype: bf16
        grad_checkpoint: true
        plugin: zero2-seq
        sp_size: 2
        model: {type: STDiT2-XL/2, from_pretrained: null, input_sq_size: 512, qk_norm: true, enable_flash_attn: true,
                enable_layernorm_kernel: true, enable_sequence_parallelism: true}
        vae: {type: VideoAutoencoderKL, from_pretrained: sd-vae-ft-ema, micro_batch_size: 4, local_files_only: true}
        text_encoder: {type: t5, from_pretrained: t5, model_max_length: 200, shardformer: true, local_files_only: true}
        scheduler: {type: iddpm, timestep_respacing: ""}
        seed: 42
        outputs: outputs
        wandb: false
        epochs: 1000
        log_every: 10
        ckpt_every: 500
        load: null
        batch_size: null
        lr: 2.0e-5
        grad_clip: 1.0
    """)
    file = tmp_path / "guide.yaml"
    file.write_text(yaml.safe_dump(guide))
    arguments = ["--config", str(file), "--ckpt-path=weights", "--load=run", "--data-path=train.csv", "--batch-size=4"]
    assert gives_section("scheduler", arguments) and not gives_section("scheduler", ["--csv_path=x.csv"])
    config = parse(*arguments, "--seed=7", "--wandb", "True")
    assert (config.model.from_pretrained, config.load, config.csv_path) == ("weights", "run", "train.csv")
    assert (config.data.batch_size, config.data.num_workers, config.data.sample_stride) == (4, 8, 3)
    assert (config.seed, config.wandb, config.output_path, config.optim.lr) == (7, True, "outputs", 2e-5)
    assert (config.plugin, config.sp_size) == ("zero2-seq", 2)
    with pytest.raises(ValueError, match="^unknown option 'bucket_confg'; did you mean 'bucket_config'"):
        parse(*arguments, "--bucket_confg=null")
