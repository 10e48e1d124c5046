"""Halving and doubling of the frame and of the frame rate.

Doubling is nearest neighbour and then a convolution of three taps. Every sample stands twice in a row there, so that of
three taps two see the same one: the first of a pair is (w0, w1 + w2) of two small samples, the second (w0 + w1, w2).
Computed so, on the small grid, a doubled axis costs 4 products in place of 6, a frame doubled in height and width 16
in place of 36, one doubled in time too 64 in place of 216, and the large input never exists. Equal to rounding. `plain`
and `exporting` (mg.models.layers.forms) take the long way: the latter's engines have a form of their own, for which see
mg/deploy/upsampling.py.
"""

from mindspore import nn, ops

from mg.models.layers.channels import swap_frames
from mg.models.layers.conv import (
    CausalConv3d,
    Conv3d,
    SpatialConv,
    TemporalConv,
    add_bias,
    as_channels,
    join_frames,
    repeat_edges,
)
from mg.models.layers.precision import PrecisionCell


class SpatialDownsample(nn.Cell):
    """Conv 3x3 of stride 2 with one row and column of zeros at the bottom and right. H and W are halved."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = SpatialConv(channels, channels, stride=2, padding=(0, 1, 0, 1))

    def construct(self, x):
        return self.conv(x)


class TemporalDownsample(nn.Cell):
    """Temporal conv of stride 2. T becomes ceil(T / 2)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = TemporalConv(channels, stride=2)

    def construct(self, x):
        return self.conv(x)


class SpatialUpsample(nn.Cell):
    """Nearest neighbour, then conv 3x3. H and W are doubled."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = DoublingSpatialConv(channels)

    def construct(self, x):
        return self.conv(x)


class TemporalUpsample(nn.Cell):
    """Nearest neighbour in time, then a temporal conv. T is doubled, but for a single frame whose doubles would be
    alike: that stays one.

    Args:
        padding: "replicate", as in the Movie Gen paper, or "zeros", as in the weights that mindone trained.
    """

    def __init__(self, channels: int, padding: str = "replicate"):
        super().__init__()
        self.conv = DoublingTemporalConv(channels, padding)

    def construct(self, x):
        return self.conv(x)


class DoublingSpatialConv(SpatialConv):
    """`SpatialConv` 3x3 of frames that nearest neighbour has doubled. (B, C, T, H, W) -> (B, C, T, 2H, 2W)"""

    def __init__(self, channels: int):
        super().__init__(channels, channels)
        self.double = DoublingConv2d(channels)

    def construct(self, x):
        return super().construct(nearest(x) if self.plain or self.exporting else x)

    def convolve(self, x):
        if self.plain or self.exporting:
            return self.conv(x, self.cast(self.weight))
        return self.double(x, self.weight)


class DoublingTemporalConv(TemporalConv):
    """`TemporalConv` of frames that nearest neighbour has doubled. (B, C, T, H, W) -> (B, C, 2T, H, W)

    A single frame comes back as one where edges are replicated: then both of the pair are the same.
    """

    def __init__(self, channels: int, padding: str = "replicate"):
        super().__init__(channels, padding=padding)
        zeros = 1 - self.margin
        self.conv_first = ops.Conv2D(channels, (2, 1), pad_mode="pad", pad=(zeros, 0, 0, 0))
        self.conv_second = ops.Conv2D(channels, (2, 1), pad_mode="pad", pad=(0, zeros, 0, 0))

    def construct(self, x):
        if x.shape[2] == 1 and self.margin and not self.plain:
            return super().construct(x)
        if self.plain or self.exporting:
            return super().construct(double_frames(x))
        b, c, t, h, w = x.shape
        x = self.cast(x).reshape(b, c, t, h * w)
        first, second = fold(self.weight.swapaxes(2, 3), 2)
        before = repeat_edges(x, 2, self.margin, 0) if self.margin else x
        behind = repeat_edges(x, 2, 0, self.margin) if self.margin else x
        x = ops.stack(
            (self.conv_first(before, self.cast(first)), self.conv_second(behind, self.cast(second))), axis=3
        ).reshape(b, c, 2 * t, h * w)
        return self.cast(ops.bias_add(x, self.cast(self.bias))).reshape(b, c, 2 * t, h, w)


class DoublingConv3d(Conv3d):
    """`Conv3d` 3x3x3 of what nearest neighbour has doubled in height and width, and in time if asked to.

    (B, Cin, T, H, W) -> (B, Cout, frames * T, 2H, 2W)
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels)
        self.double = DoublingConv2d(out_channels)

    def construct(self, x, frames):  # type: ignore[override]
        if self.plain or self.exporting:
            return self.convolve(nearest(x, frames))
        b, c, t, h, w = x.shape
        x = self.cast(x)
        if t == 1 and frames == 1:
            y = self.double(x[:, :, 0], self.weight_of_a_frame(self.weight)).expand_dims(2)
            return self.cast(add_bias(y, self.bias, self.on_cpu))
        zeros = ops.zeros((b, 1, c, h, w), x.dtype)
        x = ops.cat((zeros, swap_frames(x), zeros), axis=1)  # (B, T + 2, Cin, H, W)
        if frames == 2:
            first, second = fold(self.weight, 2)
            y = ops.stack(
                (
                    self.double(as_channels(x[:, : t + 1], t, 2), join_frames(first)),
                    self.double(as_channels(x[:, 1:], t, 2), join_frames(second)),
                ),
                axis=1,
            )  # (B*T, 2, Cout, 2H, 2W)
        else:
            y = self.double(as_channels(x, t, 3), join_frames(self.weight))
        y = swap_frames(y.reshape(b, frames * t, -1, 2 * h, 2 * w))
        return self.cast(add_bias(y, self.bias, self.on_cpu))


class DoublingCausalConv3d(CausalConv3d):
    """`CausalConv3d` 3x3x3, edges replicated, of what nearest neighbour has doubled; in time the first frame stays one.

    (B, C, T, H, W) -> (B, C, T or 2T - 1, H or 2H, W or 2W)

    Args:
        factors: of time and space, 1 or 2.
    """

    def __init__(self, channels: int, factors: tuple[int, int]):
        super().__init__(channels, channels, padding="replicate")
        self.factors = factors
        self.double = DoublingConv2d(channels, padding="replicate")

    def construct(self, x):
        time, space = self.factors
        if self.plain or self.exporting:
            x = nearest(x) if space == 2 else x
            x = double_frames(x)[:, :, 1:] if time == 2 else x
            return self.convolve(self.pad_frames(x))
        b, c, t, h, w = x.shape
        x = self.cast(x)
        if t == 1:
            y = self._in_space(x[:, :, 0], self.weight_of_a_frame(self.weight)).expand_dims(2)
        elif time == 2:
            x = swap_frames(repeat_edges(x, 2, 1, 0))
            x = as_channels(x, t, 2)  # (B*T, 2C, H, W): every frame behind the one before it
            first, second = fold(self.weight, 2)
            # Of each pair the second of the earlier frame comes first, as the first frame has no pair.
            y = ops.stack((self._in_space(x, join_frames(second)), self._in_space(x, join_frames(first))), axis=1)
            y = swap_frames(y.reshape(b, 2 * t, c, space * h, space * w)[:, 1:])
        else:
            x = swap_frames(repeat_edges(x, 2, 2, 0))
            y = self._in_space(as_channels(x, t, 3), join_frames(self.weight))
            y = swap_frames(y.reshape(b, t, c, space * h, space * w))
        return self.cast(add_bias(y, self.bias, self.on_cpu))

    def _in_space(self, x, weight):
        """(N, Cin, H, W) -> (N, C, H or 2H, W or 2W)"""
        if self.factors[1] == 2:
            return self.double(x, weight)
        return self.conv_frames(repeat_edges(repeat_edges(x, 2, 1, 1), 3, 1, 1), self.cast(weight))


class DoublingConv2d(PrecisionCell):
    """Nearest neighbour and a 3x3 kernel, on the small grid, without a bias.

    x (N, Cin, H, W), weight (Cout, Cin, 3, 3) in fp32 -> (N, Cout, 2H, 2W)

    Args:
        padding: "zeros" or "replicate".
    """

    def __init__(self, out_channels: int, padding: str = "zeros"):
        super().__init__()
        self.replicate = padding == "replicate"
        # Of each block of 2x2 the pixel at the top left sees its own small pixel and those above and to the left.
        top, bottom, left, right = ((0, 0) if self.replicate else pads for pads in ((1, 0), (0, 1), (1, 0), (0, 1)))
        self.top_left = ops.Conv2D(out_channels, 2, pad_mode="pad", pad=top + left)
        self.top_right = ops.Conv2D(out_channels, 2, pad_mode="pad", pad=top + right)
        self.bottom_left = ops.Conv2D(out_channels, 2, pad_mode="pad", pad=bottom + left)
        self.bottom_right = ops.Conv2D(out_channels, 2, pad_mode="pad", pad=bottom + right)

    def construct(self, x, weight):
        n, _, h, w = x.shape
        top, bottom = fold(weight, 2)
        top_left, top_right = fold(top, 3)
        bottom_left, bottom_right = fold(bottom, 3)
        above, below = (repeat_edges(x, 2, 1, 0), repeat_edges(x, 2, 0, 1)) if self.replicate else (x, x)
        y = ops.stack(
            (
                self.top_left(self._beside(above, 1, 0), self.cast(top_left)),
                self.top_right(self._beside(above, 0, 1), self.cast(top_right)),
                self.bottom_left(self._beside(below, 1, 0), self.cast(bottom_left)),
                self.bottom_right(self._beside(below, 0, 1), self.cast(bottom_right)),
            ),
            axis=2,
        ).reshape(n, -1, 2, 2, h, w)
        return y.transpose(0, 1, 4, 2, 5, 3).reshape(n, -1, 2 * h, 2 * w)

    def _beside(self, x, left, right):
        return repeat_edges(x, 3, left, right) if self.replicate else x


def fold(weight, axis: int):
    """The two taps that see a pair's first, and those that see its second, of three along `axis`."""
    w0, w1, w2 = ops.split(weight, 1, axis)
    return ops.cat((w0, w1 + w2), axis), ops.cat((w0 + w1, w2), axis)


def nearest(x, frames: int = 1):
    """Every pixel twice along H and W, and along T where `frames` is 2."""
    b, c, t, h, w = x.shape
    x = ops.stack((x, x), axis=-1).reshape(b, c, t, h, 2 * w)
    x = ops.stack((x, x), axis=4).reshape(b, c, t, 2 * h, 2 * w)
    return double_frames(x) if frames == 2 else x


def double_frames(x):
    """Every frame twice."""
    b, c, t, h, w = x.shape
    return ops.stack((x, x), axis=3).reshape(b, c, 2 * t, h, w)
