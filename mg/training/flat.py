"""A value for every element of a network's parameters in one tensor, so that one kernel works on all of them.

A network has some hundred parameters, most of them small: with a kernel for each of them a sum over a batch, a norm or
a message to the other workers is hundreds of launches.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, mint, nn, ops
from mindspore.common.initializer import initializer

ROW = 4096  # sums of millions of values in one go lose digits on a CPU; of rows, and then of their sums, they do not

_flatten = ops.MultitypeFuncGraph("flatten")
_part = ops.MultitypeFuncGraph("part")


@_flatten.register("Tensor")
def _flatten_tensor(x):
    return x.reshape(-1)


@_part.register("Tensor", "Tensor", "Number")
def _part_of_tensor(values, parameter, begin):
    return mint.narrow(values, 0, begin, parameter.size).reshape(parameter.shape)  # a view: no kernel


class Flat(nn.Cell):
    """The layout of a flat tensor, (rows, ROW) in fp32: the parameters' values one behind another, and then zeros.

    `join`, `split` and `norm` are made to be compiled, the others run on the host.
    """

    def __init__(self, parameters: Sequence[Parameter]):
        super().__init__(auto_prefix=False)
        self.shapes = {p.name: tuple(p.shape) for p in parameters}
        self.total = sum(p.size for p in parameters)
        self.rows = -(-self.total // ROW)
        self.rest = self.rows * ROW - self.total
        self.begins = tuple(accumulate((p.size for p in parameters[:-1]), initial=0))
        self.padding = (Tensor(np.zeros(self.rest, np.float32)),) if self.rest else ()
        self.map = ops.HyperMap()

    def construct(self, *tensors):
        return self.join(tensors)

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors of the parameters' shapes -> (rows, ROW)"""
        return ops.cat(self.map(_flatten, tensors) + self.padding).reshape(self.rows, ROW)

    def split(self, flat: Tensor, parameters: Sequence[Parameter]) -> tuple[Tensor, ...]:
        """(rows, ROW) -> tensors of the parameters' shapes"""
        return self.map(ops.partial(_part, flat.reshape(-1)), parameters, self.begins)

    def norm(self, flat: Tensor) -> Tensor:
        """The root of the sum of squares."""
        return ops.sqrt(flat.square().sum(-1).sum())

    def zeros(self) -> Tensor:
        return initializer("zeros", (self.rows, ROW))  # takes no memory until it is needed

    def to_arrays(self, flat: Tensor) -> dict[str, np.ndarray]:
        """The parts by the names of their parameters."""
        pieces = np.split(flat.asnumpy().reshape(-1)[: self.total], self.begins[1:])
        return {name: piece.reshape(shape) for piece, (name, shape) in zip(pieces, self.shapes.items())}

    def from_arrays(self, parts: Mapping[str, np.ndarray]) -> Tensor:
        """What `to_arrays` takes apart."""
        values = np.zeros(self.rows * ROW, np.float32)
        np.concatenate([np.ravel(parts[name]) for name in self.shapes], out=values[: self.total])
        return Tensor(values.reshape(self.rows, ROW), ms.float32)
