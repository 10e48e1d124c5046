"""Linear layers over the last axis."""

from mindspore import Parameter, ops
from mindspore.common.initializer import Uniform, initializer

from mg.models.layers.precision import PrecisionCell


class Linear(PrecisionCell):
    """x W^T + b, (..., in_channels) -> (..., out_channels)

    Args:
        weight_init: a MindSpore initializer or its name; by default Xavier uniform.
        shape: shape of the stored weight, by default (out_channels, in_channels); may be that of a convolution whose
            flattened patches are the input.
    """

    def __init__(self, in_channels: int, out_channels: int, weight_init=None, shape: tuple[int, ...] | None = None):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        weight_init = weight_init or Uniform((6 / (in_channels + out_channels)) ** 0.5)
        self.weight = Parameter(initializer(weight_init, shape or (out_channels, in_channels)), name="weight")
        self.bias = Parameter(initializer("zeros", (out_channels,)), name="bias")
        self.product = ops.MatMul(transpose_b=True)

    def construct(self, x):
        rows = self.cast(x).reshape(-1, self.in_channels)
        weight = self.cast(self.weight).reshape(self.out_channels, self.in_channels)
        y = self.cast(self.add_bias(self.product(rows, weight)))
        return y.reshape(x.shape[:-1] + (self.out_channels,))

    def add_bias(self, rows):
        return rows + self.cast(self.bias)
