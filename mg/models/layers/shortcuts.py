"""DC-AE's parameter-free shortcuts (arXiv 2410.10733), and its gate. (B, C, T, H, W)

Pixels move to channels or back, and channels are averaged or repeated, so that the parallel convolution learns a
residual. Open-Sora 2.0 (arXiv 2503.09642) extended them to time.
"""

from mindspore import mint, nn, ops

from mg.models.layers.layout import split


class AverageChannels(nn.Cell):
    """The mean of neighbouring channels. (B, C, T, H, W) -> (B, channels, T, H, W)"""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def construct(self, x):
        b, c, t, h, w = x.shape
        x = x.reshape(b, self.channels, c // self.channels, t, h * w)
        return mint.mean(x, dim=2).reshape(b, self.channels, t, h, w)


class RepeatChannels(nn.Cell):
    """Repeat every channel. (B, C, T, H, W) -> (B, channels, T, H, W)"""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def construct(self, x):
        b, c, t, h, w = x.shape
        x = ops.broadcast_to(x.expand_dims(2), (b, c, self.channels // c, t, h, w))
        return x.reshape(b, self.channels, t, h, w)


class PixelsToChannels(nn.Cell):
    """Blocks of 2 x 2 pixels become channels, which are averaged down to `channels`.

    (B, C, T, H, W) -> (B, channels, T or T / 2, H / 2, W / 2)

    Args:
        temporal: use blocks of 2 x 2 x 2, except for an image's single frame.
    """

    def __init__(self, channels: int, temporal: bool):
        super().__init__()
        self.temporal = temporal
        self.average = AverageChannels(channels)

    def construct(self, x):
        b, c, t, h, w = x.shape
        frames = 2 if self.temporal and t > 1 else 1
        x = x.reshape(b * c, t // frames, frames, h // 2, 2, w // 2, 2)
        x = x.transpose(0, 2, 4, 6, 1, 3, 5)  # (B*C, frames, 2, 2, T / frames, H / 2, W / 2)
        return self.average(x.reshape(b, c * frames * 4, t // frames, h // 2, w // 2))


class ChannelsToPixels(nn.Cell):
    """Channels are repeated to fill `channels` in every block of frames x 2 x 2 pixels, and move there.

    (B, C, T, H, W) -> (B, channels, T * frames, 2H, 2W)
    """

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def construct(self, x, frames):
        b, c, t, h, w = x.shape
        copies = self.channels * frames * 4 // c
        x = ops.broadcast_to(x.expand_dims(2), (b, c, copies, t, h, w)).reshape(-1, frames, 2, 2, t, h, w)
        x = x.transpose(0, 4, 1, 5, 2, 6, 3)  # (B*channels, T, frames, H, 2, W, 2)
        return x.reshape(b, self.channels, t * frames, 2 * h, 2 * w)


class Gate(nn.Cell):
    """The first half of the channels times SiLU of the second. (B, 2C, T, H, W) -> (B, C, T, H, W)"""

    def construct(self, x):
        y, gate = split(x, x.shape[1] // 2, 1)
        return y * ops.silu(gate)
