"""A value for every element of a network's parameters in one tensor, so that one kernel works on all of them.

A network has some hundred parameters, most of them small: with a kernel for each of them a sum over a batch, a norm or
a message to the other workers is hundreds of launches.
"""

from collections.abc import Mapping, Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, mint, nn, ops

ROW = 4096  # sums of millions of values in one go lose digits on a CPU; of rows, and then of their sums, they do not

_flatten = ops.MultitypeFuncGraph("flatten")
_shape_like = ops.MultitypeFuncGraph("shape_like")


@_flatten.register("Tensor")
def _flatten_tensor(x):
    return x.reshape(-1)


@_shape_like.register("Tensor", "Tensor")
def _shape_piece(parameter, piece):
    return piece.reshape(parameter.shape)


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
        self.sizes = tuple(p.size for p in parameters) + ((self.rest,) if self.rest else ())
        self.padding = (Tensor(np.zeros(self.rest, np.float32)),) if self.rest else ()
        self.map = ops.HyperMap()

    def construct(self, *tensors):
        return self.join(tensors)

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors of the parameters' shapes -> (rows, ROW)"""
        return ops.cat(self.map(_flatten, tensors) + self.padding).reshape(self.rows, ROW)

    def split(self, flat: Tensor, parameters: Sequence[Parameter]) -> tuple[Tensor, ...]:
        """(rows, ROW) -> tensors of the parameters' shapes"""
        pieces = mint.split(flat.reshape(-1), self.sizes)
        return self.map(_shape_like, parameters, pieces[: len(parameters)])

    def norm(self, flat: Tensor) -> Tensor:
        """The root of the sum of squares."""
        return ops.sqrt(flat.square().sum(-1).sum())

    def zeros(self) -> Tensor:
        return Tensor(np.zeros((self.rows, ROW), np.float32))

    def to_arrays(self, flat: Tensor) -> dict[str, np.ndarray]:
        """The parts by the names of their parameters."""
        values, begin, parts = flat.asnumpy().reshape(-1), 0, {}
        for name, shape in self.shapes.items():
            end = begin + int(np.prod(shape))
            parts[name] = values[begin:end].reshape(shape)
            begin = end
        return parts

    def from_arrays(self, parts: Mapping[str, np.ndarray]) -> Tensor:
        """What `to_arrays` takes apart."""
        values = np.zeros(self.rows * ROW, np.float32)
        np.concatenate([np.ravel(parts[name]) for name in self.shapes], out=values[: self.total])
        return Tensor(values.reshape(self.rows, ROW), ms.float32)
