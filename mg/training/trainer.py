"""The training loop of every model.

A run is a pure function of its config: the batch and the noise of update s depend on (seed, s, rank) alone. So a run
that was killed resumes from its newest checkpoint with the very losses that it would have had.
"""

import json
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mg import runtime
from mg.checkpoints import atomic_write
from mg.config import require, to_dict
from mg.data.index import read_index
from mg.data.loader import ClipLoader, DataConfig
from mg.losses.reconstruction import AutoencoderLoss, LossConfig
from mg.models import create_model
from mg.models.autoencoder import VideoAutoencoder
from mg.training.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from mg.training.logs import RunLog
from mg.training.optim import OptimConfig
from mg.training.step import StepResult, TrainStep

_logger = logging.getLogger(__name__)


@dataclass
class ModelConfig:
    """The autoencoder.

    Args:
        name: which model, see `mg.models.list_models`.
        pretrained: weights to start from, a file or folder; none starts from random ones.
        config: overrides of the model's config.
        dtype: precision of convolutions and products; parameters, norms and losses stay in fp32.
        use_recompute: recompute activations in the backward pass: less memory, a third more time.
    """

    name: str = "tae"
    pretrained: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    use_recompute: bool = False


@dataclass
class TrainConfig:
    """A training run.

    Args:
        csv_path: the videos and images to train on, a CSV with a column `video` or `path`.
        output_path: folder for all that the run writes.
        video_folder: folder that the CSV's paths are relative to, by default the CSV's own.
        model: the autoencoder.
        loss: the loss.
        optim: the optimizer.
        data: clips and batches.
        epochs: passes over the data.
        max_steps: updates after which the run ends, whatever epochs says.
        ckpt_save_interval: epochs between checkpoints.
        ckpt_save_steps: updates between checkpoints, in place of ckpt_save_interval.
        ckpt_max_keep: how many of the newest checkpoints are kept; 0 keeps all.
        resume: go on from the newest checkpoint in output_path, if there is one.
        seed: of the parameters, the order of the data, crops and noise.
        device: auto takes ascend, gpu or cpu, the first that is there.
        mode: graph compiles once per shape, pynative runs op by op.
        jit_level: how far the graph is fused: O0, O1, or O2 (Ascend only).
    """

    csv_path: str
    output_path: str = "outputs/train"
    video_folder: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    epochs: int = 2000
    max_steps: int | None = None
    ckpt_save_interval: int = 50
    ckpt_save_steps: int | None = None
    ckpt_max_keep: int = 5
    resume: bool = False
    seed: int = 42
    device: Literal["auto", "ascend", "gpu", "cpu"] = "auto"
    mode: Literal["graph", "pynative"] = "graph"
    jit_level: Literal["O0", "O1", "O2"] = "O0"

    def __post_init__(self):
        for name in ("epochs", "max_steps", "ckpt_save_interval", "ckpt_save_steps"):
            require(getattr(self, name) is None or getattr(self, name) >= 1, self, name, "at least 1")
        for name in ("ckpt_max_keep", "seed"):
            require(getattr(self, name) >= 0, self, name, "at least 0")


class TrainingError(ValueError):
    """A run that cannot go on."""


@dataclass
class Progress:
    """Where a run stands: updates done, and those of them that were left out, in all and last in a row."""

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0


def train(config: TrainConfig) -> Path:
    """Train as `config` says; returns the weights of the end, `<model>.ckpt` in the output folder.

    Raises:
        ValueError: a config, file or data set that training cannot work with, or a run that diverged.
        OSError: a file that cannot be written.
    """
    worker = runtime.setup(config.device, config.mode, config.seed, config.jit_level)
    output = Path(config.output_path)
    newest = next(reversed(list_checkpoints(output / "checkpoints")), None)
    if newest and not config.resume:
        raise TrainingError(f"{output} holds checkpoints of a run; continue it with --resume, or choose another folder")

    rows = read_index(config.csv_path, config.video_folder)
    loader = ClipLoader(rows, config.data, seed=config.seed, rank=worker.rank, world_size=worker.world_size)
    per_update = config.optim.accumulation
    per_epoch = max(1, loader.steps_per_epoch // per_update)
    total = min(config.epochs * per_epoch, config.max_steps or config.epochs * per_epoch)
    save_every = config.ckpt_save_steps or config.ckpt_save_interval * per_epoch

    settings = config.model
    source = newest or settings.pretrained
    model = create_model(settings.name, source, settings.dtype, settings.use_recompute, **settings.config)
    model.set_train()
    step = TrainStep(model, AutoencoderLoss(config.loss), config.optim, total, settings.dtype, worker.world_size)
    progress = Progress(**load_checkpoint(newest, model, step)) if newest else Progress()

    weights = output / f"{model.name}.ckpt"
    with closing(_updates(config, loader, model, step, progress, total, worker.rank)) as updates:
        if not worker.is_main:
            for _ in updates:
                pass
            return weights
        _write_config(output / "config.json", config, progress.step)
        _logger.info(
            "%s: %.1fM parameters, %d rows, updates %d to %d of %d x %d, %s mode on %s",
            model.name,
            sum(p.size for p in step.parameters) / 1e6,
            len(rows),
            progress.step + 1,
            total,
            per_update * worker.world_size,
            config.data.batch_size,
            config.mode,
            worker.device,
        )
        with closing(RunLog(output, progress.step, total)) as log:
            for result in updates:
                scalars = {"loss": result.loss, **result.terms, "grad_norm": result.grad_norm, "lr": result.lr}
                scalars |= {"loss_scale": result.loss_scale, "skipped": progress.skipped}
                log.add(progress.step - 1, scalars)
                if progress.step % save_every == 0 or progress.step == total:
                    log.save()
                    save_checkpoint(output / "checkpoints", model, step, asdict(progress), config.ckpt_max_keep)
    if progress.skipped:
        _logger.warning("%d of %d updates left out: their loss or gradient was not finite", progress.skipped, total)
    if loader.bad_files:
        _logger.warning("%d files could not be used, e.g. %s", len(loader.bad_files), next(iter(loader.bad_files)))
    model.save_weights(weights, weights={p.name: a.asnumpy() for p, a in zip(step.parameters, step.averages)})
    return weights


def _updates(
    config: TrainConfig,
    loader: ClipLoader,
    model: VideoAutoencoder,
    step: TrainStep,
    progress: Progress,
    total: int,
    rank: int,
) -> Iterator[StepResult]:
    """Make the updates that are left of `total`, and move `progress` on before the result of each is given out."""
    per_update, max_skipped = config.optim.accumulation, config.optim.max_skipped
    with closing(loader.batches(progress.step * per_update)) as batches:
        while progress.step < total:
            for batch in islice(batches, per_update):
                generator = np.random.default_rng([config.seed, batch.step, rank])
                noise = generator.standard_normal(model.latent_shape(batch.x.shape), dtype=np.float32)
                step.accumulate(batch.x, noise)
            result = step.update()
            _take_back_ctrl_c()
            progress.step += 1
            progress.skipped += not result.updated
            progress.skipped_in_a_row = 0 if result.updated else progress.skipped_in_a_row + 1
            yield result
            if progress.skipped_in_a_row >= max_skipped:
                raise TrainingError(
                    f"the loss or its gradient was not finite in {max_skipped} updates in a row, the last being number "
                    f"{progress.step}; lower --optim.lr, or train in fp32 or bf16"
                )


def _take_back_ctrl_c() -> None:
    """MindSpore's compiler leaves a handler behind that kills the process at once; Python's lets it close its files."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, handler)


def _write_config(path: Path, config: TrainConfig, start: int) -> None:
    """Write the run's settings, and say which of them differ from those that it was begun with."""
    settings = json.loads(json.dumps(to_dict(config)))
    if start and path.is_file():
        before, now = _flat(json.loads(path.read_text())), _flat(settings)
        changed = [key for key in now if key != "resume" and before.get(key) != now[key]]
        if changed:
            changes = ", ".join(f"{key} {before.get(key)} -> {now[key]}" for key in changed)
            _logger.warning("resuming with other settings than before: %s", changes)
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(settings, indent=2) + "\n")


def _flat(settings: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
