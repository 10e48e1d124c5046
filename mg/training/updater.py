"""The update of one network: gradients gathered in a few flat buffers, then one compiled update, made only once.

Accumulating over batches thus needs no separate code path, and everything done before the optimizer splits the buffers
costs only a few kernels. Before an update the host checks the loss and the gradient norm: if either is not finite, the
update is skipped and only the loss scale changes.

With several workers, an update is the one that a single worker would make from the global batch. Workers may shard what
it needs besides the parameters, see `mg.training.shards`; then all of them must ask for states, averages or gradients
at the same time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, amp, nn, ops

from mg.collectives import Group
from mg.runtime import WorkerMean
from mg.training.flat import flats
from mg.training.optim import OptimizerConfig
from mg.training.optimizers import create_optimizer
from mg.training.schedules import learning_rates
from mg.training.shards import Shards


@dataclass(frozen=True)
class UpdateResult:
    """What an update of one network reports.

    Attributes:
        grad_norm: before clipping.
        updated: whether the parameters changed; they don't if the loss or a gradient is not finite.
        loss_scale, lr: used for this update.
    """

    grad_norm: float
    updated: bool
    loss_scale: float
    lr: float


class Updater:
    """Accumulates the gradients of one network and updates its parameters.

    Args:
        parameters: the network's trainable ones.
        total_steps: updates of the whole run, for the learning rate schedule.
        dtype: of the network; the loss is scaled for fp16.
        world_size: workers whose gradients are averaged.
        sharers: the workers that shard optimizer states, gradients and averages; None if each has the whole.

    Attributes:
        shards: this worker's, None if it has the whole.
        flats: the layouts of the next two, each a list of flat tensors.
        gradients: the buffers, for the loss times `loss_scale()`.
        averages: moving averages of the parameters, empty without EMA.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        config: OptimizerConfig,
        total_steps: int,
        dtype: str,
        world_size: int,
        ema_decay: float = 0.0,
        sharers: Group | None = None,
    ):
        self.config = config
        self.parameters = ParameterTuple(parameters)
        self.shards = None if sharers is None or sharers.size == 1 else Shards(self.parameters, sharers)
        own = self.parameters if self.shards is None else self.shards.own
        self.flats = nn.CellList(flats(own), auto_prefix=False) if self.shards is None else self.shards.flats
        self.gradients = self._parameters("gradients", [flat.zeros() for flat in self.flats])
        self.averages = ParameterTuple(())
        if ema_decay:
            self.averages = self._parameters("ema", [flat.values() for flat in self.flats])
        self.optimizer = create_optimizer(own, config, learning_rates(config, total_steps))
        dynamic = config.loss_scale == "dynamic" or (config.loss_scale == "auto" and dtype == "fp16")
        self.scaler = amp.DynamicLossScaler(config.init_loss_scale, 2, 2000) if dynamic else None
        self._reduce = _Reduce(self.flats, self.gradients, world_size, self.shards is not None)
        self._update = _Update(self.flats, self.optimizer, self.gradients, self.averages, ema_decay, self.shards)

    def update(self, finite: bool = True) -> UpdateResult:
        """Update the parameters with the gradients gathered since the last update, and clear those.

        Args:
            finite: whether their losses were; if not, the update is skipped.
        """
        scale = float(self.loss_scale().asnumpy())
        lr, settings = self.optimizer.next_update()  # a skipped update does not count
        norm = float(self._reduce().asnumpy()) / scale
        finite = finite and bool(np.isfinite(norm))
        if finite:
            clip = self.config.clip_norm
            factor = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
            self._update(Tensor(factor / scale, ms.float32), *settings)
            self.optimizer.count()
        else:
            self.forget()
        if self.scaler is not None:
            self.scaler.adjust(Tensor(finite))
        return UpdateResult(norm, finite, scale, lr)

    def gathered(self) -> dict[str, np.ndarray]:
        """The gradients gathered since the last update, by parameter name."""
        return {name: gradient.copy() for name, gradient in self._join(self._to_arrays(self.gradients)).items()}

    def gather(self, gradients: Mapping[str, np.ndarray]) -> None:
        """Replace the gathered gradients with these."""
        own = self._split(gradients)
        for flat, buffer in zip(self.flats, self.gradients):
            buffer.set_data(flat.from_arrays(own))

    def forget(self) -> None:
        """Clear the gradients gathered since the last update."""
        for flat, buffer in zip(self.flats, self.gradients):
            buffer.set_data(flat.zeros().init_data())

    def averaged(self) -> dict[str, np.ndarray]:
        """The moving averages, by parameter name; {} without EMA."""
        return self._join(self._to_arrays(self.averages))

    def loss_scale(self) -> Tensor:
        return Tensor(1.0, ms.float32) if self.scaler is None else self.scaler.scale_value.value()

    def state(self) -> dict[str, np.ndarray]:
        """Everything an exact resume needs besides the network's own parameters."""
        averages = {f"ema.{name}": average for name, average in self.averaged().items()}
        return self._join({name: p.asnumpy() for name, p in self._kept().items()}) | averages

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Load what `state` returned, with the same names and shapes; the network's parameters must already be
        loaded."""
        own = self._split(state)
        for name, parameter in self._kept().items():
            parameter.set_data(Tensor(own[name], parameter.dtype))
        if self.averages:
            averages = self._split({p.name: state[f"ema.{p.name}"] for p in self.parameters})
            for flat, average in zip(self.flats, self.averages):
                average.set_data(flat.from_arrays(averages))
        if self.shards is not None:
            self.shards.take()

    def held(self) -> int:
        """Bytes of gradients, averages and optimizer state on this worker."""
        shards = () if self.shards is None else self.shards.own
        return sum(p.nbytes for p in (*self.gradients, *self.averages, *self._kept().values(), *shards))

    def _split(self, arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return arrays if self.shards is None else self.shards.split(arrays)

    def _join(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return arrays if self.shards is None else self.shards.join(arrays)

    def _parameters(self, name: str, values: Sequence[Tensor]) -> ParameterTuple:
        return ParameterTuple(
            [Parameter(value, name=f"{name}.{index}", requires_grad=False) for index, value in enumerate(values)]
        )

    def _to_arrays(self, parameters: Sequence[Parameter]) -> dict[str, np.ndarray]:
        arrays: dict[str, np.ndarray] = {}
        for flat, parameter in zip(self.flats, parameters):
            arrays |= flat.to_arrays(parameter)
        return arrays

    def _kept(self) -> dict[str, Parameter]:
        scaler = [self.scaler.scale_value, self.scaler.counter] if self.scaler else []
        return {p.name: p for p in [*self.optimizer.state(), *scaler]}


# The parts hold parameters of the networks and must not rename them, as a Cell does with its children: auto_prefix.


class Gather(nn.Cell):
    """Base of the parts that add a batch's gradients to an updater's buffers."""

    def __init__(self, updater):
        super().__init__(auto_prefix=False)
        self.flats, self.gathered, self.shards = updater.flats, updater.gradients, updater.shards

    def gather(self, gradients):
        for index in range(len(self.flats) - 1, -1, -1):  # the order in which the backward pass produces them
            flat = self.flats[index]
            joined = flat.join(gradients) if self.shards is None else self.shards.scatter(flat, gradients)
            self.gathered[index].copy_(self.gathered[index] + joined)


class _Reduce(nn.Cell):
    """Averages the gathered gradients over the workers, unless they are shards, which are already averages; returns the
    norm."""

    def __init__(self, flats, gathered, world_size, sharded):
        super().__init__(auto_prefix=False)
        self.flats, self.gathered = flats, gathered
        self.over_workers = WorkerMean(world_size) if world_size > 1 and not sharded else None
        self.over_shards = ops.AllReduce() if sharded else None

    def construct(self):
        total = 0.0
        for flat, gathered in zip(self.flats, self.gathered):
            gradients = gathered
            if self.over_workers is not None:
                gradients = self.over_workers(gathered)
                gathered.copy_(gradients)
            total = total + flat.square_sum(gradients)
        return ops.sqrt(total if self.over_shards is None else self.over_shards(total))


class _Update(nn.Cell):
    """Optimizer step, moving average, and zeroed gradient buffers; with shards, also gathers the whole parameters."""

    def __init__(self, flats, optimizer, gathered, averages, ema_decay, shards):
        super().__init__(auto_prefix=False)
        self.flats, self.optimizer, self.gathered, self.averages = flats, optimizer, gathered, averages
        self.shards = shards
        self.parameters = optimizer.parameters
        self.decay = ema_decay

    def construct(self, factor, *settings):
        gradients = ()
        for flat, gathered in zip(self.flats, self.gathered):
            scaled = gathered * factor
            gradients = gradients + flat.split(scaled)
            gathered.copy_(scaled * 0.0)  # they are finite; zeros would be a constant as large as all parameters
        self.optimizer(gradients, *settings)
        for index in range(len(self.flats)):
            flat, averaged = self.flats[index], len(self.averages) > 0
            joined = flat.join(self.parameters) if averaged or self.shards is not None else None
            if averaged:
                average = self.averages[index]
                average.copy_(average * self.decay + joined * (1.0 - self.decay))
            if self.shards is not None:
                self.shards.gather(flat, joined)
        return factor
