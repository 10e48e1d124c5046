"""One training step, in two compiled parts: gradients of a batch, compiled for every shape, and the update, once.

The gradients are gathered in buffers, so accumulation over batches costs no second path. Between the parts the host
looks at their norm: where it is not finite the update is left out, and nothing has changed but the loss scale.
"""

from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, amp, nn, ops

from mg.losses.reconstruction import AutoencoderLoss
from mg.models.autoencoder import VideoAutoencoder
from mg.training.optim import OptimConfig, create_optimizer, learning_rates

_add = ops.MultitypeFuncGraph("add_gradient")
_average = ops.MultitypeFuncGraph("average_parameter")
_square = ops.MultitypeFuncGraph("square_sum")
_scale = ops.MultitypeFuncGraph("scale_gradient")
_assign = ops.MultitypeFuncGraph("assign_gradient")
_clear = ops.MultitypeFuncGraph("clear_gradient")


@_add.register("Tensor", "Tensor", "Tensor")
def _add_gradient(weight, total, gradient):
    return ops.assign_add(total, gradient * weight)


@_average.register("Tensor", "Tensor", "Tensor")
def _average_parameter(decay, average, parameter):
    return ops.assign(average, average * decay + parameter * (1.0 - decay))


@_square.register("Tensor")
def _square_sum(gradient):
    return gradient.square().sum()


@_scale.register("Tensor", "Tensor")
def _scale_gradient(factor, gradient):
    return gradient * factor


@_assign.register("Tensor", "Tensor")
def _assign_gradient(total, gradient):
    return ops.assign(total, gradient)


@_clear.register("Tensor")
def _clear_gradient(total):
    return ops.assign(total, ops.zeros_like(total))


@dataclass(frozen=True)
class StepResult:
    """What an update reports.

    Attributes:
        loss, terms: means over its batches.
        grad_norm: before clipping.
        updated: whether the parameters moved; they stay where the loss or a gradient is not finite.
        loss_scale, lr: that it was made with.
    """

    loss: float
    terms: dict[str, float]
    grad_norm: float
    updated: bool
    loss_scale: float
    lr: float


class TrainStep:
    """Gradients of a model under a loss, and the updates that follow from them.

    Args:
        total_steps: updates of the whole run, for the learning rate's schedule.
        world_size: workers whose gradients are averaged.

    Attributes:
        parameters: the trained parameters.
        averages: their moving averages, empty without EMA.
        rates: the learning rate of every update that moves the parameters.
    """

    def __init__(
        self,
        model: VideoAutoencoder,
        loss: AutoencoderLoss,
        config: OptimConfig,
        total_steps: int,
        dtype: str = "fp32",
        world_size: int = 1,
    ):
        self.loss = loss
        self.config = config
        self.parameters = ParameterTuple(model.trainable_params())
        self.averages = self.parameters.clone(prefix="ema") if config.ema_decay else ParameterTuple(())
        self.rates = learning_rates(config, total_steps)
        self.optimizer = create_optimizer(list(self.parameters), config, self.rates)
        dynamic = config.loss_scale == "dynamic" or (config.loss_scale == "auto" and dtype == "fp16")
        self.scaler = amp.DynamicLossScaler(config.init_loss_scale, 2, 2000) if dynamic else None

        gradients = self.parameters.clone(prefix="gradients", init="zeros")
        self._accumulate = _Accumulate(model, loss, self.parameters, gradients, 1 / config.accumulation)
        self._reduce = _Reduce(gradients, world_size)
        self._update = _Update(self.optimizer, self.parameters, self.averages, gradients, config.ema_decay)
        self._clear = _Clear(gradients)
        self._reports: list[tuple[Tensor, Tensor]] = []

    def accumulate(self, x: np.ndarray, noise: np.ndarray) -> None:
        """Add a batch's gradients. x (B, 3, T, H, W) in [-1, 1]; noise of the latents' shape."""
        self._reports.append(self._accumulate(Tensor(x), Tensor(noise), self._loss_scale()))

    def update(self) -> StepResult:
        """Move the parameters by the gradients gathered since the last update, and forget those."""
        scale = float(self._loss_scale().asnumpy())
        lr = self.rates[int(self.optimizer.global_step.asnumpy().item())]  # updates left out do not count
        losses, terms = zip(*self._reports)
        self._reports = []
        loss = float(np.mean([value.asnumpy() for value in losses]))
        norm = float(self._reduce().asnumpy()) / scale
        finite = bool(np.isfinite(norm))
        if finite:
            clip = self.config.clip_norm
            factor = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
            self._update(Tensor(factor / scale, ms.float32))
        self._clear()
        if self.scaler is not None:
            self.scaler.adjust(Tensor(finite))
        means = np.mean([value.asnumpy() for value in terms], axis=0)
        return StepResult(loss, dict(zip(self.loss.terms, map(float, means))), norm, finite, scale, lr)

    def state(self) -> dict[str, Parameter]:
        """Every parameter that an exact resume needs beside the model's own."""
        scaler = [self.scaler.scale_value, self.scaler.counter] if self.scaler else []
        optimizer = list(self.optimizer.moments1) + list(self.optimizer.moments2)
        optimizer += [self.optimizer.beta1_power, self.optimizer.beta2_power, self.optimizer.global_step]
        return {p.name: p for p in [*optimizer, *scaler, *self.averages]}

    def _loss_scale(self) -> Tensor:
        return Tensor(1.0, ms.float32) if self.scaler is None else self.scaler.scale_value.value()


# The parts hold parameters of the model and must not rename them, as a Cell does with those below it: auto_prefix.


class _Accumulate(nn.Cell):
    """Forward and backward of one batch; its gradients are added to the buffers."""

    def __init__(self, model, loss, parameters, gradients, weight):
        super().__init__(auto_prefix=False)
        self.model, self.loss = model, loss
        self.gradients = gradients
        self.weight = Tensor(weight, ms.float32)
        self.differentiate = ms.value_and_grad(self._scaled_loss, None, parameters, has_aux=True)
        self.map = ops.HyperMap()

    def _scaled_loss(self, x, noise, scale):
        y, z, mean, logvar = self.model.forward(x, noise)
        loss, terms = self.loss(x, y, z, mean, logvar)
        return loss * scale, loss, terms

    def construct(self, x, noise, scale):
        outputs, gradients = self.differentiate(x, noise, scale)
        loss, terms = outputs[1], outputs[2]
        # A loss that is not finite must show in the gradients, which all workers share: 0 * inf and 0 * nan are nan.
        weight = self.weight + 0.0 * loss
        self.map(ops.partial(_add, weight), self.gradients, gradients)
        return loss, terms


class _Reduce(nn.Cell):
    """The gathered gradients, averaged over the workers; returns their global norm."""

    def __init__(self, gradients, world_size):
        super().__init__(auto_prefix=False)
        self.gradients = gradients
        self.reducer = nn.DistributedGradReducer(gradients) if world_size > 1 else None
        self.map = ops.HyperMap()

    def construct(self):
        if self.reducer is not None:
            self.map(_assign, self.gradients, self.reducer(self.gradients))
        return ops.sqrt(ops.addn(self.map(_square, self.gradients)))


class _Update(nn.Cell):
    """Optimizer step and moving average."""

    def __init__(self, optimizer, parameters, averages, gradients, ema_decay):
        super().__init__(auto_prefix=False)
        self.optimizer = optimizer
        self.parameters, self.averages, self.gradients = parameters, averages, gradients
        self.decay = Tensor(ema_decay, ms.float32)
        self.map = ops.HyperMap()

    def construct(self, factor):
        self.optimizer(self.map(ops.partial(_scale, factor), self.gradients))
        if len(self.averages) > 0:
            self.map(ops.partial(_average, self.decay), self.averages, self.parameters)
        return factor


class _Clear(nn.Cell):
    """Zeros for the next gradients."""

    def __init__(self, gradients):
        super().__init__(auto_prefix=False)
        self.gradients = gradients
        self.map = ops.HyperMap()

    def construct(self):
        return self.map(_clear, self.gradients)
