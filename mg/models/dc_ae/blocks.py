"""The blocks of Video DC-AE: residual blocks, linear attention, and resampling with shortcuts that have no parameters.

The shortcuts are DC-AE's (arXiv 2410.10733): pixels move to channels or back, and channels are averaged or repeated, so
that the parallel convolution learns a residual. The linear attention is EfficientViT's (arXiv 2205.14756); its cost is
linear in the number of tokens, not quadratic. Open-Sora 2.0 (arXiv 2503.09642) extended both to time.
"""

from mindspore import nn, ops

from mg.models.layers.attention import LinearAttention
from mg.models.layers.conv import Conv3d, GroupedPointwiseConv
from mg.models.layers.norm import RMSNorm
from mg.models.layers.resample import DoublingConv3d
from mg.models.layers.shortcuts import ChannelsToPixels, Gate, PixelsToChannels

HEAD = 32  # channels of an attention head
AGGREGATE_KERNEL = 5
EXPANSION = 4


class ResBlock(nn.Cell):
    """x + norm(conv(silu(conv(x))))"""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = Conv3d(channels, channels)
        self.conv2 = Conv3d(channels, channels, bias=False)
        self.norm = RMSNorm(channels)

    def construct(self, x):
        return x + self.norm(self.conv2(ops.silu(self.conv1(x))))


class LiteMLA(nn.Cell):
    """Residual multi-scale linear attention over all T*H*W tokens.

    A second set of heads sees queries, keys and values aggregated over the 5x5x5 neighbourhood.
    """

    def __init__(self, channels: int):
        super().__init__()
        heads = channels // HEAD
        self.qkv = Conv3d(channels, 3 * channels, 1, bias=False)
        self.aggreg = nn.SequentialCell(
            Conv3d(3 * channels, 3 * channels, AGGREGATE_KERNEL, bias=False, depthwise=True),
            GroupedPointwiseConv(3 * channels, 3 * heads),
        )
        self.attention = LinearAttention(HEAD)
        self.proj = Conv3d(2 * channels, channels, 1, bias=False)
        self.norm = RMSNorm(channels)

    def construct(self, x):
        qkv = self.qkv(x)
        y = self.attention(qkv, self.aggreg(qkv))
        return x + self.norm(self.proj(y))


class GLUMBConv(nn.Cell):
    """Residual gated feed-forward: expand, depthwise 3x3x3 convolution, gate one half with the other, project back."""

    def __init__(self, channels: int):
        super().__init__()
        self.inverted_conv = Conv3d(channels, 2 * EXPANSION * channels, 1)
        self.depth_conv = Conv3d(2 * EXPANSION * channels, 2 * EXPANSION * channels, depthwise=True)
        self.point_conv = Conv3d(EXPANSION * channels, channels, 1, bias=False)
        self.gate = Gate()
        self.norm = RMSNorm(channels)

    def construct(self, x):
        y = self.depth_conv(ops.silu(self.inverted_conv(x)))  # (B, 8C, T, H, W)
        return x + self.norm(self.point_conv(self.gate(y)))


class EfficientViTBlock(nn.Cell):
    """Attention for global context, a gated convolution for local context."""

    def __init__(self, channels: int):
        super().__init__()
        self.context_module = LiteMLA(channels)
        self.local_module = GLUMBConv(channels)

    def construct(self, x):
        return self.local_module(self.context_module(x))


class Downsample(nn.Cell):
    """Conv 3x3x3 with stride 2, plus the pixels themselves, moved to channels and averaged down to `out_channels`.

    (B, Cin, T, H, W) -> (B, Cout, T / 2 or T, H / 2, W / 2)

    Args:
        temporal: halve T too; an image's single frame stays.
    """

    def __init__(self, in_channels: int, out_channels: int, temporal: bool):
        super().__init__()
        self.conv = Conv3d(in_channels, out_channels, stride=(2 if temporal else 1, 2, 2))
        self.shortcut = PixelsToChannels(out_channels, temporal)

    def construct(self, x):
        return self.conv(x) + self.shortcut(x)


class Upsample(nn.Cell):
    """Nearest neighbour and conv 3x3x3, plus the channels themselves, repeated and moved to pixels.

    (B, Cin, T, H, W) -> (B, Cout, 2T or T, 2H, 2W)

    Args:
        temporal: double T too, except for an image.
    """

    def __init__(self, in_channels: int, out_channels: int, temporal: bool):
        super().__init__()
        self.temporal = temporal
        self.conv = DoublingConv3d(in_channels, out_channels)
        self.shortcut = ChannelsToPixels(out_channels)

    def construct(self, x, still):
        frames = 2 if self.temporal and not still else 1
        return self.conv(x, frames) + self.shortcut(x, frames)
