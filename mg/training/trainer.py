"""The training loop of every model.

A run is a pure function of its config: the clip at place i of the global batch of step s, its noise and its dropout
depend on (seed, s, i) alone. So a run that was killed resumes from its newest checkpoint with the very losses that it
would have had, and several workers make the updates that one worker makes with a batch as large as all of theirs.
"""

import json
import logging
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from mg import runtime
from mg.checkpoints import atomic_write
from mg.config import require, to_dict
from mg.data.index import IndexRow, read_index
from mg.data.loader import ClipLoader, DataConfig
from mg.losses.adversarial import DiscriminatorLossConfig, GeneratorLossConfig
from mg.losses.discriminator import DiscriminatorConfig, NLayerDiscriminator3D
from mg.losses.reconstruction import AutoencoderLoss, LossConfig
from mg.models import create_model, model_name
from mg.models.autoencoder import VideoAutoencoder
from mg.models.tae.tae import TemporalAutoencoder
from mg.plain_text import one_line, printable
from mg.training.checkpoint import list_checkpoints, load_checkpoint, read_run, save_checkpoint
from mg.training.data_changes import describe_changes, note_rows
from mg.training.logs import RunLog
from mg.training.optim import OptimConfig, OptimizerConfig
from mg.training.previews import Previews
from mg.training.speed import SpeedMeter
from mg.training.step import Adversary, StepResult, TrainStep, UpdateResult
from mg.training.wandb_run import WandbRun
from mg.training.workers import require_same, share_bad_files

_logger = logging.getLogger(__name__)


@dataclass
class ModelConfig:
    """The autoencoder.

    Args:
        name: which model, see `mg.models.list_models`; by default the one that the weights are of, else tae.
        from_pretrained: weights to start from, a file or folder; null starts from random ones.
        spatial_from_pretrained: weights of the spatial half of a model of two, an image VAE's file or folder; they
            are laid over those of from_pretrained.
        linear_start: so many clips of the first batches, of which a TAE without weights to start from takes its first
            ones, see `mg.models.tae.linear_start`; 0 starts from random ones.
        freeze: parts of the model whose parameters stay as they are, e.g. [spatial_vae].
        config: overrides of the model's config.
        dtype: precision of convolutions and products; parameters, norms and losses stay in fp32.
        disc_off_grad_ckpt: leave what stands before the decoder's last convolution out of grad_checkpoint.
    """

    name: str | None = None
    from_pretrained: str | None = None
    spatial_from_pretrained: str | None = None
    linear_start: int = 0
    freeze: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    disc_off_grad_ckpt: bool = False

    def __post_init__(self):
        require(self.linear_start >= 0, self, "linear_start", "at least 0")
        given = self.linear_start and self.from_pretrained
        require(not given, self, "linear_start", f"0 where the weights start from {self.from_pretrained}")


@dataclass
class TrainConfig:
    """A training run.

    Args:
        csv_path: the videos and images to train on, a CSV with a column `video` or `path`.
        output_path: folder for all that the run writes.
        video_folder: folder that the CSV's paths are relative to, by default the CSV's own.
        model: the autoencoder.
        grad_checkpoint: recompute activations in the backward pass: less memory, a third more time.
        loss: the autoencoder's loss.
        optim: the autoencoder's optimizer.
        discriminator: the discriminator of adversarial training, stage 2; null trains without, stage 1.
        gen_loss_config: the generator loss, of the autoencoder; only with a discriminator.
        disc_loss_config: the discriminator's loss.
        optim_discriminator: the discriminator's optimizer.
        data: clips and batches.
        epochs: passes over the data.
        max_steps: updates after which the run ends, whatever epochs says.
        ckpt_save_interval: epochs between checkpoints.
        ckpt_save_steps: updates between checkpoints, in place of ckpt_save_interval.
        ckpt_max_keep: how many of the newest checkpoints are kept; 0 keeps all.
        resume: go on from the newest checkpoint in output_path, if there is one.
        resume_changed_data: go on though the rows of the CSV are not those that the checkpoint was trained on: from
            there on the run is another one.
        wandb: log to Weights & Biases too, which takes the package wandb; without an account, offline.
        preview_clips: how many clips are drawn at every checkpoint beside their reconstructions, below previews/;
            by default 2 with wandb, which shows them, else none.
        seed: of the parameters, the order of the data, crops and noise.
        device: auto takes ascend, gpu or cpu, the first that is there.
        mode: graph compiles once per shape, pynative runs op by op.
        jit_level: how far the graph is fused: O0, O1, or O2 (Ascend only).
        deterministic: on Ascend, have every kernel give the same bits each time, so that a run that was killed resumes
            to the bit there too; false is faster.
    """

    aliases: ClassVar[dict[str, str]] = {
        "data_path": "csv_path",
        "data-path": "csv_path",
        "dataset.data_path": "csv_path",
    }

    csv_path: str
    output_path: str = "outputs/train"
    video_folder: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    grad_checkpoint: bool = False
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    discriminator: DiscriminatorConfig | None = None
    gen_loss_config: GeneratorLossConfig = field(default_factory=GeneratorLossConfig)
    disc_loss_config: DiscriminatorLossConfig = field(default_factory=DiscriminatorLossConfig)
    optim_discriminator: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-4, beta2=0.98))
    data: DataConfig = field(default_factory=DataConfig)
    epochs: int = 2000
    max_steps: int | None = None
    ckpt_save_interval: int = 50
    ckpt_save_steps: int | None = None
    ckpt_max_keep: int = 5
    resume: bool = False
    resume_changed_data: bool = False
    wandb: bool = False
    preview_clips: int | None = None
    seed: int = 42
    device: Literal["auto", "ascend", "gpu", "cpu"] = "auto"
    mode: Literal["graph", "pynative"] = "graph"
    jit_level: Literal["O0", "O1", "O2"] = "O0"
    deterministic: bool = True

    def __post_init__(self):
        for name in ("epochs", "max_steps", "ckpt_save_interval", "ckpt_save_steps"):
            require(getattr(self, name) is None or getattr(self, name) >= 1, self, name, "at least 1")
        for name in ("ckpt_max_keep", "seed", "preview_clips"):
            require((getattr(self, name) or 0) >= 0, self, name, "at least 0")


class TrainingError(ValueError):
    """A run that cannot go on."""


@dataclass
class Progress:
    """Where a run stands: updates done, and those of each network that were left out, in all and last in a row; and
    what its steps depend on: the workers, clips per update (of images there may be others; None in buckets), and
    updates in all."""

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    disc_skipped: int = 0
    disc_skipped_in_a_row: int = 0
    workers: int | None = None
    clips: int | None = None
    total: int | None = None

    def count(self, result: StepResult) -> None:
        """Move on by an update."""
        self.step += 1
        self.skipped += not result.updated
        self.skipped_in_a_row = 0 if result.updated else self.skipped_in_a_row + 1
        if result.discriminator is not None:
            self.disc_skipped += not result.discriminator.updated
            self.disc_skipped_in_a_row = 0 if result.discriminator.updated else self.disc_skipped_in_a_row + 1


def train(config: TrainConfig) -> Path | None:
    """Train as `config` says; returns the weights of the end, `<model>.ckpt` in the output folder.

    Of several workers the first one writes all files, and the others return None.

    Raises:
        ValueError: a config, file or data set that training cannot work with, or a run that diverged.
        OSError: a file that cannot be written.
    """
    output = Path(config.output_path)
    trackers = [WandbRun(output, to_dict(config), config.resume)] if config.wandb else []
    newest = next(reversed(list_checkpoints(output / "checkpoints")), None)
    if newest and not config.resume:
        raise TrainingError(f"{output} holds checkpoints of a run; continue it with --resume, or choose another folder")
    rows = read_index(config.csv_path, config.video_folder)
    noted = note_rows(rows)
    if newest:
        _compare_data(newest, noted, config)
    worker = runtime.setup(
        config.device, config.mode, config.seed, config.jit_level, deterministic=config.deterministic
    )

    settings = config.model
    start = newest or settings.from_pretrained
    name = settings.name or (model_name(start) if start else "tae")
    model = create_model(name, start, settings.dtype, **settings.config)
    grid = model.spatial_compression
    loader = ClipLoader(rows, config.data, config.seed, worker.rank, worker.world_size, grid)
    per_update = config.optim.accumulation
    per_epoch = max(1, loader.steps_per_epoch // per_update)
    total = min(config.epochs * per_epoch, config.max_steps or config.epochs * per_epoch)
    save_every = config.ckpt_save_steps or config.ckpt_save_interval * per_epoch

    _check_loss(config, model)
    if settings.spatial_from_pretrained is not None:
        _load_spatial(model, settings.spatial_from_pretrained, resumed=newest is not None)
    if settings.linear_start and not newest:
        _start_linear(model, rows, config)
    _freeze(model, settings.freeze)
    if config.grad_checkpoint:
        model.recompute_activations(output=not settings.disc_off_grad_ckpt)
    loss, adversary = AutoencoderLoss(config.loss), _adversary(config, newest is not None, worker.world_size)
    step = TrainStep(model, loss, config.optim, total, settings.dtype, worker.world_size, adversary)
    progress = _progress(load_checkpoint(newest, model, step)) if newest else Progress()
    begun, progress.workers, progress.total = replace(progress), worker.world_size, total
    progress.clips = None if config.data.buckets else per_update * worker.world_size * config.data.batch_size
    networks = [*model.get_parameters(), *(step.discriminator.get_parameters() if step.discriminator else [])]
    require_same(
        worker,
        {
            "options": [json.dumps(to_dict(config)).encode()],
            "CSV": [json.dumps(noted).encode()],
            "checkpoint to resume": [str(newest and newest.name).encode()],
            "parameters": (p.asnumpy().tobytes() for p in networks),
            "optimizer, EMA or loss scale": (value.tobytes() for value in step.state().values()),
        },
    )

    meter = SpeedMeter(worker.world_size)
    with closing(_updates(config, loader, model, step, progress, worker, meter)) as updates:
        if not worker.is_main:
            for _ in updates:
                pass
            return None
        _say_what_changes(begun, progress)
        _write_config(output / "config.json", config, progress.step)
        _logger.info(
            "%s: %.1fM trained parameters, %d rows, updates %d to %d of %d x %s, %s mode on %s",
            model.name,
            sum(p.size for p in step.updater.parameters) / 1e6,
            len(rows),
            progress.step + 1,
            total,
            per_update * worker.world_size,
            "a bucket's batch size" if config.data.buckets else config.data.batch_size,
            config.mode,
            worker.device,
        )
        count = config.preview_clips if config.preview_clips is not None else 2 * config.wandb
        previews = Previews(output / "previews", loader, count)
        with RunLog(output, progress.step, total, trackers) as log:
            for result in updates:
                log.add(progress.step - 1, _scalars(result, progress), meter.scalars())
                if warning := meter.warning(config.data.num_workers):
                    log.say(warning, logging.WARNING)
                if progress.step % save_every == 0 or progress.step == total:
                    log.save()
                    run = asdict(progress) | {"data": noted}
                    save_checkpoint(output / "checkpoints", model, step, run, config.ckpt_max_keep)
                    log.say(f"update {progress.step}: {meter.describe()}")
                    if picture := previews.draw(model, progress.step):
                        log.add_image(progress.step - 1, "previews", picture)
    for left_out, whose in ((progress.skipped, ""), (progress.disc_skipped, " of the discriminator")):
        if left_out:
            message = "%d of %d updates%s left out: their loss or gradient was not finite"
            _logger.warning(message, left_out, total, whose)
    if loader.bad_files:
        first = printable(next(iter(loader.bad_files)))
        _logger.warning("%d files could not be used, e.g. %s", len(loader.bad_files), first)
    weights = output / f"{model.name}.ckpt"
    model.save_weights(weights, weights=step.updater.averaged())
    return weights


def _updates(
    config: TrainConfig,
    loader: ClipLoader,
    model: VideoAutoencoder,
    step: TrainStep,
    progress: Progress,
    worker: runtime.Runtime,
    meter: SpeedMeter,
) -> Generator[StepResult, None, None]:
    """Make the updates that are left, timed by `meter`; `progress` moves on before the result of each is given out."""
    per_update, first = config.optim.accumulation, progress.step
    shapes: set[tuple] = set()
    shared: set[str] = set()
    aligned = config.data.random_frames and config.discriminator is None
    with closing(loader.batches(progress.step * per_update)) as batches, runtime.CtrlC() as ctrl_c:
        while progress.step < progress.total:
            meter.begin()
            for batch in meter.timed(islice(batches, per_update)):
                x, valid = model.align_frames(batch.x) if aligned else (batch.x, None)
                if x.shape not in shapes:
                    shapes.add(x.shape)
                    at_cost = "; the step is compiled for it" if config.mode == "graph" else ""
                    _logger.info("update %d: the first batch of shape %s%s", progress.step + 1, x.shape, at_cost)
                generators = _generators(config.seed, batch.step, worker.rank * len(x), len(x))
                shape = model.latent_shape(x.shape)[1:]
                noise = np.stack([generator.standard_normal(shape, dtype=np.float32) for generator in generators])
                step.accumulate(x, noise, generators, valid)
            result = step.update()
            meter.end()
            share_bad_files(worker, loader, shared)
            progress.count(result)
            ctrl_c.hold()
            yield result
            ctrl_c.check()
            for section, whose, left_out in (
                ("optim", "the", progress.skipped_in_a_row),
                ("optim_discriminator", "the discriminator's", progress.disc_skipped_in_a_row),
            ):
                if left_out >= getattr(config, section).max_skipped:
                    raise TrainingError(
                        f"{whose} loss or its gradient was not finite in {left_out} updates in a row, the last being "
                        f"number {progress.step}; lower --{section}.lr, or train in fp32 or bf16"
                    )
    _logger.info("shapes of batches: %d in %d updates", len(shapes), progress.total - first)


def _generators(seed: int, step: int, first: int, count: int) -> Sequence[np.random.Generator]:
    """One for each clip of a batch, of which the first has the place `first` over all workers."""
    # The tail tells them from the loader's, which have four numbers, or other tails.
    return [np.random.default_rng((seed, step, place, 0, 3)) for place in range(first, first + count)]


def _check_loss(config: TrainConfig, model: VideoAutoencoder) -> None:
    """Raise TrainingError where the model has not what the loss is of."""

    def require_model(holds: bool, name: str, wanted: str) -> None:
        if not holds:
            raise TrainingError(f"loss.{name} is {getattr(config.loss, name)}; it must be {wanted}")

    loss = config.loss
    require_model(model.has_posterior or not loss.kl_weight, "kl_weight", f"0, {model.name} has no posterior")
    for name in ("latent_weight", "identity_weight"):
        no_target = f"0, {model.name} has no first stage whose latents could be compared with"
        require_model(model.has_target or not getattr(loss, name), name, no_target)
    judged = config.discriminator is not None
    require_model(loss.pixel_weight > 0 or not judged, "pixel_weight", "above 0 with a discriminator")
    trains = loss.pixel_weight > 0 or loss.latent_weight > 0 or loss.identity_weight > 0
    require_model(trains, "pixel_weight", "above 0 where latent_weight and identity_weight are 0")


def _load_spatial(model: VideoAutoencoder, path: str, resumed: bool) -> None:
    """Lay an image VAE's weights over the spatial half's; resumed, that has those of the checkpoint."""
    if not hasattr(model, "spatial_vae"):
        raise TrainingError(f"model.spatial_from_pretrained is {path}; it must be null, {model.name} has one half only")
    if not resumed:
        model.spatial_vae.load_weights(path)


def _start_linear(model: VideoAutoencoder, rows: Sequence[IndexRow], config: TrainConfig) -> None:
    """Fit a TAE's straight path to clips of the first batches: to the same ones in every worker."""
    if not isinstance(model, TemporalAutoencoder):
        raise TrainingError(f"model.linear_start is {config.model.linear_start}; it must be 0, {model.name} is no TAE")
    whole = model.temporal_compression
    if config.data.sample_n_frames % whole:  # else no clip would ever come
        raise TrainingError(
            f"data.sample_n_frames is {config.data.sample_n_frames}; a linear start takes a multiple of {whole}"
        )
    loader = ClipLoader(rows, config.data, config.seed, grid=model.spatial_compression)
    with closing(loader.batches()) as batches:
        videos = (clip for batch in batches if batch.x.shape[2] % whole == 0 for clip in batch.x)
        clips = list(islice(videos, config.model.linear_start))
    try:
        model.start_linear(clips)
    except ValueError as error:
        raise TrainingError(f"model.linear_start is {config.model.linear_start}; {error}") from error
    _logger.info("the straight path fitted to %d clips", len(clips))


def _freeze(model: VideoAutoencoder, parts: list[str]) -> None:
    """Train nothing whose name begins with one of `parts`."""
    for part in parts:
        parameters = [p for name, p in model.named_weights() if f"{name}.".startswith(f"{part}.")]
        if not parameters:
            there = ", ".join(dict.fromkeys(name.split(".")[0] for name, _ in model.named_weights()))
            raise TrainingError(f"model.freeze names {part!r}, which {model.name} has not; its parts are {there}")
        for parameter in parameters:
            parameter.requires_grad = False
    if not model.trainable_params():
        raise TrainingError(f"model.freeze is {parts}; it must leave some of {model.name} to train")


def _adversary(config: TrainConfig, resumed: bool, world_size: int) -> Adversary | None:
    """The discriminator and its settings in stage 2; resumed, its weights come from the checkpoint."""
    if config.discriminator is None:
        return None
    settings = replace(config.discriminator, from_pretrained=None) if resumed else config.discriminator
    discriminator = NLayerDiscriminator3D(settings, config.model.dtype, world_size)
    return Adversary(discriminator, config.gen_loss_config, config.disc_loss_config, config.optim_discriminator)


def _scalars(result: StepResult, progress: Progress) -> dict[str, float]:
    """What the log has of an update; of the discriminator only if it was updated."""

    def of(update: UpdateResult) -> dict[str, float]:
        return {"grad_norm": update.grad_norm, "lr": update.lr, "loss_scale": update.loss_scale}

    scalars = {"loss": result.loss, **result.terms, **of(result), "skipped": progress.skipped}
    if result.discriminator is not None:
        scalars |= {f"disc_{name}": value for name, value in of(result.discriminator).items()}
        scalars["disc_skipped"] = progress.disc_skipped
    return scalars


def _compare_data(checkpoint: Path, noted: list[list[str]], config: TrainConfig) -> None:
    """Raise TrainingError where the rows are not those of the run, unless it may go on; then say how they differ."""
    before = read_run(checkpoint).get("data")
    if before is None:
        _logger.warning(
            "%s does not say which data it was trained on, as older versions did not: whether the rows of %s have "
            "changed since is not known, and the run goes on",
            checkpoint,
            config.csv_path,
        )
        return
    changes = one_line(describe_changes(before, noted))
    if changes and not config.resume_changed_data:
        raise TrainingError(
            f"{config.csv_path}: its rows are not those that {checkpoint} was trained on: {changes}. Give the CSV as "
            "it was, or --resume_changed_data to go on with these rows: from there on the run is another one"
        )
    if changes:
        _logger.warning("resuming with other data than before: %s", changes)


def _progress(run: dict) -> Progress:
    return Progress(**{name: value for name, value in run.items() if name != "data"})


def _say_what_changes(before: Progress, now: Progress) -> None:
    """Warn where a resumed run is not, from here on, the run that was begun."""

    def changes(**values: str) -> list[str]:
        pairs = {words: (getattr(before, name), getattr(now, name)) for name, words in values.items()}
        return [f"{words} {old} -> {new}" for words, (old, new) in pairs.items() if old not in (None, new)]

    if changed := changes(workers="workers", clips="clips per update"):
        _logger.warning(
            "resuming with other batches than before, %s: the order of the rows is another one from here on, so that "
            "some may come twice in this epoch and others not at all. The learning rate goes on by the number of the "
            "update; a decay ends with the last.",
            ", ".join([*changed, *changes(total="updates in all")]),
        )


def _write_config(path: Path, config: TrainConfig, start: int) -> None:
    """Write the run's settings, and say which of them differ from those that it was begun with."""
    settings = json.loads(json.dumps(to_dict(config)))
    if start and path.is_file():
        before, now = _flat(json.loads(path.read_text())), _flat(settings)
        changed = [key for key in now if not key.startswith("resume") and before.get(key) != now[key]]
        if changed:
            changes = ", ".join(f"{key} {before.get(key)} -> {now[key]}" for key in changed)
            _logger.warning("resuming with other settings than before: %s", changes)
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(settings, indent=2) + "\n")


def _flat(settings: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat: dict = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
