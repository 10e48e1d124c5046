"""Normalisation of (B, C, T, H, W), always in fp32."""

import mindspore as ms
from mindspore import Parameter, ops
from mindspore.common.initializer import Normal, initializer

from mg import runtime
from mg.models.layers.precision import PrecisionCell


class GroupNorm(PrecisionCell):
    """GroupNorm whose statistics span all frames and pixels of a clip; parameters `gamma` and `beta`.

    Args:
        channels: a multiple of `groups`.
    """

    def __init__(self, channels: int, groups: int, eps: float = 1e-6):
        super().__init__()
        if channels % groups:
            raise ValueError(f"{channels} channels cannot be normalised in {groups} groups: use a multiple of {groups}")
        self.gamma = Parameter(initializer("ones", (channels,)), name="gamma")
        self.beta = Parameter(initializer("zeros", (channels,)), name="beta")
        self.groups, self.eps = groups, eps
        self.composed = runtime.device() == "cpu"  # whose operator takes twice the time

    def construct(self, x):
        b, c, t, h, w = x.shape
        y = x.astype(ms.float32).reshape(b, c, t, h * w)
        if self.composed:
            y = self._composed(y)
        else:
            y = ops.group_norm(y, self.groups, self.gamma, self.beta, self.eps)
        return self.cast(y).reshape(b, c, t, h, w)

    def _composed(self, x):
        b, c, t, pixels = x.shape
        x = x.reshape(b * self.groups, -1, pixels)
        x = x - _mean(x)
        scale = ops.rsqrt(_mean(x.square()) + self.eps).reshape(b, self.groups, 1)
        scale = (scale * self.gamma.reshape(1, self.groups, -1)).reshape(b, c, 1)
        return x.reshape(b, c, -1) * scale + self.beta.reshape(1, c, 1)


def _mean(x):
    """(N, L, P) -> (N, 1, 1); the sums are products with ones, many times as fast on a CPU as a reduction."""
    n, length, pixels = x.shape
    rows = ops.matmul(x.reshape(n * length, pixels), ops.ones((pixels, 1), x.dtype))  # (N*L, 1)
    return rows.reshape(n, length, 1).mean(axis=1, keep_dims=True) / pixels


class RMSNorm(PrecisionCell):
    """x / sqrt(mean over channels of x^2 + eps) * gamma + beta, at every pixel alone.

    The gains start at N(0, 0.02), as Video DC-AE's do: a residual branch that ends in this norm starts near zero.
    """

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.gamma = Parameter(initializer(Normal(0.02), (channels,)), name="gamma")
        self.beta = Parameter(initializer("zeros", (channels,)), name="beta")
        self.eps = eps
        self.composed = runtime.device() == "cpu"  # where a sum is fastest as a product with ones

    def construct(self, x):
        b, c, t, h, w = x.shape
        x = x.astype(ms.float32)
        if self.composed:
            squares = ops.matmul(ops.ones((1, c), ms.float32), x.square().reshape(b, c, t * h * w))  # (B, 1, T*H*W)
            squares = squares.reshape(b, 1, t, h, w) / c
        else:
            squares = x.square().mean(axis=1, keep_dims=True)
        y = x * ops.rsqrt(squares + self.eps)
        return self.cast(y * self.gamma.reshape(1, -1, 1, 1, 1) + self.beta.reshape(1, -1, 1, 1, 1))
