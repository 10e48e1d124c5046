"""AdamW with warm-up and decay, from mindcv."""

from dataclasses import dataclass
from typing import Literal

from mindcv.optim.adamw import AdamW
from mindcv.scheduler import create_scheduler
from mindspore import Parameter


@dataclass
class OptimConfig:
    """AdamW and its learning rate.

    Args:
        lr: the highest learning rate.
        min_lr: the last one, where it decays.
        schedule: constant | cosine_decay | polynomial_decay, after the warm-up.
        warmup_steps: updates over which the rate climbs linearly from 0.
        beta1: decay of the mean of the gradients.
        beta2: decay of the mean of their squares.
        eps: added to the root of the latter.
        weight_decay: of weights, not of biases and norms.
        clip_norm: longest global norm of a gradient; 0 does not clip.
        accumulation: batches whose gradients are averaged for one update.
        ema_decay: of the moving average of the parameters; 0 keeps none.
        loss_scale: dynamic | none | auto; auto is dynamic for fp16 alone.
        init_loss_scale: where the dynamic loss scale starts.
        max_skipped: so many updates in a row with a non-finite loss or gradient end the run.
    """

    lr: float = 1e-5
    min_lr: float = 0.0
    schedule: Literal["constant", "cosine_decay", "polynomial_decay"] = "constant"
    warmup_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    accumulation: int = 1
    ema_decay: float = 0.0
    loss_scale: Literal["auto", "dynamic", "none"] = "auto"
    init_loss_scale: float = 1024.0
    max_skipped: int = 20


def learning_rates(config: OptimConfig, total_steps: int) -> list[float]:
    """The learning rate of every update, (total_steps,)."""
    warmup = min(config.warmup_steps, total_steps)
    rates = create_scheduler(
        steps_per_epoch=1,
        scheduler=config.schedule,
        lr=config.lr,
        min_lr=config.min_lr,
        warmup_epochs=warmup,
        decay_epochs=total_steps + 1 - warmup,
        num_epochs=total_steps + 1,
    )
    return rates[1 : total_steps + 1]  # a warm-up's first rate is 0, and an update with it would be wasted


def create_optimizer(parameters: list[Parameter], config: OptimConfig, rates: list[float]) -> AdamW:
    """AdamW over `parameters` with the learning rate of every update; those of one axis (biases, norms) do not decay."""
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
