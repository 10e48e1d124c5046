"""Halving and doubling of the frame and of the frame rate."""

from mindspore import nn, ops

from mg.models.layers.conv import SpatialConv, TemporalConv


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
        self.conv = SpatialConv(channels, channels)

    def construct(self, x):
        return self.conv(nearest(x))


class TemporalUpsample(nn.Cell):
    """Nearest neighbour in time, then a temporal conv. T is doubled.

    Args:
        padding: "replicate", as in the Movie Gen paper, or "zeros", as in the weights that mindone trained.
    """

    def __init__(self, channels: int, padding: str = "replicate"):
        super().__init__()
        self.conv = TemporalConv(channels, padding=padding)

    def construct(self, x):
        return self.conv(double_frames(x))


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
