"""Convolutions over (B, C, T, H, W), as the papers write them. All use one operator, `Convolution`: in space with a
kernel (1, k, k), in time with (k, 1, 1), in both with (k, k, k).

How a device computes them depends on its form, see `mg.models.layers.forms`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import HeNormal, Normal, initializer

from mg.models.layers.layout import repeat_edges
from mg.models.layers.precision import PrecisionCell


class Convolution(nn.Cell):
    """x (B, Cin, T, H, W), weight (Cout, Cin / groups, kt, kh, kw), bias (Cout,) or None -> (B, Cout, T', H', W')

    Args:
        stride: in time, height and width.
        padding: zeros before and after in time, at the top and bottom, left and right.
    """

    def __init__(self, stride: tuple[int, int, int] = (1, 1, 1), padding: Sequence[int] = (0,) * 6, groups: int = 1):
        super().__init__()
        self.stride, self.padding, self.groups = stride, tuple(padding), groups
        sides = list(zip(padding[::2], padding[1::2]))
        self.margins = tuple(before if before == behind else 0 for before, behind in sides)
        self.uneven = tuple((2 + i, *pair) for i, pair in enumerate(sides) if pair[0] != pair[1])

    def construct(self, x, weight, bias):
        return ops.conv3d(self.pad(x), weight, bias, self.stride, "pad", self.margins, 1, self.groups)

    def pad(self, x):
        """Add uneven zeros, which the operators cannot add themselves."""
        for axis, before, behind in self.uneven:
            zeros = ops.zeros(x.shape[:axis] + (1,) + x.shape[axis + 1 :], x.dtype)
            x = ops.cat((zeros,) * before + (x,) + (zeros,) * behind, axis)
        return x


class Conv(PrecisionCell):
    """What the convolutions share: a weight, an optional bias, and precision.

    Args:
        weight: its initial value; subclasses define how it becomes a kernel of `Convolution`.
    """

    def __init__(self, weight: Tensor, bias: bool, convolution: Convolution):
        super().__init__()
        self.weight = Parameter(weight, name="weight")
        self.bias: Any = Parameter(initializer("zeros", (weight.shape[0],)), name="bias") if bias else None
        self.conv = convolution

    def construct(self, x):
        bias = None if self.bias is None else self.cast(self.bias)
        return self.cast(self.conv(self.pad(self.cast(x)), self.cast(self.kernel()), bias))

    def pad(self, x):
        """Pad x with anything other than zeros."""
        return x

    def kernel(self):
        """The weight as `Convolution` takes it, (Cout, Cin / groups, kt, kh, kw)"""
        return self.weight


class SpatialConv(Conv):
    """Conv2d on every frame. (B, Cin, T, H, W) -> (B, Cout, T, H', W')

    Args:
        kernel_size, stride: the same in height and width.
        padding: zeros at the (top, bottom, left, right).
        zero: initialise to zero, as in the last layer of a residual branch here.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: tuple[int, int, int, int] = (1, 1, 1, 1),
        zero: bool = False,
    ):
        weight = initializer(_start(zero), (out_channels, in_channels, kernel_size, kernel_size))
        super().__init__(weight, True, Convolution((1, stride, stride), (0, 0, *padding)))
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding

    def kernel(self):
        return self.weight.expand_dims(2)


class TemporalConv(Conv):
    """Conv1d along time on every pixel, edges replicated. (B, C, T, H, W) -> (B, C, ceil(T / stride), H, W)

    Initialised to the identity, 1 at the kernel's centre, so that an inflated image model stays that image model. The
    weight has the shape of MindSpore's Conv1d, (C, C, 1, k).

    Args:
        padding: "replicate" repeats the edge frames, "zeros" adds black ones.
    """

    def __init__(self, channels: int, kernel_size: int = 3, stride: int = 1, padding: str = "replicate"):
        if padding not in ("replicate", "zeros"):
            raise ValueError(f"temporal padding is {padding!r}; it must be replicate or zeros")
        identity = np.zeros((channels, channels, 1, kernel_size), np.float32)
        identity[range(channels), range(channels), 0, kernel_size // 2] = 1
        margin = kernel_size // 2
        zeros = margin if padding == "zeros" else 0
        super().__init__(Tensor(identity), True, Convolution((stride, 1, 1), (zeros, zeros, 0, 0, 0, 0)))
        self.kernel_size, self.stride, self.margin = kernel_size, stride, margin - zeros

    def pad(self, x):
        return repeat_edges(x, 2, self.margin, self.margin) if self.margin else x

    def kernel(self):
        return self.weight.reshape(self.weight.shape[:2] + (self.kernel_size, 1, 1))


class FactorizedConv(PrecisionCell):
    """A 2-D convolution followed by a 1-D one in time, the "2.5-D" convolution of Movie Gen. Keeps T, H and W."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, zero: bool = False):
        super().__init__()
        margin = kernel_size // 2
        self.conv_spat = SpatialConv(in_channels, out_channels, kernel_size, padding=(margin,) * 4, zero=zero)
        self.conv_temp = TemporalConv(out_channels, kernel_size)
        self.pointwise = kernel_size == 1

    def construct(self, x):
        return self.conv_temp(self.conv_spat(x))


class Conv3d(Conv):
    """(B, Cin, T, H, W) -> (B, Cout, T', H', W'), with kernel_size // 2 zeros on every side.

    Args:
        kernel_size: the same in time, height and width.
        stride: in time, height and width.
        depthwise: every channel has its own kernel; in_channels and out_channels must be equal.
        weight_init: the weight's initializer, by default N(0, 0.02).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: tuple[int, int, int] = (1, 1, 1),
        bias: bool = True,
        depthwise: bool = False,
        weight_init=Normal(0.02),
    ):
        groups = out_channels if depthwise else 1
        convolution = Convolution(stride, (kernel_size // 2,) * 6, groups)
        super().__init__(_volume(out_channels, in_channels // groups, kernel_size, weight_init), bias, convolution)
        self.kernel_size, self.stride, self.depthwise = kernel_size, stride, depthwise


class CausalConv3d(Conv):
    """A Conv3d in which no frame sees a later one: all padding in time is in front.

    Initialised to N(0, 1 / fan_in).

    Args:
        zero: initialise to zero, as in the last layer of a residual branch here.
        padding: "zeros", with kernel_size - stride of them in front: k * stride frames become k. Or "replicate",
            which repeats the edges, the first frame kernel_size - 1 times: k * stride + 1 frames become k + 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: tuple[int, int, int] = (1, 1, 1),
        bias: bool = True,
        zero: bool = False,
        padding: str = "zeros",
    ):
        if padding not in ("zeros", "replicate"):
            raise ValueError(f"padding is {padding!r}; it must be zeros or replicate")
        replicated, margin = padding == "replicate", kernel_size // 2
        before = kernel_size - (1 if replicated else stride[0])  # frames in front
        zeros = (0,) * 6 if replicated else (before, 0) + (margin,) * 4
        weight = _volume(out_channels, in_channels, kernel_size, _start(zero))
        super().__init__(weight, bias, Convolution(stride, zeros))
        self.kernel_size, self.stride, self.replicated = kernel_size, stride, replicated
        self.margin, self.before = margin, before

    def pad(self, x):
        if not self.replicated or not self.before:
            return x
        x = repeat_edges(x, 3, self.margin, self.margin)
        x = repeat_edges(x, 4, self.margin, self.margin)
        return repeat_edges(x, 2, self.before, 0)


class GroupedPointwiseConv(PrecisionCell):
    """A 1x1x1 convolution within groups of channels, without bias. (B, C, T, H, W) -> (B, C, T, H, W)

    Computed as a matrix product: devices only support convolutions with one group or as many groups as channels.
    """

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.weight = Parameter(_volume(channels, channels // groups, 1), name="weight")
        self.groups = groups

    def construct(self, x):
        b, c, t, h, w = x.shape
        weight = self.cast(self.weight).reshape(1, self.groups, c // self.groups, c // self.groups)
        y = ops.matmul(weight, self.cast(x).reshape(b, self.groups, c // self.groups, t * h * w))
        return self.cast(y).reshape(b, c, t, h, w)


def _start(zero: bool):
    """A weight's initializer: zero, or N(0, 1 / fan_in)."""
    return "zeros" if zero else HeNormal(nonlinearity="linear")


def _volume(out_channels: int, in_channels: int, kernel_size: int, weight_init=Normal(0.02)) -> Tensor:
    """A weight in Conv3d's shape."""
    return initializer(weight_init, (out_channels, in_channels) + (kernel_size,) * 3)
