"""Downsampling and upsampling by 2 in space and time. (B, C, T, H, W)

Upsampling is nearest neighbour followed by a convolution, in one layer: forms (mg.models.layers.forms) fuse the two.
"""

from mindspore import mint, nn, ops

from mg.models.layers.conv import CausalConv3d, Conv3d, SpatialConv, TemporalConv
from mg.models.layers.layout import narrow


class SpatialDownsample(nn.Cell):
    """Conv 3x3 with stride 2 and one row and column of zeros at the bottom and right. H and W are halved."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = SpatialConv(channels, channels, stride=2, padding=(0, 1, 0, 1))

    def construct(self, x):
        return self.conv(x)


class TemporalDownsample(nn.Cell):
    """Temporal conv with stride 2. T becomes ceil(T / 2)."""

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
    """Nearest neighbour in time, then a temporal conv. T is doubled.

    Args:
        padding: "replicate", as in the Movie Gen paper, or "zeros", as in mindone's weights. With the former, a single
            frame becomes two identical ones; forms may return only one of them.
    """

    def __init__(self, channels: int, padding: str = "replicate"):
        super().__init__()
        self.conv = DoublingTemporalConv(channels, padding)

    def construct(self, x):
        return self.conv(x)


class DoublingSpatialConv(SpatialConv):
    """`SpatialConv` 3x3 after nearest-neighbour doubling in space. (B, C, T, H, W) -> (B, C, T, 2H, 2W)"""

    def __init__(self, channels: int):
        super().__init__(channels, channels)

    def pad(self, x):
        return double_pixels(x)


class DoublingTemporalConv(TemporalConv):
    """`TemporalConv` after nearest-neighbour doubling in time. (B, C, T, H, W) -> (B, C, 2T, H, W)"""

    def __init__(self, channels: int, padding: str = "replicate"):
        super().__init__(channels, padding=padding)

    def construct(self, x):
        x = double_frames(self.cast(x))
        return self.cast(self.conv(self.pad(x), self.cast(self.kernel()), self.cast(self.bias)))


class DoublingConv3d(Conv3d):
    """`Conv3d` 3x3x3 after nearest-neighbour doubling in height and width, and in time if requested.

    (B, Cin, T, H, W) -> (B, Cout, frames * T, 2H, 2W)
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels)

    def construct(self, x, frames):  # type: ignore[override]
        x = double_pixels(self.cast(x))
        x = double_frames(x) if frames == 2 else x
        return self.cast(self.conv(x, self.cast(self.weight), self.cast(self.bias)))


class DoublingCausalConv3d(CausalConv3d):
    """`CausalConv3d` 3x3x3, edges replicated, after nearest-neighbour doubling; in time the first frame isn't doubled.

    (B, C, T, H, W) -> (B, C, T or 2T - 1, H or 2H, W or 2W)

    Args:
        factors: for time and space, 1 or 2.
    """

    def __init__(self, channels: int, factors: tuple[int, int]):
        super().__init__(channels, channels, padding="replicate")
        self.factors = factors

    def construct(self, x):
        time, space = self.factors
        x = self.cast(x)
        x = double_pixels(x) if space == 2 else x
        x = narrow(double_frames(x), 2, 1, 2 * x.shape[2] - 1) if time == 2 else x
        return self.cast(self.conv(self.pad(x), self.cast(self.weight), self.cast(self.bias)))


class ChannelsToFrames(nn.Cell):
    """Each frame becomes two, whose channel c are channels 2 c and 2 c + 1. (B, 2C, T, H, W) -> (B, C, 2T, H, W)"""

    def construct(self, x):
        b, c, t, h, w = x.shape
        x = x.reshape(b, c // 2, 2, t, h * w).transpose(0, 1, 3, 2, 4)
        return x.reshape(b, c // 2, 2 * t, h, w)


def double_pixels(x):
    """Double H and W by nearest neighbour. (B, C, T, H, W) -> (B, C, T, 2H, 2W)"""
    b, c, t, h, w = x.shape
    x = mint.nn.functional.interpolate(x.reshape(b, c * t, h, w), scale_factor=2.0, mode="nearest")
    return x.reshape(b, c, t, 2 * h, 2 * w)


def double_frames(x):
    """Repeat every frame. (B, C, T, H, W) -> (B, C, 2T, H, W)"""
    b, c, t, h, w = x.shape
    return ops.broadcast_to(x.expand_dims(3), (b, c, t, 2, h, w)).reshape(b, c, 2 * t, h, w)
