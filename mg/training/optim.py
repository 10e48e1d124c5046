"""AdamW, from mindcv, with warm-up and decay."""

import math
from dataclasses import dataclass
from typing import Literal

from mindcv.optim.adamw import AdamW
from mindspore import Parameter

from mg.config import require


@dataclass
class AdamWConfig:
    """AdamW and its learning rate, for one network.

    Args:
        lr: the highest learning rate.
        min_lr: what it decays to, at the end of the run.
        schedule: constant | cosine_decay | linear_decay, after the warm-up.
        warmup_steps: updates over which the rate climbs linearly from 0 to lr.
        beta1: decay of the mean of the gradients.
        beta2: decay of the mean of their squares.
        eps: added to the root of the latter.
        weight_decay: of weights, not of biases and norms.
        clip_norm: longest global norm of a gradient; 0 does not clip.
        loss_scale: dynamic | none | auto; auto is dynamic for fp16 alone.
        init_loss_scale: where the dynamic loss scale starts.
        max_skipped: so many updates in a row with a non-finite loss or gradient end the run.
    """

    lr: float = 1e-5
    min_lr: float = 0.0
    schedule: Literal["constant", "cosine_decay", "linear_decay"] = "constant"
    warmup_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    loss_scale: Literal["auto", "dynamic", "none"] = "auto"
    init_loss_scale: float = 1024.0
    max_skipped: int = 20

    def __post_init__(self):
        require(self.lr > 0, self, "lr", "above 0")
        require(0 <= self.min_lr <= self.lr, self, "min_lr", f"from 0 to lr, {self.lr}")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, self, name, "at least 0 and below 1")
        for name in ("warmup_steps", "weight_decay", "clip_norm"):
            require(getattr(self, name) >= 0, self, name, "at least 0")
        for name in ("max_skipped", "init_loss_scale"):
            require(getattr(self, name) >= 1, self, name, "at least 1")
        require(self.eps > 0, self, "eps", "above 0")


@dataclass
class OptimConfig(AdamWConfig):
    """The autoencoder's optimizer.

    Args:
        accumulation: batches whose gradients are averaged for one update.
        ema_decay: of the moving average of the parameters; 0 keeps none.
    """

    accumulation: int = 1
    ema_decay: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        require(0 <= self.ema_decay < 1, self, "ema_decay", "at least 0 and below 1")
        require(self.accumulation >= 1, self, "accumulation", "at least 1")


def learning_rates(config: AdamWConfig, total_steps: int) -> list[float]:
    """The learning rate of every update, (total_steps,); neither a warm-up's first nor a decay's last is 0."""
    warmup = min(config.warmup_steps, total_steps)

    def rate(step: int) -> float:
        if step < warmup:
            return config.lr * step / warmup
        progress = (step - warmup) / (total_steps + 1 - warmup)  # below 1
        left = {
            "constant": 1.0,
            "cosine_decay": 0.5 * (1.0 + math.cos(math.pi * progress)),
            "linear_decay": 1.0 - progress,
        }
        return config.min_lr + (config.lr - config.min_lr) * left[config.schedule]

    return [rate(step) for step in range(1, total_steps + 1)]


def create_optimizer(parameters: list[Parameter], config: AdamWConfig, rates: list[float]) -> AdamW:
    """AdamW with the learning rate of every update; parameters of one axis (biases, norms) do not decay."""
    vectors = [p for p in parameters if p.ndim < 2]
    weights = [p for p in parameters if p.ndim >= 2]
    groups = [{"params": weights, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return AdamW(
        [group for group in groups if group["params"]] + [{"order_params": parameters}],
        learning_rate=rates,
        beta1=config.beta1,
        beta2=config.beta2,
        eps=config.eps,
    )
