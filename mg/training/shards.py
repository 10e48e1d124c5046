"""Optimizer states, gradients and moving averages sharded over the workers: ZeRO stage 2 (arXiv 1910.02054).

Every worker has all parameters, and a shard of each, an equal part of its values: it gathers gradients for its shards
and updates them. ReduceScatter sends a batch's gradients to the workers, and AllGather sends the updated shards to all
of them, both in flat tensors.

MindSpore's own, `AutoParallel.hsdp`, needs the whole training step in a single graph on Ascend; here the host checks
the gradient norm between the parts of a step, and everything is tested on CPUs. The collectives are the same.
"""

from collections.abc import Mapping, Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, mint, nn, ops

from mg.collectives import AllGather, Group, ReduceScatter
from mg.models.layers.layout import zeros_behind
from mg.training.flat import LARGEST, ROW, Flat, flats

_SUFFIX = ".shard"  # of the shards' names, and so of their optimizer states

_spread = ops.MultitypeFuncGraph("spread")
_take_back = ops.MultitypeFuncGraph("take_back")


@_spread.register("Number", "Tensor")
def _spread_over_workers(workers, x):
    """(workers, values of a shard)"""
    return zeros_behind(x.reshape(-1), 0, -x.size % workers).reshape(workers, -1)


@_take_back.register("Tensor", "Tensor", "Tensor", "Number")
def _take_parameter_back(whole, parameter, shard, begin):
    # A product is contiguous, unlike a view, and CANN ships its kernel precompiled, unlike the one that copies views.
    values = (mint.narrow(whole, 1, begin, shard.size) * 1.0).reshape(-1)
    if values.size > parameter.size:
        values = mint.narrow(values, 0, 0, parameter.size) * 1.0
    return parameter.copy_(values.reshape(parameter.shape))


class Shards(nn.Cell):
    """This worker's shards of a network's parameters; a parameter's shards have the same length on all workers.

    `scatter` and `gather` are meant to be compiled, the others run on the host, on all workers at the same time.

    Attributes:
        own: the shards, in the order of the parameters; (1, values) for a weight, (values,) for a bias or a norm, as
            optimizers tell them apart by the number of axes.
        flats: their layout.
    """

    def __init__(self, parameters: Sequence[Parameter], group: Group):
        super().__init__(auto_prefix=False)
        self.workers, self.rank = group.size, group.rank
        self.parameters = ParameterTuple(parameters)
        self.by_name = {p.name: p for p in parameters}
        self.own = ParameterTuple([self._shard(p) for p in parameters])
        self.flats = nn.CellList(flats(self.own, LARGEST // self.workers), auto_prefix=False)
        self.collect, self.reduce = AllGather(group), ReduceScatter(group)
        self.map = ops.HyperMap()

    def scatter(self, flat: Flat, gradients: Sequence[Tensor]) -> Tensor:
        """Average the gradients of the network's parameters over the workers; returns this worker's shards, in a flat
        tensor."""
        parts = self.map(ops.partial(_spread, self.workers), gradients[flat.first : flat.last])
        rest = flat.rows * ROW - flat.total
        if rest:
            parts = parts + (mint.zeros((self.workers, rest)),)
        joined = ops.cat(parts, axis=1).reshape(self.workers * flat.rows, ROW)
        return self.reduce(joined) * (1.0 / self.workers)

    def gather(self, flat: Flat, joined: Tensor) -> None:
        """Set a flat tensor's parameters to the shards that the workers have updated.

        Args:
            joined: this worker's, `flat.join(own)`.
        """
        whole = self.collect(joined).reshape(self.workers, flat.rows * ROW)
        parameters = self.parameters[flat.first : flat.last]
        self.map(ops.partial(_take_back, whole), parameters, flat.parameters, flat.begins)

    def take(self) -> None:
        """Set the shards from the parameters."""
        for parameter, shard in zip(self.parameters, self.own):
            shard.set_data(Tensor(self.shard(parameter.asnumpy()), ms.float32))

    def shard(self, values: np.ndarray) -> np.ndarray:
        """This worker's shard of a parameter, or of an array of its shape."""
        each = -(-values.size // self.workers)
        part = np.zeros(each, np.float32)
        own = values.reshape(-1)[self.rank * each : (self.rank + 1) * each]
        part[: own.size] = own
        return part.reshape(1, each) if values.ndim > 1 else part

    def split(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """This worker's shards, by their names, of arrays named like a parameter or like an optimizer's state of one;
        anything that isn't per parameter, e.g. an update count, is unchanged."""
        sharded = {name: self._of(name) is not None for name in arrays}
        return {
            name + _SUFFIX * sharded[name]: self.shard(values) if sharded[name] else values
            for name, values in arrays.items()
        }

    def join(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The inverse of `split`."""
        joined = {}
        for name, values in arrays.items():
            whole = name.removesuffix(_SUFFIX)
            joined[whole] = values if whole == name else self._join(self._of(whole), values)
        return joined

    def _join(self, parameter: Parameter, values: np.ndarray) -> np.ndarray:
        whole = ops.AllGather()(Tensor(values.reshape(1, -1))).asnumpy()  # (workers, values)
        return whole.reshape(-1)[: parameter.size].reshape(parameter.shape)

    def _of(self, name: str) -> Parameter | None:
        """The parameter of this name, or of the rest of it after an optimizer's prefix."""
        return self.by_name.get(name, self.by_name.get(name.partition(".")[2]))

    def _shard(self, parameter: Parameter) -> Parameter:
        values = Tensor(self.shard(parameter.asnumpy()), ms.float32)
        return Parameter(values, name=parameter.name + _SUFFIX, requires_grad=parameter.requires_grad)
