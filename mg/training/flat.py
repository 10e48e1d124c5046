"""A network's parameters, or per-parameter values such as gradients, in a few flat tensors: one kernel each.

A network has a few hundred parameters, most of them small: with one kernel each, a sum over batches, a norm or a
message to the other workers is hundreds of launches.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, mint, nn, ops
from mindspore.common.initializer import initializer

ROW = 4096  # summing millions of values at once loses digits on a CPU; summing rows, then their sums, does not
LARGEST = 2**24  # values of a flat tensor, 64 MB: operations on it need room for one more of these, not for all
MOST = 31  # parameters of a flat tensor: with the zeros after them 32 tensors, as many as CANN's Cat joins

_flatten = ops.MultitypeFuncGraph("flatten")
_part = ops.MultitypeFuncGraph("part")


@_flatten.register("Tensor")
def _flatten_tensor(x):
    return x.reshape(-1)


@_part.register("Tensor", "Tensor", "Number")
def _part_of_tensor(values, parameter, begin):
    return mint.narrow(values, 0, begin, parameter.size).reshape(parameter.shape)  # a view: no kernel


class Flat(nn.Cell):
    """The layout of one flat tensor, (rows, ROW) in fp32: parameters' values one after the other, then zeros.

    `join`, `split` and `square_sum` are meant to be compiled, the others run on the host.

    Args:
        parameters: of a network; this tensor holds those from `first` up to but excluding `last`.
    """

    def __init__(self, parameters: Sequence[Parameter], first: int, last: int):
        super().__init__(auto_prefix=False)
        self.first, self.last = first, last
        self.parameters = ParameterTuple(parameters[first:last])
        sizes = [p.size for p in self.parameters]
        self.begins = tuple(accumulate(sizes[:-1], initial=0))
        self.total = sum(sizes)
        self.rows = -(-self.total // ROW)
        rest = self.rows * ROW - self.total
        self.padding = (Tensor(np.zeros(rest, np.float32)),) if rest else ()
        self.map = ops.HyperMap()

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Join tensors, given one per parameter of the network, into this flat tensor."""
        return ops.cat(self.map(_flatten, tensors[self.first : self.last]) + self.padding).reshape(self.rows, ROW)

    def split(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Split a flat tensor into tensors of the parameters' shapes."""
        return self.map(ops.partial(_part, flat.reshape(-1)), self.parameters, self.begins)

    def square_sum(self, flat: Tensor) -> Tensor:
        return flat.square().sum(-1).sum()

    def zeros(self) -> Tensor:
        return initializer("zeros", (self.rows, ROW))  # needs no memory until it is used

    def values(self) -> Tensor:
        """The parameters' own values."""
        return self.from_arrays({p.name: p.asnumpy() for p in self.parameters})

    def to_arrays(self, flat: Tensor) -> dict[str, np.ndarray]:
        """The parts by parameter name, as views of the tensor."""
        pieces = np.split(flat.asnumpy().reshape(-1)[: self.total], self.begins[1:])
        return {p.name: piece.reshape(p.shape) for p, piece in zip(self.parameters, pieces)}

    def from_arrays(self, parts: Mapping[str, np.ndarray]) -> Tensor:
        """The inverse of `to_arrays`."""
        values = np.zeros(self.rows * ROW, np.float32)
        np.concatenate([np.ravel(parts[p.name]) for p in self.parameters], out=values[: self.total])
        return Tensor(values.reshape(self.rows, ROW), ms.float32)


def flats(parameters: Sequence[Parameter], largest: int | None = None) -> list[Flat]:
    """Layouts for all of a network's parameters, in their order; a parameter is never split.

    Args:
        largest: values of a flat tensor, by default `LARGEST`.
    """
    largest = largest or LARGEST
    firsts, size = [0], 0
    for index, parameter in enumerate(parameters):
        if (size and size + parameter.size > largest) or index - firsts[-1] == MOST:
            firsts.append(index)
            size = 0
        size += parameter.size
    return [Flat(parameters, first, last) for first, last in zip(firsts, [*firsts[1:], len(parameters)])]
