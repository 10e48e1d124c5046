"""Upsampling on the small grid; pixels are interleaved by stacking."""

from mindspore import nn, ops

from mg.models.layers import resample
from mg.models.layers.forms.cpu.conv import Conv
from mg.models.layers.forms.cpu.frames import clips, join_taps, pictures, shifted, under_kernel
from mg.models.layers.forms.edges import repeat_edges
from mg.models.layers.forms.fewer import fold, quarters, tap_of_a_frame
from mg.models.layers.forms.pieces import along_time


class Doubling(nn.Cell):
    """Nearest neighbour and a 3x3 kernel, on the small grid, without a bias.

    x (N, Cin, H, W), `quarters` of a weight (Cout, Cin, 3, 3) -> (N, Cout, 2H, 2W)

    Args:
        repeated: pad with repeated edges instead of zeros.
    """

    def __init__(self, out_channels: int, repeated: bool = False):
        super().__init__()
        self.repeated = repeated
        # In each 2x2 block the top left pixel sees its own small pixel and those above and to the left.
        top, bottom, left, right = ((0, 0) if repeated else pads for pads in ((1, 0), (0, 1), (1, 0), (0, 1)))
        self.top_left = ops.Conv2D(out_channels, 2, pad_mode="pad", pad=top + left)
        self.top_right = ops.Conv2D(out_channels, 2, pad_mode="pad", pad=top + right)
        self.bottom_left = ops.Conv2D(out_channels, 2, pad_mode="pad", pad=bottom + left)
        self.bottom_right = ops.Conv2D(out_channels, 2, pad_mode="pad", pad=bottom + right)

    def construct(self, x, top_left, top_right, bottom_left, bottom_right):
        n, _, h, w = x.shape
        above, below = (repeat_edges(x, 2, 1, 0), repeat_edges(x, 2, 0, 1)) if self.repeated else (x, x)
        top = self.side_by_side(
            self.top_left(self.beside(above, 1, 0), top_left), self.top_right(self.beside(above, 0, 1), top_right)
        )
        bottom = self.side_by_side(
            self.bottom_left(self.beside(below, 1, 0), bottom_left),
            self.bottom_right(self.beside(below, 0, 1), bottom_right),
        )
        return ops.stack((top, bottom), axis=3).reshape(n, -1, 2 * h, 2 * w)

    def beside(self, x, left, right):
        return repeat_edges(x, 3, left, right) if self.repeated else x

    def side_by_side(self, left, right):
        """Interleave the columns of two pictures. (N, C, H, W) twice -> (N, C, H, 2W)"""
        n, c, h, w = left.shape
        return ops.stack((left, right), axis=4).reshape(n, c, h, 2 * w)


class DoublingSpatialConv(Conv, resample.DoublingSpatialConv):
    growth = 4.0

    def prepare(self):
        self.double = Doubling(self.weight.shape[0])

    def construct(self, x):
        return self.finish(self.doubled(pictures(self.cast(x)), self.weight_after(x)), x.shape[1])

    def doubled(self, x, weight):
        """`Doubling` with a kernel (Cout, Cin, 3, 3) in fp32"""
        top_left, top_right, bottom_left, bottom_right = quarters(weight)
        kernels = self.cast(top_left), self.cast(top_right), self.cast(bottom_left), self.cast(bottom_right)
        return self.double(x, *kernels)


class DoublingTemporalConv(Conv, resample.DoublingTemporalConv):
    """With repeated edges a single frame stays one frame, since both of its pair would be the same."""

    growth = 4.0

    def prepare(self):
        self.conv2d = ops.Conv2D(self.weight.shape[0], 1)

    def construct(self, x):
        t = x.shape[1]
        x, repeated = pictures(self.cast(x)), self.margin > 0
        if t == 1 and repeated:
            return self.finish(self.conv2d(x, self.cast(tap_of_a_frame(self.kernel(), True, 0))), 1)
        w0, w1, w2 = ops.unstack(self.weight_after(x), axis=3)  # (C, C, 1)
        first = shifted(self.tap(x, w0, t), -1, repeated) + self.tap(x, w1 + w2, t)
        second = self.tap(x, w0 + w1, t) + shifted(self.tap(x, w2, t), 1, repeated)
        return self.in_turn(first, second)

    def in_pieces(self, x):
        return along_time(self.within, self.cast(x), self.growth, 1, 1, self.margin > 0)

    def within(self, x):
        """Double the frames between the first and the last. (B, t + 2, C, H, W) -> (B, 2t, C, H, W)"""
        t = x.shape[1] - 2
        before, own, behind = (pictures(ops.narrow(x, 1, start, t)) for start in range(3))
        w0, w1, w2 = ops.unstack(self.weight_after(x), axis=3)  # (C, C, 1)
        first = self.tap(before, w0, t) + self.tap(own, w1 + w2, t)
        second = self.tap(own, w0 + w1, t) + self.tap(behind, w2, t)
        return self.in_turn(first, second)

    def in_turn(self, first, second):
        """(B, T, C, H, W) twice -> (B, 2T, C, H, W)"""
        b, t, c, h, w = first.shape
        return self.finish(ops.stack((first, second), axis=2).reshape(b * 2 * t, c, h, w), 2 * t)

    def tap(self, x, weight, frames):
        return clips(self.conv2d(x, self.cast(weight.expand_dims(3))), frames)


class DoublingConv3d(Conv, resample.DoublingConv3d):
    doubled = DoublingSpatialConv.doubled

    def prepare(self):
        self.double = Doubling(self.weight.shape[0])
        self.growth = max(1.0, 8 * self.weight.shape[0] / self.weight.shape[1])

    def construct(self, x, frames):  # type: ignore[override]
        b, t, c, h, w = x.shape
        x = self.cast(x)
        if t == 1 and frames == 1:
            y = self.doubled(pictures(x), self.weight_after(x)[:, :, 1])
            return self.finish(y, 1)
        zeros = ops.zeros((b, 1, c, h, w), x.dtype)
        x = ops.cat((zeros, x, zeros), 1)  # (B, T + 2, Cin, H, W)
        return self.pairs_within(x) if frames == 2 else self.within(x)

    def in_pieces(self, x, frames):
        within = self.pairs_within if frames == 2 else self.within
        return along_time(within, self.cast(x), self.growth, 1, 1, repeated=False)

    def within(self, x):
        """The result for frames with a neighbour on each side. (B, t + 2, Cin, H, W) -> (B, t, Cout, 2H, 2W)"""
        t = x.shape[1] - 2
        y = self.doubled(under_kernel(x, t, 3, 1), join_taps(self.weight_after(x)))
        return self.finish(y, t)

    def pairs_within(self, x):
        """The same, with each frame doubled. (B, t + 2, Cin, H, W) -> (B, 2t, Cout, 2H, 2W)"""
        b, t, _, h, w = x.shape
        t = t - 2
        first, second = fold(self.weight_after(x), 2)
        y = ops.stack((self.seen(x, 0, t, first), self.seen(x, 1, t, second)), axis=1)  # (B*t, 2, Cout, 2H, 2W)
        y = y.reshape(b * 2 * t, -1, 2 * h, 2 * w)
        return self.finish(y, 2 * t)

    def seen(self, x, start, frames, weight):
        """The first, or second, frames of all pairs: a kernel of two frames, starting at `start`."""
        return self.doubled(under_kernel(ops.narrow(x, 1, start, frames + 1), frames, 2, 1), join_taps(weight))


class DoublingCausalConv3d(Conv, resample.DoublingCausalConv3d):
    doubled = DoublingSpatialConv.doubled

    def prepare(self):
        self.double = Doubling(self.weight.shape[0], repeated=True)
        self.conv2d = ops.Conv2D(self.weight.shape[0], 3)
        time, space = self.factors
        self.growth, self.earlier = float(time * space**2), 1 if time == 2 else 2

    def construct(self, x):
        x = self.cast(x)
        if x.shape[1] == 1:
            y = self.in_space(pictures(x), self.weight_after(x).sum(axis=2))
            return self.finish(y, 1)
        return self.without_first(self.within(repeat_edges(x, 1, self.earlier, 0)))

    def in_pieces(self, x):
        return self.without_first(along_time(self.within, self.cast(x), self.growth, self.earlier))

    def without_first(self, y):
        """Drop the first output: the first frame isn't doubled. A pair starts with the previous frame's second."""
        return ops.narrow(y, 1, 1, y.shape[1] - 1) if self.factors[0] == 2 else y

    def within(self, x):
        """The result for frames whose whole kernel is inside x. (B, t + 1, Cin, H, W) -> (B, 2t, C, H', W'), or if time
        is not doubled, (B, t + 2, Cin, H, W) -> (B, t, C, H', W')"""
        b, t, c, h, w = x.shape
        time, space = self.factors
        if time == 2:
            t = t - 1
            x = under_kernel(x, t, 2, 1)  # (B*t, 2C, H, W): the previous frame, then the frame
            first, second = fold(self.weight_after(x), 2)
            pairs = self.in_space(x, join_taps(second)), self.in_space(x, join_taps(first))
            y = ops.stack(pairs, axis=1).reshape(b * 2 * t, c, space * h, space * w)
        else:
            t = t - 2
            y = self.in_space(under_kernel(x, t, 3, 1), join_taps(self.weight_after(x)))
        return self.finish(y, time * t)

    def in_space(self, x, weight):
        """(N, Cin, H, W) -> (N, C, H or 2H, W or 2W)"""
        if self.factors[1] == 2:
            return self.doubled(x, weight)
        return self.conv2d(repeat_edges(repeat_edges(x, 2, 1, 1), 3, 1, 1), self.cast(weight))


class ChannelsToFrames(resample.ChannelsToFrames):
    def construct(self, x):
        b, t, c, h, w = x.shape
        pairs = ops.unstack(x.reshape(b, t, c // 2, 2, h, w), axis=3)
        return ops.stack(pairs, axis=2).reshape(b, 2 * t, c // 2, h, w)
