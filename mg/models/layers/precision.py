"""Mixed precision: parameters, norms, softmax and losses stay in fp32; convolutions and matrix products run in fp16 or
bf16.

Every layer that computes in low precision is a `PrecisionCell` and passes its operands and its result through
`self.cast`. MindSpore's CPU backend has no bf16 kernels, so bf16 is emulated there: values stay in fp32 containers, and
`cast` rounds them and their gradients to the nearest bf16. This way a YAML that trains on Ascend trains anywhere.
"""

import mindspore as ms
from mindspore import nn

from mg import runtime


class Cast(nn.Cell):
    """Cast to a dtype; the gradient has the input's dtype."""

    def __init__(self, dtype: ms.Type):
        super().__init__()
        self.dtype = dtype

    def construct(self, x):
        return x if x.dtype == self.dtype else x.astype(self.dtype)


class RoundToBF16(nn.Cell):
    """fp32 -> the nearest bf16, kept in fp32; the gradient is rounded the same way."""

    def construct(self, x):
        return x.astype(ms.bfloat16).astype(ms.float32)


class PrecisionCell(nn.Cell):
    """A layer whose matrix products run in the precision that `set_precision` chose; fp32 until then.

    Attributes:
        leaves_fp16: its sums exceed the range of fp16, so it stays in fp32 instead.
    """

    leaves_fp16 = False

    def __init__(self):
        super().__init__()
        self.cast = Cast(ms.float32)


def set_precision(network: nn.Cell, precision: str) -> nn.Cell:
    """Make every `PrecisionCell` in `network` compute in `precision`: fp32 | fp16 | bf16. Parameters stay fp32."""
    if precision not in runtime.PRECISIONS:
        raise ValueError(f"precision is {precision!r}; it must be one of {', '.join(runtime.PRECISIONS)}")
    if precision == "bf16" and runtime.device() == "gpu":
        raise ValueError("MindSpore has no bf16 kernels on GPU: set dtype to fp16 or fp32")
    emulated = precision == "bf16" and runtime.device() == "cpu"
    for _, cell in network.cells_and_names():
        if isinstance(cell, PrecisionCell):
            wide = precision == "fp16" and cell.leaves_fp16
            cell.cast = RoundToBF16() if emulated else Cast(runtime.PRECISIONS["fp32" if wide else precision])
    return network
