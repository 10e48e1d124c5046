"""Functions written so that every device has precompiled kernels for them and for their gradients.

On Ascend the gradients of the plain ones need operators that CANN compiles online, again for every clip shape.
"""

import mindspore as ms
from mindspore import Tensor, mint, nn, ops


def root(x: Tensor) -> Tensor:
    """The square root."""
    return mint.pow(x, 0.5)


class LeakyReLU(nn.Cell):
    """max(x, slope x)"""

    def __init__(self, slope: float):
        super().__init__()
        self.one, self.slope = Tensor(1.0, ms.float32), Tensor(slope, ms.float32)

    def construct(self, x):
        return x * ops.stop_gradient(mint.where(x > 0, self.one, self.slope).astype(x.dtype))
