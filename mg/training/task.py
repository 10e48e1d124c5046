"""What a run trains: the settings that all runs share, and what the runs of different models differ in, a `Task`."""

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
    """A run that cannot go on."""


@dataclass(kw_only=True)
class RunConfig:
    """A training run, of whatever model.

    Args:
        output_path: folder for all that the run writes.
        grad_checkpoint: recompute activations in the backward pass: less memory, a third more time.
        plugin: zero2: several devices share out optimizer states, gradients and moving averages, each updating its
            part of the parameters; null: each has the whole.
        optim: the model's optimizer.
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
        seed: of the parameters, the order of the data, crops and noise.
        device: auto takes ascend, gpu or cpu, the first that is there.
        mode: graph compiles once per shape, pynative runs op by op.
        jit_level: how far the graph is fused: O0, O1, or O2 (Ascend only).
        deterministic: on Ascend, have every kernel give the same bits each time, so that a run that was killed resumes
            to the bit there too; false is faster.
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
                wanted = f"none of {', '.join(OF_WHOLE)} with plugin {self.plugin}: their steps take whole parameters"
                require(section.name not in OF_WHOLE, section, "name", wanted)

    def _optimizers(self) -> list[OptimizerConfig]:
        return [self.optim]

    def sharers(self, worker: runtime.Runtime) -> Group | None:
        """The workers that share out what an update takes; None if each has the whole."""
        return None if self.plugin is None else Group.of(worker)

    def task(self) -> "Task":
        """What is trained."""
        raise NotImplementedError


class Task:
    """One run's model, data and step; `mg.training.trainer.train` calls the methods in the order of this class.

    Attributes:
        config: the run's.
        source: what the rows are read from, for messages.
        model, loader: what is trained and what on, from `build` on.
        step: the gradients of batches and the updates that follow from them, from `begin` on.
        worker: this process, and whom it shares tokens with, from `build` on.
    """

    source: str
    model: StoredModel
    loader: ClipLoader
    step: Step
    worker: runtime.Runtime

    def __init__(self, config: Any):
        self.config = config

    def find_checkpoint(self) -> Path | None:
        """The checkpoint that the run goes on from; None where it begins.

        Raises:
            TrainingError: there is one, but the run is not to go on.
        """
        output = Path(self.config.output_path)
        newest = next(reversed(list_checkpoints(output / "checkpoints")), None)
        if newest and not self.config.resume:
            raise TrainingError(
                f"{output} holds checkpoints of a run; continue it with --resume, or choose another folder"
            )
        return newest

    def read_rows(self) -> list[IndexRow]:
        """What is trained on."""
        raise NotImplementedError

    def build(self, rows: Sequence[IndexRow], worker: runtime.Runtime, newest: Path | None) -> None:
        """Make the model and the loader.

        Args:
            newest: the checkpoint that the run goes on from, whose weights the model gets later.
        """
        raise NotImplementedError

    def begin(self, total: int, resumed: bool) -> None:
        """Make the step, of a run of so many updates."""
        raise NotImplementedError

    def prepare(self, batch: Batch) -> tuple[np.ndarray, ...]:
        """What `step.accumulate` is given of a batch; it is compiled for every shape of the first of these."""
        raise NotImplementedError

    def remark(self, step: int, result: StepResult) -> str | None:
        """A line to say after update number `step`, if any."""
        return None

    def draw(self, step: int) -> Path | None:
        """A picture of what the model has learnt after `step` updates, if any."""
        return None

    def validate(self, step: int) -> dict[str, float] | None:
        """The `loss` after `step` updates on clips that nothing is learnt from, and whatever else is told of it; None
        where it is not measured now. All workers ask at the same time, before the first update and after every one."""
        return None


def freeze(model: StoredModel, parts: list[str]) -> None:
    """Train nothing whose name begins with one of `parts`.

    Raises:
        TrainingError: the model has no such part, or nothing is left to train.
    """
    for part in parts:
        parameters = [p for name, p in model.named_weights() if f"{name}.".startswith(f"{part}.")]
        if not parameters:
            there = ", ".join(dict.fromkeys(name.split(".")[0] for name, _ in model.named_weights()))
            raise TrainingError(f"model.freeze names {part!r}, which {model.name} has not; its parts are {there}")
        for parameter in parameters:
            parameter.requires_grad = False
    if not model.trainable_params():
        raise TrainingError(f"model.freeze is {parts}; it must leave some of {model.name} to train")
