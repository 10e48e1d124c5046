"""The blocks of Video DC-AE: residual blocks, linear attention, and resampling with shortcuts that have no parameters.

DC-AE (arXiv 2410.10733) gave the shortcuts: pixels go to channels or back, and channels are averaged or repeated, so
that the convolution beside them learns a residual. EfficientViT (arXiv 2205.14756) gave the linear attention, whose
cost grows with the number of tokens and not with its square. Open-Sora 2.0 (arXiv 2503.09642) carried both into time.
"""

import mindspore as ms
from mindspore import nn, ops

from mg.models.layers.channels import scale
from mg.models.layers.conv import Conv3d, GroupedPointwiseConv, PointwiseConv
from mg.models.layers.norm import RMSNorm
from mg.models.layers.precision import PrecisionCell
from mg.models.layers.resample import DoublingConv3d

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


class LinearAttention(PrecisionCell):
    """relu(q) attends to relu(k) without a softmax: (v k^T) q / (sum of k)^T q, tokens last.

    q, k, v (B, heads, HEAD, N) -> (B, heads, HEAD, N) in fp32. The order of the products is what makes it linear in N.
    """

    leaves_fp16 = True  # sums over all tokens

    def construct(self, q, k, v):
        q, k, v = self.cast(ops.relu(q)), self.cast(ops.relu(k)), self.cast(v)
        keys = self.cast(k.astype(ms.float32).sum(axis=3, keepdims=True))  # (B, heads, HEAD, 1)
        values = self.cast(ops.matmul(v, k.transpose(0, 1, 3, 2)))  # (B, heads, HEAD, HEAD)
        out = self.cast(ops.matmul(values, q)).astype(ms.float32)
        norm = self.cast(ops.matmul(keys.transpose(0, 1, 3, 2), q)).astype(ms.float32)  # (B, heads, 1, N)
        return scale(out, 1.0 / (norm + 1e-15), self.on_cpu)


class LiteMLA(nn.Cell):
    """Residual multi-scale linear attention over all T*H*W tokens.

    A second set of heads sees queries, keys and values gathered from the 5x5x5 neighbourhood.
    """

    def __init__(self, channels: int):
        super().__init__()
        heads = channels // HEAD
        self.qkv = PointwiseConv(channels, 3 * channels, bias=False)
        self.aggreg = nn.SequentialCell(
            Conv3d(3 * channels, 3 * channels, AGGREGATE_KERNEL, bias=False, depthwise=True),
            GroupedPointwiseConv(3 * channels, 3 * heads),
        )
        self.attention = LinearAttention()
        self.proj = PointwiseConv(2 * channels, channels, bias=False)
        self.norm = RMSNorm(channels)

    def construct(self, x):
        b, c, t, h, w = x.shape
        qkv = self.qkv(x)
        qkv = ops.cat((qkv, self.aggreg(qkv)), axis=1)  # (B, 2*3C, T, H, W)
        qkv = qkv.reshape(b, -1, 3 * HEAD, t * h * w)
        q, k, v = ops.split(qkv, HEAD, axis=2)  # (B, 2*heads, HEAD, N) each
        y = self.attention(q, k, v).reshape(b, 2 * c, t, h, w)
        return x + self.norm(self.proj(y))


class GLUMBConv(nn.Cell):
    """Residual gated feed-forward: expand, a depthwise 3x3x3 convolution, one half gates the other, and back."""

    def __init__(self, channels: int):
        super().__init__()
        self.inverted_conv = PointwiseConv(channels, 2 * EXPANSION * channels)
        self.depth_conv = Conv3d(2 * EXPANSION * channels, 2 * EXPANSION * channels, depthwise=True)
        self.point_conv = PointwiseConv(EXPANSION * channels, channels, bias=False)
        self.norm = RMSNorm(channels)

    def construct(self, x):
        y = self.depth_conv(ops.silu(self.inverted_conv(x)))  # (B, 8C, T, H, W)
        y, gate = ops.chunk(y, 2, axis=1)
        return x + self.norm(self.point_conv(y * ops.silu(gate)))


class EfficientViTBlock(nn.Cell):
    """Attention for what is far, a gated convolution for what is near."""

    def __init__(self, channels: int):
        super().__init__()
        self.context_module = LiteMLA(channels)
        self.local_module = GLUMBConv(channels)

    def construct(self, x):
        return self.local_module(self.context_module(x))


class Downsample(nn.Cell):
    """Conv 3x3x3 of stride 2 plus the pixels themselves, moved to channels and averaged down to `out_channels`.

    (B, Cin, T, H, W) -> (B, Cout, T / 2 or T, H / 2, W / 2)

    Args:
        temporal: halve T too; an image's single frame stays.
    """

    def __init__(self, in_channels: int, out_channels: int, temporal: bool):
        super().__init__()
        self.out_channels, self.temporal = out_channels, temporal
        self.conv = Conv3d(in_channels, out_channels, stride=(2 if temporal else 1, 2, 2))

    def construct(self, x):
        frames = 2 if self.temporal and x.shape[2] > 1 else 1
        return self.conv(x) + average_channels(pixel_unshuffle(x, frames), self.out_channels)


class Upsample(nn.Cell):
    """Nearest neighbour and conv 3x3x3, plus the channels themselves, repeated and moved to pixels.

    (B, Cin, T, H, W) -> (B, Cout, 2T or T, 2H, 2W)

    Args:
        temporal: double T too, but for an image.
    """

    def __init__(self, in_channels: int, out_channels: int, temporal: bool):
        super().__init__()
        self.out_channels, self.temporal = out_channels, temporal
        self.conv = DoublingConv3d(in_channels, out_channels)

    def construct(self, x, still):
        frames = 2 if self.temporal and not still else 1
        channels = repeat_channels(x, self.out_channels * frames * 4)
        return self.conv(x, frames) + pixel_shuffle(channels, frames)


def average_channels(x, channels: int):
    """The mean of neighbouring channels. (B, C, T, H, W) -> (B, channels, T, H, W)"""
    b, c, t, h, w = x.shape
    return x.reshape(b, channels, c // channels, t, h, w).mean(axis=2)


def repeat_channels(x, channels: int):
    """Every channel several times in a row. (B, C, T, H, W) -> (B, channels, T, H, W)"""
    b, c, t, h, w = x.shape
    return ops.broadcast_to(x.expand_dims(2), (b, c, channels // c, t, h, w)).reshape(b, channels, t, h, w)


def pixel_unshuffle(x, frames: int):
    """Blocks of frames x 2 x 2 pixels become channels. (B, C, T, H, W) -> (B, C*frames*4, T/frames, H/2, W/2)"""
    b, c, t, h, w = x.shape
    x = x.reshape(b * c, t // frames, frames, h // 2, 2, w // 2, 2).transpose(0, 2, 4, 6, 1, 3, 5)
    return x.reshape(b, c * frames * 4, t // frames, h // 2, w // 2)


def pixel_shuffle(x, frames: int):
    """The inverse of `pixel_unshuffle`. (B, C*frames*4, T, H, W) -> (B, C, T*frames, 2H, 2W)"""
    b, c, t, h, w = x.shape
    c = c // (frames * 4)
    x = x.reshape(b * c, frames, 2, 2, t, h, w).transpose(0, 4, 1, 5, 2, 6, 3)
    return x.reshape(b, c, t * frames, 2 * h, 2 * w)
