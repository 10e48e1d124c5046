"""Normalisation, always in fp32: for (B, C, T, H, W), and for tokens over their last axis."""

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, mint, nn, ops
from mindspore.common.initializer import Normal, initializer

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
        x = x.astype(ms.float32).reshape(b, c, t, h * w)
        return self.cast(ops.group_norm(x, self.groups, self.gamma, self.beta, self.eps)).reshape(b, c, t, h, w)


class RMSNorm(PrecisionCell):
    """x / sqrt(mean over channels of x^2 + eps) * gamma + beta, at each pixel separately.

    The gains are initialised to N(0, 0.02), as in Video DC-AE: a residual branch that ends in this norm starts near
    zero.
    """

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.gamma = Parameter(initializer(Normal(0.02), (channels,)), name="gamma")
        self.beta = Parameter(initializer("zeros", (channels,)), name="beta")
        self.eps = eps

    def construct(self, x):
        x = x.astype(ms.float32)
        root = mint.pow(mint.mean(x.square(), dim=1, keepdim=True) + self.eps, -0.5)  # (B, 1, T, H, W)
        return self.cast(x * root * self.gamma.reshape(1, -1, 1, 1, 1) + self.beta.reshape(1, -1, 1, 1, 1))


class LayerNorm(nn.Cell):
    """LayerNorm over the last axis, (..., C), without gains and offsets; returns fp32."""

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__()
        self.norm = ops.LayerNorm(begin_norm_axis=-1, begin_params_axis=-1, epsilon=eps)
        self.eps = eps
        self.ones, self.zeros = Tensor(np.ones(channels, np.float32)), Tensor(np.zeros(channels, np.float32))

    def construct(self, x):
        return self.norm(x.astype(ms.float32), self.ones, self.zeros)[0]


class LastAxisRMSNorm(PrecisionCell):
    """x / sqrt(mean over the last axis of x^2 + eps) * weight, (..., C), as in Llama and T5; in fp32."""

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__()
        self.weight = Parameter(initializer("ones", (channels,)), name="weight")
        self.eps = eps

    def construct(self, x):
        x = x.astype(ms.float32)
        root = mint.pow(mint.mean(x.square(), dim=-1, keepdim=True) + self.eps, -0.5)
        return self.cast(x * root * self.weight)
