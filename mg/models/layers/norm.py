"""Group normalisation over (B, C, T, H, W), always in fp32."""

import mindspore as ms
from mindspore import Parameter, ops
from mindspore.common.initializer import initializer

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
        y = x.astype(ms.float32).reshape(b, c, t, h * w)
        y = ops.group_norm(y, self.groups, self.gamma, self.beta, self.eps)
        return self.cast(y).reshape(b, c, t, h, w)
