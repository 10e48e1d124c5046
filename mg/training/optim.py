"""AdamW (Loshchilov and Hutter, arXiv:1711.05101) in MindSpore's fused kernel, with warm-up and decay."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import mindspore as ms
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

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


_shrink = ops.MultitypeFuncGraph("shrink_weight")
_adam = ops.MultitypeFuncGraph("adam")
_fused_adam = ops.Adam()


@_shrink.register("Tensor", "Tensor")
def _shrink_weight(kept, weight):
    return ops.assign(weight, weight * kept)


@_adam.register(*["Tensor"] * 8)
def _adam_kernel(rate, beta1, beta2, eps, parameter, moment1, moment2, gradient):
    # The kernel corrects its rate by powers of the betas, but not eps; with zeros as powers it takes both as they are.
    return _fused_adam(parameter, moment1, moment2, 0.0, 0.0, rate, beta1, beta2, eps, gradient)


class AdamW(nn.Cell):
    """AdamW, a kernel for each parameter; written in plain operators it kept 17 times the parameters' memory on a CPU.

    Args:
        rates: the learning rate of every update.

    Attributes:
        moments1, moments2: running means of the gradients and of their squares.
        global_step: updates made so far, (1,).
    """

    def __init__(self, parameters: Sequence[Parameter], config: AdamWConfig, rates: Sequence[float]):
        super().__init__(auto_prefix=False)  # the parameters keep their names
        self.config, self.rates = config, rates
        self.parameters = ParameterTuple(parameters)
        self.weights = ParameterTuple([p for p in parameters if p.ndim >= 2])  # biases and norms do not decay
        self.moments1 = self.parameters.clone(prefix="adam_m", init="zeros")
        self.moments2 = self.parameters.clone(prefix="adam_v", init="zeros")
        self.global_step = Parameter(Tensor([0], ms.int32), name="global_step")
        self.decays = config.weight_decay > 0 and len(self.weights) > 0
        self.beta1, self.beta2 = Tensor(config.beta1, ms.float32), Tensor(config.beta2, ms.float32)
        self.map = ops.HyperMap()

    def next_update(self) -> tuple[float, tuple[Tensor, Tensor, Tensor]]:
        """The next update's learning rate, and what it is called with beside the gradients: the rate and eps, both
        corrected for moments that began at zero, and what is kept of a weight that decays.

        Computed in 64 bits: 1 - beta2 has few digits in 32.
        """
        config, updates = self.config, int(self.global_step.asnumpy().item())
        lr, step = self.rates[updates], updates + 1
        root = math.sqrt(1 - config.beta2**step)
        values = (lr * root / (1 - config.beta1**step), config.eps * root, 1 - lr * config.weight_decay)
        return lr, tuple(Tensor(value, ms.float32) for value in values)

    def construct(self, gradients, rate, eps, kept):
        if self.decays:
            self.map(ops.partial(_shrink, kept), self.weights)
        adam = ops.partial(_adam, rate, self.beta1, self.beta2, eps)
        self.map(adam, self.parameters, self.moments1, self.moments2, gradients)
        return ops.assign_add(self.global_step, 1)
