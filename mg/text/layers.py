"""The layers that the two text encoders share: linear layers, embedding tables, multi-head attention.

Text encoders are never trained here, and the large one has 4.8 billion parameters: weights of matrix products are
stored in the products' precision, all others in fp32. The residual stream stays in fp32.
"""

import mindspore as ms
from mindspore import Parameter, mint, nn, ops
from mindspore.common.initializer import Normal, initializer

from mg import runtime
from mg.models.layers.precision import PrecisionCell


class Dense(PrecisionCell):
    """A linear layer over the last axis. (B, L, in) -> (B, L, out)

    Args:
        dtype: fp32 | fp16 | bf16, in which the weight is stored.
    """

    def __init__(self, in_channels: int, channels: int, dtype: str = "fp32", bias: bool = False):
        super().__init__()
        kept = runtime.PRECISIONS["fp32" if dtype == "fp16" and self.leaves_fp16 else dtype]
        self.weight = Parameter(initializer(Normal(in_channels**-0.5), (channels, in_channels), kept), name="weight")
        self.bias = Parameter(initializer("zeros", (channels,)), name="bias") if bias else None
        self.product = ops.MatMul(transpose_b=True)  # a transpose would copy the weight

    def construct(self, x):
        b, length, channels = x.shape
        y = self.product(self.cast(x).reshape(b * length, channels), self.cast(self.weight))
        if self.bias is not None:
            y = y + self.cast(self.bias)
        return self.cast(y).reshape(b, length, -1)


class WideDense(Dense):
    """A linear layer whose sums exceed the range of fp16."""

    leaves_fp16 = True


class Embedding(nn.Cell):
    """Looks up rows of a table, in fp32. (...) -> (..., channels)"""

    def __init__(self, rows: int, channels: int):
        super().__init__()
        self.weight = Parameter(initializer(Normal(1.0), (rows, channels)), name="weight")
        # On Ascend this is an aclnn operator; the one for CPUs would be compiled there for every shape.
        self.on_ascend = runtime.device() == "ascend"

    def construct(self, numbers):
        if self.on_ascend:
            return mint.nn.functional.embedding(numbers, self.weight)
        return ops.gather(self.weight, numbers, 0)


class MultiHeadAttention(PrecisionCell):
    """softmax(scale * q k^T + bias) v for every head, with the softmax in fp32.

    q, k, v (B, L, heads * D) and a bias that broadcasts to (B, heads, L, L) -> (B, L, heads * D)
    """

    def __init__(self, heads: int, scale: float):
        super().__init__()
        self.heads, self.scale = heads, scale
        self.match, self.mix = ops.BatchMatMul(transpose_b=True), ops.BatchMatMul()

    def construct(self, q, k, v, bias):
        b, length, channels = q.shape
        q, k, v = self.split(q), self.split(k), self.split(v)
        scores = self.cast(self.match(q, k)).astype(ms.float32) * self.scale + bias  # (B, heads, L, L)
        weights = self.cast(ops.softmax(scores, axis=-1))
        return self.cast(self.mix(weights, v)).transpose(0, 2, 1, 3).reshape(b, length, channels)

    def split(self, x):
        """(B, L, heads * D) -> (B, heads, L, D)"""
        b, length, channels = x.shape
        return self.cast(x).reshape(b, length, self.heads, channels // self.heads).transpose(0, 2, 1, 3)
