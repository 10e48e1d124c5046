"""The values of a network's parameters, or one for each of them, in a few flat tensors that take a kernel each.

A network has some hundred parameters, most of them small: with a kernel for each of them a sum over batches, a norm or
a message to the other workers is hundreds of launches.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, mint, nn, ops
from mindspore.common.initializer import initializer

ROW = 4096  # sums of millions of values in one go lose digits on a CPU; of rows, and then of their sums, they do not
LARGEST = 2**24  # values of a flat tensor, 64 MB: what is done to one needs room for another one, and not for all
MOST = 31  # parameters of a flat tensor: with the zeros behind them as many tensors as CANN's Cat joins, 32

_flatten = ops.MultitypeFuncGraph("flatten")
_part = ops.MultitypeFuncGraph("part")


@_flatten.register("Tensor")
def _flatten_tensor(x):
    return x.reshape(-1)


@_part.register("Tensor", "Tensor", "Number")
def _part_of_tensor(values, parameter, begin):
    return mint.narrow(values, 0, begin, parameter.size).reshape(parameter.shape)  # a view: no kernel


class Flat(nn.Cell):
    """The layout of one flat tensor, (rows, ROW) in fp32: parameters' values one behind another, and then zeros.

    `join`, `split` and `square_sum` are made to be compiled, the others run on the host.

    Args:
        parameters: of a network, of which this tensor has those from `first` to `last`, without it.
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
        """Of tensors for all of the network's parameters those from `first` to `last`"""
        return ops.cat(self.map(_flatten, tensors[self.first : self.last]) + self.padding).reshape(self.rows, ROW)

    def split(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Tensors of the parameters' shapes"""
        return self.map(ops.partial(_part, flat.reshape(-1)), self.parameters, self.begins)

    def square_sum(self, flat: Tensor) -> Tensor:
        return flat.square().sum(-1).sum()

    def zeros(self) -> Tensor:
        return initializer("zeros", (self.rows, ROW))  # takes no memory until it is needed

    def values(self) -> Tensor:
        """The parameters' own."""
        return self.from_arrays({p.name: p.asnumpy() for p in self.parameters})

    def to_arrays(self, flat: Tensor) -> dict[str, np.ndarray]:
        """The parts by the names of their parameters, as views of the tensor."""
        pieces = np.split(flat.asnumpy().reshape(-1)[: self.total], self.begins[1:])
        return {p.name: piece.reshape(p.shape) for p, piece in zip(self.parameters, pieces)}

    def from_arrays(self, parts: Mapping[str, np.ndarray]) -> Tensor:
        """What `to_arrays` takes apart."""
        values = np.zeros(self.rows * ROW, np.float32)
        np.concatenate([np.ravel(parts[p.name]) for p in self.parameters], out=values[: self.total])
        return Tensor(values.reshape(self.rows, ROW), ms.float32)


def flats(parameters: Sequence[Parameter], largest: int | None = None) -> list[Flat]:
    """Layouts for all of a network's parameters, in their order; a parameter is never divided.

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
