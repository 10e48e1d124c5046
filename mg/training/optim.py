"""Settings of an optimizer and its learning rate, and which options each optimizer and schedule accepts."""

import importlib
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any, Literal

from mg.config import require

# The options of each optimizer and their defaults, those of its paper.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8},
    "lion": {"beta1": 0.9, "beta2": 0.99},
    "adan": {"beta1": 0.98, "beta2": 0.92, "beta3": 0.99, "eps": 1e-8},
    "nadam": {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8},
    "sgd": {"momentum": 0.0, "nesterov": False},
    "momentum": {"momentum": 0.9, "nesterov": False},
    "lamb": {"beta1": 0.9, "beta2": 0.999, "eps": 1e-6},
    "muon": {"momentum": 0.95, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8},
}

# The same for each schedule; None means required.
SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {},
    "cosine_decay": {},
    "linear_decay": {},
    "polynomial_decay": {"power": 1.0},
    "exponential_decay": {"decay_steps": None, "decay_rate": 0.1},
    "step_decay": {"decay_steps": None, "decay_rate": 0.1},
    "multi_step_decay": {"milestones": None, "decay_rate": 0.1},
    "cosine_restarts": {"num_cycles": 1, "cycle_decay": 1.0},
    "one_cycle": {"pct_start": 0.3},
    "cyclic": {"num_cycles": 1, "cycle_decay": 1.0},
}

OF_WHOLE = ("lamb", "muon")  # their steps depend on the whole parameter, so a shard of it cannot be updated

_OF_MANY = ("beta1", "beta2", "eps")  # set in nearly every config, so other optimizers ignore them


@dataclass
class OptimizerConfig:
    """One network's optimizer and learning rate. Options that are null get the optimizer's or schedule's default.

    Args:
        name: adamw | lion | adan | nadam | sgd | momentum | lamb | muon; momentum is sgd with a momentum of 0.9.
        lr: the highest learning rate.
        min_lr: the lowest after the warm-up, where a decay ends.
        schedule: of the learning rate after the warm-up: constant | cosine_decay | linear_decay | polynomial_decay |
            exponential_decay | step_decay | multi_step_decay | cosine_restarts | one_cycle | cyclic.
        warmup_steps: updates over which the rate climbs linearly from 0 to lr.
        decay_steps: exponential_decay, step_decay: updates in which the rate falls by decay_rate, gradually or at once.
        decay_rate: exponential_decay, step_decay, multi_step_decay: factor on the rate.
        milestones: multi_step_decay: the updates after which the rate falls, counted from the start of the run.
        power: polynomial_decay: exponent on the remaining share of the run.
        num_cycles: cosine_restarts, cyclic: cycles in the run.
        cycle_decay: cosine_restarts, cyclic: factor on the highest rate from one cycle to the next.
        pct_start: one_cycle: share of the run in which the rate climbs.
        beta1: adamw, lion, adan, nadam, lamb: decay of the mean of the gradients; muon: the same, for biases and norms.
        beta2: adamw, nadam, lamb, muon: decay of the mean of their squares; adan: of the mean of their changes; lion:
            of the mean kept for the next update (beta1 is for the current one).
        beta3: adan: decay of the mean of squares.
        eps: adamw, adan, nadam, lamb, muon: added to the root of the mean of squares.
        momentum: sgd, momentum, muon: share of the last update's direction that is kept.
        nesterov: sgd, momentum: use Nesterov momentum.
        weight_decay: for weights, not for biases and norms.
        clip_norm: largest global gradient norm; 0 does not clip.
        loss_scale: dynamic | none | auto; auto is dynamic only for fp16.
        init_loss_scale: where the dynamic loss scale starts.
        max_skipped: this many updates in a row with a non-finite loss or gradient end the run.
    """

    name: Literal["adamw", "lion", "adan", "nadam", "sgd", "momentum", "lamb", "muon"] = "adamw"
    lr: float = 1e-5
    min_lr: float = 0.0
    schedule: Literal[
        "constant",
        "cosine_decay",
        "linear_decay",
        "polynomial_decay",
        "exponential_decay",
        "step_decay",
        "multi_step_decay",
        "cosine_restarts",
        "one_cycle",
        "cyclic",
    ] = "constant"
    warmup_steps: int = 0
    decay_steps: int | None = None
    decay_rate: float | None = None
    milestones: list[int] | None = None
    power: float | None = None
    num_cycles: int | None = None
    cycle_decay: float | None = None
    pct_start: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    beta3: float | None = None
    eps: float | None = None
    momentum: float | None = None
    nesterov: bool = False
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    loss_scale: Literal["auto", "dynamic", "none"] = "auto"
    init_loss_scale: float = 1024.0
    max_skipped: int = 20

    def __post_init__(self):
        self._require_fitting("name", OPTIMIZERS)
        self._require_fitting("schedule", SCHEDULES)
        require(self.lr > 0, self, "lr", "above 0")
        require(0 <= self.min_lr <= self.lr, self, "min_lr", f"from 0 to lr, {self.lr}")
        for name in ("beta1", "beta2", "beta3", "momentum", "pct_start"):
            require(0 <= (getattr(self, name) or 0) < 1, self, name, "at least 0 and below 1")
        for name in ("warmup_steps", "weight_decay", "clip_norm"):
            require(getattr(self, name) >= 0, self, name, "at least 0")
        for name in ("max_skipped", "init_loss_scale", "decay_steps", "num_cycles"):
            require(getattr(self, name) is None or getattr(self, name) >= 1, self, name, "at least 1")
        for name in ("eps", "power"):
            require(getattr(self, name) is None or getattr(self, name) > 0, self, name, "above 0")
        for name in ("decay_rate", "cycle_decay"):
            require(getattr(self, name) is None or 0 < getattr(self, name) <= 1, self, name, "above 0, and 1 at most")
        updates = [0, *(self.milestones or [1])]
        rising = len(updates) > 1 and all(earlier < later for earlier, later in pairwise(updates))
        require(self.milestones != [] and rising, self, "milestones", "numbers of updates, each above the one before")
        if self.schedule in ("one_cycle", "cyclic"):
            require(
                self.warmup_steps == 0, self, "warmup_steps", f"0 with schedule {self.schedule}, which climbs itself"
            )
        if self.nesterov:
            require(self.optimizer_options()["momentum"] > 0, self, "nesterov", "false if momentum is 0")

    def optimizer_options(self) -> dict[str, Any]:
        """The options of its optimizer."""
        return self._options(OPTIMIZERS[self.name])

    def schedule_options(self) -> dict[str, Any]:
        """The options of its schedule."""
        return self._options(SCHEDULES[self.schedule])

    def _options(self, taken: dict[str, Any]) -> dict[str, Any]:
        given = {name: getattr(self, name) for name in taken}
        return {name: taken[name] if value is None else value for name, value in given.items()}

    def _require_fitting(self, choice: str, table: dict[str, dict[str, Any]]) -> None:
        """Raise ValueError if an option is given that the choice does not accept, or a required one is missing."""
        chosen = getattr(self, choice)
        require(chosen in table, self, choice, f"one of {', '.join(table)}")
        for name in dict.fromkeys(name for options in table.values() for name in options):
            value = getattr(self, name)
            if name in table[chosen]:
                missing = value is None and table[chosen][name] is None
                require(not missing, self, name, f"given with {choice} {chosen}")
            elif name not in _OF_MANY:
                nothing = "false" if isinstance(value, bool) else "null"
                require(value in (None, False), self, name, f"{nothing} with {choice} {chosen}")


@dataclass
class OptimConfig(OptimizerConfig):
    """The autoencoder's optimizer.

    Args:
        accumulation: batches whose gradients are averaged for one update.
        ema_decay: decay of the moving average of the parameters; 0 disables it.
    """

    accumulation: int = 1
    ema_decay: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        require(0 <= self.ema_decay < 1, self, "ema_decay", "at least 0 and below 1")
        require(self.accumulation >= 1, self, "accumulation", "at least 1")


def import_mindcv(module: str, asked_for: str) -> ModuleType:
    """A module of mindcv, imported only when needed, because it pulls in all of mindcv's networks.

    Raises:
        ValueError: mindcv is not installed.
    """
    try:
        return importlib.import_module(f"mindcv.{module}")
    except ImportError as error:
        raise ValueError(
            f"{asked_for} is mindcv's, which is not installed ({error}): pip install mindcv==0.3.0 'numpy<2'"
        ) from error
