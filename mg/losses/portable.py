"""Functions in a form for which every device has its kernels ready, those of the gradient too.

On Ascend the plain ones have gradients in operators that CANN compiles while training waits, anew for every clip shape.
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
