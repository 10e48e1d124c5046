"""Normalisation of (B, C, T, H, W), always in fp32."""

import mindspore as ms
from mindspore import Parameter, ops
from mindspore.common.initializer import Normal, initializer

from mg.models.layers.channels import scale, shift
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

    def construct(self, x):
        b, c, t, h, w = x.shape
        y = x.astype(ms.float32)
        if self.in_parts(y):
            y = self._composed(y)
        else:
            y = ops.group_norm(y.reshape(b, c, t, h * w), self.groups, self.gamma, self.beta, self.eps)
        return self.cast(y).reshape(b, c, t, h, w)

    def _composed(self, x):
        """The operator in its parts, which take half its time on a CPU."""
        b, c, t, h, w = x.shape
        groups, size = b * self.groups, c // self.groups
        mean = _means(x, groups)
        x = x.reshape(1, b * c, t, h, w)
        x = shift(x, -ops.broadcast_to(mean, (groups, size)).reshape(b * c), True)
        factors = ops.broadcast_to(ops.rsqrt(_means(x.square(), groups) + self.eps), (groups, size))
        factors = factors.reshape(b, c) * self.gamma.reshape(1, c)
        x = scale(x.reshape(b * c, t, h * w), factors.reshape(b * c, 1, 1), True)
        return shift(x.reshape(b, c, t, h, w), self.beta, True)


def _means(x, groups: int):
    """The mean of each group of channels of all clips, (groups, 1).

    Frame by frame, and then of those: a CPU's sum of millions of values in a row is off by 5e-4.
    """
    *_, h, w = x.shape
    rows = x.reshape(-1, h * w).sum(axis=1).reshape(groups, -1)
    return rows.sum(axis=1, keepdims=True) / (rows.shape[1] * h * w)


class RMSNorm(PrecisionCell):
    """x / sqrt(mean over channels of x^2 + eps) * gamma + beta, at every pixel alone.

    The gains start at N(0, 0.02), as Video DC-AE's do: a residual branch that ends in this norm starts near zero.
    """

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.gamma = Parameter(initializer(Normal(0.02), (channels,)), name="gamma")
        self.beta = Parameter(initializer("zeros", (channels,)), name="beta")
        self.eps = eps

    def construct(self, x):
        b, c, t, h, w = x.shape
        x = x.astype(ms.float32).reshape(b, c, t * h * w)
        squares = x.square()
        if self.on_cpu:  # sums of rows are slow there, products with ones are not
            mean = ops.matmul(ops.ones((1, c), ms.float32), squares) / c  # (B, 1, T*H*W)
        else:
            mean = squares.mean(axis=1, keep_dims=True)
        y = scale(x, ops.rsqrt(mean + self.eps), self.on_cpu)
        y = scale(y, self.gamma.reshape(1, c, 1), self.on_cpu).reshape(b, c, t, h, w)
        return self.cast(shift(y, self.beta, self.on_cpu))
