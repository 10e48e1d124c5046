"""Convolutions over (B, C, T, H, W), built here alone, so that one place decides how a device computes them.

A spatial convolution sees the frames as a batch, (B*T, C, H, W). A temporal one sees each clip as a picture with time
down and the pixels across, (B, C, T, H*W), and slides a (k, 1) kernel over it: no transpose of the data, and fast on
every device.

Where a kernel sees the same value under several taps, or nothing but zeros under some, the taps are added or left out
first: on a single frame a convolution in time is one of a single frame. That is the same function with fewer products;
`plain` (mg.models.layers.forms) computes them all.
"""

import numpy as np
from mindspore import Parameter, Tensor, ops
from mindspore.common.initializer import HeNormal, Normal, initializer

from mg.models.layers.channels import shift, swap_frames
from mg.models.layers.precision import PrecisionCell


def _weight(shape: tuple[int, ...], zero: bool = False) -> Parameter:
    return Parameter(initializer(_start(zero), shape), name="weight")


def _start(zero: bool):
    """How a weight starts: at zero, or at N(0, 1 / fan_in)."""
    return "zeros" if zero else HeNormal(nonlinearity="linear")


def _bias(channels: int) -> Parameter:
    return Parameter(initializer("zeros", (channels,)), name="bias")


def repeat_edges(x, axis: int, before: int, after: int):
    """Repeat the first slice along `axis` `before` more times, and the last one `after`."""
    first, last = ops.narrow(x, axis, 0, 1), ops.narrow(x, axis, x.shape[axis] - 1, 1)
    return ops.cat((first,) * before + (x,) + (last,) * after, axis)


class SpatialConv(PrecisionCell):
    """Conv2d on every frame. (B, Cin, T, H, W) -> (B, Cout, T, H', W')

    Args:
        kernel_size, stride: in height and width alike.
        padding: zeros at the (top, bottom, left, right).
        zero: start at zero, as the last layer of a residual branch does here.
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
        super().__init__()
        self.weight = _weight((out_channels, in_channels, kernel_size, kernel_size), zero)
        self.bias = _bias(out_channels)
        self.conv = ops.Conv2D(out_channels, kernel_size, pad_mode="pad", pad=tuple(padding), stride=stride)

    def construct(self, x):
        b, c, t, h, w = x.shape
        x = swap_frames(self.cast(x)).reshape(b * t, c, h, w)  # (B*T, Cin, H, W)
        x = self.cast(ops.bias_add(self.convolve(x), self.cast(self.bias)))  # (B*T, Cout, H', W')
        _, c, h, w = x.shape
        return swap_frames(x.reshape(b, t, c, h, w))

    def convolve(self, x):
        return self.conv(x, self.cast(self.weight))


class TemporalConv(PrecisionCell):
    """Conv1d along time on every pixel, edges replicated. (B, C, T, H, W) -> (B, C, ceil(T / stride), H, W)

    It starts as the identity: 1 at the kernel's centre, so that an inflated image model is still that image model.
    The weight has Conv1d's shape in MindSpore, (C, C, 1, k).

    Args:
        padding: "replicate" repeats the edge frames, "zeros" adds black ones.
    """

    def __init__(self, channels: int, kernel_size: int = 3, stride: int = 1, padding: str = "replicate"):
        super().__init__()
        if padding not in ("replicate", "zeros"):
            raise ValueError(f"temporal padding is {padding!r}; it must be replicate or zeros")
        identity = np.zeros((channels, channels, 1, kernel_size), np.float32)
        identity[range(channels), range(channels), 0, kernel_size // 2] = 1
        self.weight = Parameter(Tensor(identity), name="weight")
        self.bias = _bias(channels)
        self.kernel_size = kernel_size
        self.margin = kernel_size // 2 if padding == "replicate" else 0
        zeros = kernel_size // 2 - self.margin
        self.conv = ops.Conv2D(channels, (kernel_size, 1), pad_mode="pad", pad=(zeros, zeros, 0, 0), stride=(stride, 1))
        self.conv_frame = ops.Conv2D(channels, 1)

    def construct(self, x):
        b, c, t, h, w = x.shape
        x = self.cast(x).reshape(b, c, t, h * w)
        if t == 1 and not self.plain:
            x = self.conv_frame(x, self.cast(self.weight_of_a_frame()))
        else:
            x = self.convolve(x)  # (B, C, T', H*W)
        x = self.cast(ops.bias_add(x, self.cast(self.bias)))
        return x.reshape(b, c, -1, h, w)

    def convolve(self, x):
        if self.margin:
            x = repeat_edges(x, 2, self.margin, self.margin)
        return self.conv(x, self.cast(self.weight.swapaxes(2, 3)))

    def weight_of_a_frame(self):
        """What the kernel does to a single frame: all taps see it, or the one in the middle does. (C, C, 1, 1)"""
        if self.margin:
            return self.weight.sum(axis=3, keepdims=True)
        middle = self.kernel_size // 2
        return self.weight[:, :, :, middle : middle + 1]


class FactorizedConv(PrecisionCell):
    """A 2-D convolution followed by a 1-D one in time, the "2.5-D" convolution of Movie Gen. Keeps T, H and W."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, zero: bool = False):
        super().__init__()
        margin = kernel_size // 2
        self.conv_spat = SpatialConv(in_channels, out_channels, kernel_size, padding=(margin,) * 4, zero=zero)
        self.conv_temp = TemporalConv(out_channels, kernel_size)
        self.pointwise = kernel_size == 1
        self.conv = ops.Conv2D(out_channels, 1)

    def construct(self, x):
        if self.pointwise and not self.plain:
            return self._as_one(x)
        return self.conv_temp(self.conv_spat(x))

    def _as_one(self, x):
        """Two 1x1 convolutions in a row are one, whose weight is the product of theirs."""
        b, c, t, h, w = x.shape
        second = self.conv_temp.weight[:, :, 0, 0]
        weight = ops.matmul(second, self.conv_spat.weight[:, :, 0, 0]).reshape(-1, c, 1, 1)
        bias = ops.matmul(second, self.conv_spat.bias) + self.conv_temp.bias
        y = self.conv(self.cast(x).reshape(b, c, t, h * w), self.cast(weight))  # (B, Cout, T, H*W)
        return self.cast(ops.bias_add(y, self.cast(bias))).reshape(b, -1, t, h, w)


class Conv3d(PrecisionCell):
    """(B, Cin, T, H, W) -> (B, Cout, T', H', W'), with kernel_size // 2 zeros on every side.

    Dense ones are MindSpore's own Conv3D. Depthwise ones are a Conv2d that sees the frames under the kernel as
    channels, and so are dense ones where operators do better in parts, see `PrecisionCell.in_parts`. For another engine
    both kinds are one Conv3D.

    Args:
        kernel_size: in time, height and width alike.
        stride: in time, height and width.
        depthwise: every channel has a kernel of its own; in_channels and out_channels are the same then.
        weight_init: where the weight starts, by default N(0, 0.02).
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
        super().__init__()
        self.weight = _volume(out_channels, 1 if depthwise else in_channels, kernel_size, weight_init)
        self.bias = _bias(out_channels) if bias else None
        margin = kernel_size // 2
        self.kernel_size, self.stride, self.before, self.behind = kernel_size, stride[0], margin, margin
        self.depthwise = depthwise
        self.conv = ops.Conv3D(
            out_channels,
            kernel_size,
            pad_mode="pad",
            pad=(margin,) * 6,
            stride=stride,
            group=out_channels if depthwise else 1,
        )
        self.conv_frames = ops.Conv2D(
            out_channels,
            kernel_size,
            pad_mode="pad",
            pad=(margin,) * 4,
            stride=stride[1:],
            group=out_channels if depthwise else 1,
        )

    def construct(self, x):
        return self.convolve(self.pad_frames(x))

    def pad_frames(self, x):
        """What the convolution does not add by itself."""
        return x

    def convolve(self, x):
        x, weight = self.cast(x), self.cast(self.weight)
        if x.shape[2] == 1 and not self.plain:
            y = self._on_a_frame(x, weight)
        else:
            whole = self.exporting or not (self.depthwise or self.in_parts(x))
            y = self._whole(x, weight) if whole else self._on_frames(x, weight)
        return self.cast(add_bias(y, self.bias, self.on_cpu))

    def _whole(self, x, weight):
        return self.conv(x, weight)

    def _on_a_frame(self, x, weight):
        return self.conv_frames(x[:, :, 0], self.weight_of_a_frame(weight)).expand_dims(2)

    def weight_of_a_frame(self, weight):
        """What the kernel does to a single frame: of its frames one sees it, the others zeros. (Cout, Cin, kh, kw)"""
        return weight[:, :, self.before]

    def _on_frames(self, x, weight):
        b, c, t, h, w = x.shape
        before = ops.zeros((b, self.before, c, h, w), x.dtype)
        behind = ops.zeros((b, self.behind + self.stride - 1, c, h, w), x.dtype)
        x = ops.cat((before, swap_frames(x), behind), axis=1)  # (B, T + ..., C, H, W)
        frames = (t + self.before + self.behind - self.kernel_size) // self.stride + 1
        y = self.conv_frames(as_channels(x, frames, self.kernel_size, self.stride), join_frames(weight))
        _, c, h, w = y.shape
        return swap_frames(y.reshape(b, frames, c, h, w))  # (B, Cout, T', H', W')


def as_channels(x, frames: int, size: int, stride: int = 1):
    """The frames under a kernel of `size` frames as channels of one. (B, T, C, H, W) -> (B*frames, C*size, H, W)"""
    b, _, c, h, w = x.shape
    shifted = ()
    for i in range(size):
        seen = x[:, i : i + frames * stride]
        if stride > 1:  # not a slice with a step: on CPUs MindSpore 2.10 has no gradient for one in a batch
            seen = seen.reshape(b, frames, stride, c, h, w)[:, :, 0]
        shifted += (seen,)
    x = ops.stack(shifted, axis=3) if size > 1 else shifted[0]
    return x.reshape(b * frames, c * size, h, w)


def join_frames(weight):
    """A kernel for what `as_channels` gives. (Cout, Cin, k, kh, kw) -> (Cout, Cin*k, kh, kw)"""
    c_out, c_in, size, height, width = weight.shape
    return weight.reshape(c_out, c_in * size, height, width)


class CausalConv3d(Conv3d):
    """A dense Conv3d of which no frame sees a later one: what it adds in time all stands in front.

    It starts at N(0, 1 / fan_in).

    Args:
        zero: start at zero, as the last layer of a residual branch does here.
        padding: "zeros", of which kernel_size - stride stand in front: k * stride frames become k. Or "replicate",
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
        super().__init__(in_channels, out_channels, kernel_size, stride, bias, weight_init=_start(zero))
        if padding not in ("zeros", "replicate"):
            raise ValueError(f"padding is {padding!r}; it must be zeros or replicate")
        margin = kernel_size // 2
        self.before, self.behind, self.repeated = kernel_size - stride[0], 0, 0
        if padding == "replicate":  # before the convolution, which then adds nothing of its own
            self.before, self.repeated, margin = 0, margin, 0
        pad = (0, 0) + (margin,) * 4
        self.conv = ops.Conv3D(out_channels, kernel_size, pad_mode="pad", pad=pad, stride=stride)
        self.conv_frames = ops.Conv2D(out_channels, kernel_size, pad_mode="pad", pad=pad[2:], stride=stride[1:])

    def pad_frames(self, x):
        if self.repeated:
            t = x.shape[2]
            x = repeat_edges(x, 3, self.repeated, self.repeated)
            x = repeat_edges(x, 4, self.repeated, self.repeated)
            if t > 1 or self.plain:
                x = repeat_edges(x, 2, self.kernel_size - 1, 0)
        return x

    def _whole(self, x, weight):
        b, c, _, h, w = x.shape
        if self.before:  # not the operator's own padding, which devices want alike on both sides
            x = ops.cat((ops.zeros((b, c, self.before, h, w), x.dtype), x), axis=2)
        return self.conv(x, weight)

    def weight_of_a_frame(self, weight):
        return weight.sum(axis=2) if self.repeated else weight[:, :, self.before]


class PointwiseConv(PrecisionCell):
    """A dense 1x1x1 convolution. (B, Cin, T, H, W) -> (B, Cout, T, H, W)"""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True):
        super().__init__()
        self.weight = _volume(out_channels, in_channels, 1)
        self.bias = _bias(out_channels) if bias else None
        self.conv = ops.Conv2D(out_channels, 1)

    def construct(self, x):
        b, c, t, h, w = x.shape
        weight = self.cast(self.weight).reshape(-1, c, 1, 1)
        y = self.conv(self.cast(x).reshape(b, c, t, h * w), weight)  # (B, Cout, T, H*W)
        return self.cast(add_bias(y.reshape(b, -1, t, h, w), self.bias, self.on_cpu))


class GroupedPointwiseConv(PrecisionCell):
    """A 1x1x1 convolution within groups of channels, without bias. (B, C, T, H, W) -> (B, C, T, H, W)"""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.weight = _volume(channels, channels // groups, 1)
        self.groups = groups

    def construct(self, x):
        b, c, t, h, w = x.shape
        weight = self.cast(self.weight).reshape(1, self.groups, c // self.groups, c // self.groups)
        y = ops.matmul(weight, self.cast(x).reshape(b, self.groups, c // self.groups, t * h * w))
        return self.cast(y).reshape(b, c, t, h, w)


def _volume(out_channels: int, in_channels: int, kernel_size: int, weight_init=Normal(0.02)) -> Parameter:
    """A weight in Conv3d's shape."""
    return Parameter(initializer(weight_init, (out_channels, in_channels) + (kernel_size,) * 3), name="weight")


def add_bias(y, bias, on_cpu: bool):
    return y if bias is None else shift(y, bias.astype(y.dtype), on_cpu)
