"""What a run trains: the settings that all runs share, and `Task`, where runs of different models differ."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mg import runtime
from mg.collectives import Group
from mg.config import require
from mg.data.index import IndexRow
from mg.data.loader import Batch, ClipLoader, DataConfig
from mg.models.stored import StoredModel
from mg.training.checkpoint import list_checkpoints
from mg.training.optim import OF_WHOLE, OptimConfig, OptimizerConfig
from mg.training.step import Step, StepResult


class TrainingError(ValueError):
    """A run that cannot continue."""


@dataclass(kw_only=True)
class RunConfig:
    """A training run of any model.

    Args:
        output_path: folder for everything the run writes.
        grad_checkpoint: gradient checkpointing: less memory, a third more time.
        plugin: zero2: devices shard optimizer states, gradients and moving averages, each updating its part of the
            parameters; null: each has the whole.
        optim: the model's optimizer.
        data: clips and batches.
        epochs: passes over the data.
        max_steps: most updates in the run, even if epochs would allow more.
        ckpt_save_interval: epochs between checkpoints.
        ckpt_save_steps: updates between checkpoints, instead of ckpt_save_interval.
        ckpt_max_keep: how many of the newest checkpoints are kept; 0 keeps all.
        resume: continue from the newest checkpoint in output_path, if there is one.
        resume_changed_data: resume even if the rows of the CSV are not those that the checkpoint was trained on, which
            makes it a different run.
        wandb: log to Weights & Biases too, which needs the package wandb; offline if there is no account.
        seed: for the parameters, the order of the data, crops and noise.
        device: auto picks the first available of ascend, gpu and cpu.
        mode: graph compiles once per shape, pynative runs op by op.
        jit_level: how much of the graph is fused: O0, O1, or O2 (Ascend only).
        deterministic: on Ascend, use kernels that return the same bits each time, so that a killed run resumes
            bit-exactly there too; false is faster.
    """

    output_path: str = "outputs/train"
    grad_checkpoint: bool = False
    plugin: Literal["zero2", "zero2-seq"] | None = None
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    epochs: int = 2000
    max_steps: int | None = None
    ckpt_save_interval: int = 50
    ckpt_save_steps: int | None = None
    ckpt_max_keep: int = 5
    resume: bool = False
    resume_changed_data: bool = False
    wandb: bool = False
    seed: int = 42
    device: Literal["auto", "ascend", "gpu", "cpu"] = "auto"
    mode: Literal["graph", "pynative"] = "graph"
    jit_level: Literal["O0", "O1", "O2"] = "O0"
    deterministic: bool = True

    def __post_init__(self):
        for name in ("epochs", "max_steps", "ckpt_save_interval", "ckpt_save_steps"):
            require(getattr(self, name) is None or getattr(self, name) >= 1, self, name, "at least 1")
        for name in ("ckpt_max_keep", "seed"):
            require(getattr(self, name) >= 0, self, name, "at least 0")
        if self.plugin is not None:
            for section in self._optimizers():
                wanted = f"none of {', '.join(OF_WHOLE)} with plugin {self.plugin}: their steps need whole parameters"
                require(section.name not in OF_WHOLE, section, "name", wanted)

    def _optimizers(self) -> list[OptimizerConfig]:
        return [self.optim]

    def sharers(self, worker: runtime.Runtime) -> Group | None:
        """The workers that shard what an update needs; None if each has the whole."""
        return None if self.plugin is None else Group.of(worker)

    def task(self) -> "Task":
        """What is trained."""
        raise NotImplementedError


class Task:
    """One run's model, data and step; `mg.training.trainer.train` calls the methods in the order they are defined here.

    Attributes:
        config: the run's.
        source: where the rows are read from, for messages.
        model, loader: what is trained and its data; set by `build`.
        step: computes gradients and makes the updates; set by `begin`.
        worker: this process, and the ones it shares tokens with; set by `build`.
    """

    source: str
    model: StoredModel
    loader: ClipLoader
    step: Step
    worker: runtime.Runtime

    def __init__(self, config: Any):
        self.config = config

    def find_checkpoint(self) -> Path | None:
        """The checkpoint that the run resumes from; None for a new run.

        Raises:
            TrainingError: there is one, but `resume` is not set.
        """
        output = Path(self.config.output_path)
        newest = next(reversed(list_checkpoints(output / "checkpoints")), None)
        if newest and not self.config.resume:
            raise TrainingError(
                f"{output} holds checkpoints of a run; continue it with --resume, or choose another folder"
            )
        return newest

    def read_rows(self) -> list[IndexRow]:
        """The data to train on."""
        raise NotImplementedError

    def build(self, rows: Sequence[IndexRow], worker: runtime.Runtime, newest: Path | None) -> None:
        """Make the model and the loader.

        Args:
            newest: the checkpoint that the run resumes from; its weights are loaded later.
        """
        raise NotImplementedError

    def begin(self, total: int, resumed: bool) -> None:
        """Make the step, for a run of `total` updates."""
        raise NotImplementedError

    def prepare(self, batch: Batch) -> tuple[np.ndarray, ...]:
        """The inputs of `step.accumulate` for a batch; it is compiled for every shape of the first one."""
        raise NotImplementedError

    def remark(self, step: int, result: StepResult) -> str | None:
        """A line to log after update number `step`, if any."""
        return None

    def draw(self, step: int) -> Path | None:
        """A picture of the model's output after `step` updates, if any."""
        return None

    def validate(self, step: int) -> dict[str, float] | None:
        """The `loss` after `step` updates on clips that are not trained on, and any further scalars; None if it is not
        due. All workers call this at the same time, before the first update and after every one."""
        return None


def freeze(model: StoredModel, parts: list[str]) -> None:
    """Freeze the parameters whose names begin with one of `parts`.

    Raises:
        TrainingError: the model has no such part, or nothing is left to train.
    """
    for part in parts:
        parameters = [p for name, p in model.named_weights() if f"{name}.".startswith(f"{part}.")]
        if not parameters:
            there = ", ".join(dict.fromkeys(name.split(".")[0] for name, _ in model.named_weights()))
            raise TrainingError(f"model.freeze names {part!r}, which {model.name} doesn't have; its parts are {there}")
        for parameter in parameters:
            parameter.requires_grad = False
    if not model.trainable_params():
        raise TrainingError(f"model.freeze is {parts}; it must leave some of {model.name} to train")
