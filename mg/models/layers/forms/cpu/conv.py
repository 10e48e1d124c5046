"""Convolutions as Conv2D: the results of the taps in time are shifted and added."""

from mindspore import ops

from mg.models.layers import conv
from mg.models.layers.forms.cpu.frames import (
    add_bias,
    clips,
    convolve_within,
    join_taps,
    pictures,
    reshape_again,
    shifted,
    under_kernel,
)
from mg.models.layers.forms.edges import repeat_edges
from mg.models.layers.forms.fewer import product_of_pointwise, tap_of_a_frame
from mg.models.layers.forms.pieces import InPieces, along_time


class Conv(InPieces):
    """What the convolutions share."""

    def weight_after(self, x):
        """The weight, but what is computed from it waits for x: a graph would rearrange every weight first. In training
        it would gain nothing, and MindSpore cannot differentiate it where activations are computed again."""
        return self.weight if self.training else ops.depend(self.weight, x)

    def finish(self, y, frames):
        """Add the bias and cast. (B*frames, C, H, W) -> (B, frames, C, H, W)"""
        bias = None if self.bias is None else self.cast(self.bias)
        return clips(self.cast(add_bias(y, bias)), frames)


class ConvInTime(Conv):
    """A convolution that sees several frames: `within` is `construct` for the frames whose whole kernel is inside x,
    with `before` frames in front; the clip is padded with its edges if `repeated`, else with zeros."""

    def in_pieces(self, x):
        behind = self.kernel_size - 1 - self.before
        return along_time(self.within, self.cast(x), self.growth, self.before, behind, self.repeated)

    def sum_of_taps(self, x):
        """Sum over i of `tap` i, shifted by i - `before` frames. -> (B, T, C, H', W')"""
        total = shifted(self.tap(x, 0), -self.before, self.repeated)
        for i in range(1, self.kernel_size):
            total = total + shifted(self.tap(x, i), i - self.before, self.repeated)
        return total


class SpatialConv(Conv, conv.SpatialConv):
    def prepare(self):
        c_out, c_in, size, _ = self.weight.shape
        self.conv2d = ops.Conv2D(c_out, size, pad_mode="pad", pad=tuple(self.padding), stride=self.stride)
        self.growth = max(1.0, c_out / c_in / self.stride**2)

    def construct(self, x):
        y = self.conv2d(pictures(self.cast(x)), self.cast(self.weight))
        return self.finish(y, x.shape[1])


class TemporalConv(ConvInTime, conv.TemporalConv):
    def prepare(self):
        self.conv2d = ops.Conv2D(self.weight.shape[0], 1)
        self.before, self.repeated = self.kernel_size // 2, self.margin > 0
        self.growth = 1.0 if self.stride == 1 else 0.0

    def construct(self, x):
        x, c, t = self.cast(x), x.shape[2], x.shape[1]
        if t == 1:
            y = self.conv2d(pictures(x), self.cast(tap_of_a_frame(self.kernel(), self.repeated, self.before)))
        elif self.stride > 1:
            t = -(-t // self.stride)
            weight = reshape_again(self.weight_after(x), (c, -1, 1, 1))
            y = self.conv2d(self.strided(x, t), self.cast(weight))
        else:
            y = pictures(self.sum_of_taps(x))
        return self.finish(y, t)

    def within(self, x):
        """The result for frames whose whole kernel is inside x. (B, t + k - 1, C, H, W) -> (B, t, C, H, W)"""
        return self.finish(*convolve_within(self.conv2d, x, [self.tap_weight(x, i) for i in range(self.kernel_size)]))

    def tap(self, x, i: int):
        """Tap i applied to each frame"""
        return clips(self.conv2d(pictures(x), self.tap_weight(x, i)), x.shape[1])

    def tap_weight(self, x, i: int):
        """(C, C, 1, 1)"""
        return self.cast(ops.narrow(self.weight_after(x), 3, i, 1))

    def strided(self, x, frames):
        b, _, c, h, w = x.shape
        if self.margin:
            x = repeat_edges(x, 1, self.before, self.before)
        else:
            x = ops.cat((ops.zeros((b, self.before, c, h, w), x.dtype), x), 1)
        return under_kernel(x, frames, self.kernel_size, self.stride)


class FactorizedConv(conv.FactorizedConv):
    def prepare(self):
        self.conv2d = ops.Conv2D(self.conv_temp.weight.shape[0], 1)

    def construct(self, x):
        if not self.pointwise:
            return self.conv_temp(self.conv_spat(x))
        weight, bias = product_of_pointwise(self.conv_spat, self.conv_temp)
        y = self.conv2d(pictures(self.cast(x)), self.cast(weight))
        return clips(self.cast(ops.bias_add(y, self.cast(bias))), x.shape[1])


class Conv3d(ConvInTime, conv.Conv3d):
    """A kernel's taps in time, dense or depthwise, are output channels of one Conv2D. Where the frames are smaller than
    a dense kernel, it stays as it is, and the frames under it are channels."""

    repeated = False

    def prepare(self):
        margin, c_out = self.kernel_size // 2, self.weight.shape[0]
        self.before = self.behind = margin
        self._prepare(margin, c_out if self.depthwise else 1)

    def _prepare(self, margin, groups):
        c_out = self.weight.shape[0]
        common = {"kernel_size": self.kernel_size, "pad_mode": "pad", "pad": (margin,) * 4, "group": groups}
        self.conv2d = ops.Conv2D(c_out, stride=self.stride[1:], **common)
        self.conv_taps = ops.Conv2D(c_out * self.kernel_size, stride=self.stride[1:], **common)
        self.grouped = groups > 1
        values = 1.0 if self.grouped else max(1.0, c_out / self.weight.shape[1] / self.stride[1] ** 2)
        self.growth = values if self.stride[0] == 1 else 0.0

    def construct(self, x):
        return self.convolve(self.pad_pictures(self.cast(x)))

    def pad_pictures(self, x):
        return x

    def convolve(self, x):
        weight, t = self.weight_after(x), x.shape[1]
        if t == 1:
            y = self.conv2d(pictures(x), self.cast(tap_of_a_frame(weight, self.repeated, self.before)))
        elif self.kernel_size == 1:
            y = self.conv2d(pictures(x), self.cast(weight[:, :, 0]))
        elif self.stride[0] == 1 and (self.grouped or x.size > weight.size):
            y = pictures(self.sum_of_taps(self.taps(x)))
        else:
            x = self.pad_frames(x)
            t = (x.shape[1] - self.kernel_size) // self.stride[0] + 1
            y = self.conv2d(under_kernel(x, t, self.kernel_size, self.stride[0]), self.cast(join_taps(weight)))
        return self.finish(y, t)

    def within(self, x):
        """The result for frames whose whole kernel is inside x. (B, t + k - 1, Cin, H, W) -> (B, t, Cout, H', W')"""
        taps = ops.unstack(self.cast(self.weight_after(x)), axis=2)
        return self.finish(*convolve_within(self.conv2d, self.pad_pictures(x), taps))

    def taps(self, x):
        """Each tap in time applied to x, (B, T, k, C, H', W')"""
        b, t, *_ = x.shape
        weight, size, c = self.weight_after(x), self.kernel_size, self.weight.shape[0]
        if self.grouped:
            y = self.conv_taps(pictures(x), self.cast(reshape_again(weight, (c * size, 1, size, size))))
            return y.reshape(b, t, c, size, y.shape[2], y.shape[3])
        y = self.conv_taps(pictures(x), ops.cat(ops.unstack(self.cast(weight), axis=2), 0))
        return y.reshape(b, t, size, c, y.shape[2], y.shape[3])

    def tap(self, taps, i: int):
        """Not by unstack: in MindSpore 2.10 a tuple's items have no gradient inside a gradient of bf16."""
        return ops.narrow(taps, 3 if self.grouped else 2, i, 1).squeeze(3 if self.grouped else 2)

    def pad_frames(self, x):
        b, _, c, h, w = x.shape
        before, behind = (ops.zeros((b, n, c, h, w), x.dtype) for n in (self.before, self.behind))
        return ops.cat((before, x, behind), 1)


class CausalConv3d(ConvInTime, conv.CausalConv3d):
    def prepare(self):
        self.repeated = self.replicated
        Conv3d._prepare(self, 0 if self.repeated else self.kernel_size // 2, 1)

    construct, convolve = Conv3d.construct, Conv3d.convolve
    within, taps, tap = Conv3d.within, Conv3d.taps, Conv3d.tap

    def pad_pictures(self, x):
        if not self.repeated or not self.margin:
            return x
        return repeat_edges(repeat_edges(x, 3, self.margin, self.margin), 4, self.margin, self.margin)

    def pad_frames(self, x):
        if self.repeated:
            return repeat_edges(x, 1, self.before, 0)
        b, _, c, h, w = x.shape
        return ops.cat((ops.zeros((b, self.before, c, h, w), x.dtype), x), 1) if self.before else x


class GroupedPointwiseConv(conv.GroupedPointwiseConv):
    def construct(self, x):
        b, t, c, h, w = x.shape
        weight = self.cast(self.weight).reshape(1, self.groups, c // self.groups, c // self.groups)
        y = ops.matmul(weight, self.cast(x).reshape(b * t, self.groups, c // self.groups, h * w))
        return self.cast(y).reshape(b, t, c, h, w)
