"""The training loop of every model.

A run is a pure function of its config: the batch and the noise of update s depend on (seed, s, rank) alone. So a run
that was killed resumes from its newest checkpoint with the very losses that it would have had.
"""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mg import runtime
from mg.checkpoints import atomic_write
from mg.config import to_dict
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


class TrainingError(ValueError):
    """A run that cannot go on."""


def train(config: TrainConfig) -> Path:
    """Train as `config` says; returns the weights of the end, `<model>.ckpt` in the output folder.

    Raises:
        ValueError: a config, file or data set that training cannot work with, or a run that diverged.
    """
    worker = runtime.setup(config.device, config.mode, config.seed, config.jit_level)
    output = Path(config.output_path)
    checkpoints = list_checkpoints(output / "checkpoints")
    if checkpoints and not config.resume:
        raise TrainingError(f"{output} holds checkpoints of a run; continue it with --resume, or choose another folder")

    rows = read_index(config.csv_path, config.video_folder)
    loader = ClipLoader(
        rows,
        config.data,
        seed=config.seed,
        rank=worker.rank,
        world_size=worker.world_size,
    )
    per_update = config.optim.accumulation
    per_epoch = max(1, loader.steps_per_epoch // per_update)
    total = min(config.epochs * per_epoch, config.max_steps or config.epochs * per_epoch)
    save_every = config.ckpt_save_steps or config.ckpt_save_interval * per_epoch

    settings = config.model
    model = create_model(
        settings.name, settings.pretrained, settings.dtype, settings.use_recompute, **settings.config
    )
    model.set_train()
    step = TrainStep(model, AutoencoderLoss(config.loss), config.optim, total, settings.dtype, worker.world_size)

    start, skipped = 0, 0
    if checkpoints:
        run = load_checkpoint(checkpoints[-1], model, step)
        start, skipped = run["step"], run["skipped"]
        _logger.info("resuming %s after update %d", checkpoints[-1], start)
    if not worker.is_main:
        _loop(config, loader, model, step, start, total, worker.rank, lambda *_: None)
        return output / f"{model.name}.ckpt"

    output.mkdir(parents=True, exist_ok=True)
    with atomic_write(output / "config.json") as partial:
        partial.write_text(json.dumps(to_dict(config), indent=2) + "\n")
    log = RunLog(output, start, total)
    _logger.info(
        "%s: %.1fM parameters, %d clips, %d updates of %d x %d, %s mode on %s",
        model.name,
        sum(p.size for p in step.parameters) / 1e6,
        len(rows),
        total,
        per_update * worker.world_size,
        config.data.batch_size,
        config.mode,
        worker.device,
    )

    def after_update(index: int, result: StepResult) -> None:
        nonlocal skipped
        skipped += not result.updated
        scalars = {"loss": result.loss, **result.terms, "grad_norm": result.grad_norm}
        log.add(index, {**scalars, "loss_scale": result.loss_scale, "lr": step.rates[index], "skipped": skipped})
        if (index + 1) % save_every == 0 or index + 1 == total:
            save_checkpoint(
                output / "checkpoints", index + 1, model, step, {"skipped": skipped}, config.ckpt_max_keep
            )
            log.draw()

    try:
        _loop(config, loader, model, step, start, total, worker.rank, after_update)
    finally:
        log.close()
    if skipped:
        _logger.warning("%d of %d updates were left out: their loss or gradient was not finite", skipped, total)
    if loader.bad_files:
        _logger.warning("%d files could not be used, e.g. %s", len(loader.bad_files), next(iter(loader.bad_files)))
    weights = {p.name: a.asnumpy() for p, a in zip(step.parameters, step.averages)}
    model.save_weights(output / f"{model.name}.ckpt", weights=weights)
    return output / f"{model.name}.ckpt"


def _loop(config, loader, model: VideoAutoencoder, step: TrainStep, start, total, rank, after_update) -> None:
    """Updates `start` to `total`; `after_update(index, result)` follows each."""
    per_update = config.optim.accumulation
    batches = loader.batches(start * per_update)
    in_a_row = 0
    try:
        for index in range(start, total):
            for _ in range(per_update):
                batch = next(batches)
                generator = np.random.default_rng([config.seed, batch.step, rank])
                noise = generator.standard_normal(model.latent_shape(batch.x.shape), dtype=np.float32)
                step.accumulate(batch.x, noise)
            result = step.update()
            in_a_row = 0 if result.updated else in_a_row + 1
            after_update(index, result)
            if in_a_row >= config.optim.max_skipped:
                raise TrainingError(
                    f"the loss or its gradient was not finite in {in_a_row} updates in a row, up to update {index + 1}; "
                    "lower --optim.lr, or train in fp32 or bf16"
                )
    finally:
        batches.close()
