"""The temporal VAE: MAGVIT-v2's causal tokenizer (arXiv 2310.05737) without its codebook and spatial compression.

Its pixels are another VAE's latents, and it compresses only the frame rate.
"""

from collections import OrderedDict
from collections.abc import Sequence

from mindspore import nn, ops

from mg.models.layers.conv import CausalConv3d
from mg.models.layers.layout import Enter, Leave
from mg.models.layers.norm import GroupNorm
from mg.models.layers.resample import ChannelsToFrames
from mg.models.layers.resnet import resnet_blocks, start_certain

EPS = 1e-5  # of the norms


class Upsample(nn.Cell):
    """A causal convolution to twice the channels, which become frames. (B, C, T, H, W) -> (B, C, 2 T, H, W)"""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = CausalConv3d(channels, 2 * channels)
        self.to_frames = ChannelsToFrames()

    def construct(self, x):
        return self.to_frames(self.conv(x))


class TemporalEncoder(nn.Cell):
    """(B, in_channels, T, H, W) -> (B, out_channels, T / 2^m, H, W), T a multiple of 2^m

    Args:
        widths: channels of each level, finest first.
        halves: for each level but the last, whether the frame rate is halved after it, m times in total.
        num_res_blocks: blocks per level, and in the middle.
        groups: groups of the norms.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: Sequence[int],
        halves: Sequence[bool],
        num_res_blocks: int,
        groups: int,
    ):
        super().__init__()
        self.conv_in = CausalConv3d(in_channels, widths[0], bias=False)
        levels, width = [], widths[0]
        for next_width, halved in zip(widths, (*halves, False)):
            cells = OrderedDict(block=_blocks(width, next_width, num_res_blocks, groups))
            width = next_width
            if halved:
                cells["downsample"] = CausalConv3d(width, width, stride=(2, 1, 1))
            levels.append(nn.SequentialCell(cells))
        self.down = nn.SequentialCell(levels)
        self.mid = _blocks(width, width, num_res_blocks, groups)
        self.norm_out = GroupNorm(width, groups, EPS)
        self.conv_out = CausalConv3d(width, out_channels, kernel_size=1)

    def construct(self, x):
        h = self.mid(self.down(self.conv_in(x)))
        return self.conv_out(ops.silu(self.norm_out(h)))


class TemporalDecoder(nn.Cell):
    """(B, in_channels, t, H, W) -> (B, out_channels, t * 2^m, H, W)

    Args:
        widths, halves, num_res_blocks, groups: the encoder's, which the decoder mirrors.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: Sequence[int],
        halves: Sequence[bool],
        num_res_blocks: int,
        groups: int,
    ):
        super().__init__()
        width = widths[-1]
        self.conv_in = CausalConv3d(in_channels, width)
        self.mid = _blocks(width, width, num_res_blocks, groups)
        levels: list[nn.Cell] = []
        for next_width, doubled in reversed(list(zip(widths, (False, *halves)))):
            cells = OrderedDict(block=_blocks(width, next_width, num_res_blocks, groups))
            width = next_width
            if doubled:
                cells["upsample"] = Upsample(width)
            levels.insert(0, nn.SequentialCell(cells))
        self.up = nn.CellList(levels)
        self.num_levels = len(levels)
        self.norm_out = GroupNorm(width, groups, EPS)
        self.conv_out = CausalConv3d(width, out_channels)

    def construct(self, z):
        h = self.mid(self.conv_in(z))
        for i in range(self.num_levels):
            h = self.up[self.num_levels - 1 - i](h)  # the coarsest level first
        return self.conv_out(ops.silu(self.norm_out(h)))


class TemporalVAE(nn.Cell):
    """Encoder and decoder of latents (B, channels, T, h, w), T a multiple of 2^m; not a complete model.

    Args:
        channels: channels of the input.
        latent_channels: channels of the latents.
        widths, halves, num_res_blocks, groups: the encoder's.
    """

    def __init__(
        self,
        channels: int,
        latent_channels: int,
        widths: Sequence[int],
        halves: Sequence[bool],
        num_res_blocks: int,
        groups: int,
    ):
        super().__init__()
        shape = (widths, halves, num_res_blocks, groups)
        self.encoder = TemporalEncoder(channels, 2 * latent_channels, *shape)
        self.quant_conv = CausalConv3d(2 * latent_channels, 2 * latent_channels, kernel_size=1)
        self.post_quant_conv = CausalConv3d(latent_channels, latent_channels, kernel_size=1)
        self.decoder = TemporalDecoder(latent_channels, channels, *shape)
        self.enter, self.leave = Enter(), Leave()
        start_certain(self.quant_conv)

    def encode(self, x):
        """Mean and log-variance along the channels, (B, 2 latent_channels, T / 2^m, h, w)"""
        return self.leave(self.quant_conv(self.encoder(self.enter(x))))

    def decode(self, z):
        """(B, latent_channels, t, h, w) -> (B, channels, t * 2^m, h, w)"""
        return self.leave(self.decoder(self.post_quant_conv(self.enter(z))))


def _blocks(in_channels: int, out_channels: int, count: int, groups: int) -> nn.SequentialCell:
    return resnet_blocks(in_channels, out_channels, count, groups, _conv, EPS)


def _conv(in_channels: int, out_channels: int, kernel_size: int = 3, zero: bool = False) -> CausalConv3d:
    return CausalConv3d(in_channels, out_channels, kernel_size, bias=False, zero=zero)
