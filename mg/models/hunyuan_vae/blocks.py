"""The encoder and decoder of HunyuanVideo's VAE: latent diffusion's, with every convolution causal in time."""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

from mindspore import nn, ops

from mg.models.layers.attention import CausalAttention
from mg.models.layers.conv import CausalConv3d
from mg.models.layers.norm import GroupNorm
from mg.models.layers.resample import DoublingCausalConv3d
from mg.models.layers.resnet import ResnetBlock, resnet_blocks

Conv = partial(CausalConv3d, padding="replicate")


class Upsample(nn.Cell):
    """Nearest neighbour, then a convolution. (B, C, T, H, W) -> (B, C, T or 2 T - 1, H or 2 H, W or 2 W)

    Args:
        factors: for time and space, 1 or 2; in time the first frame is not doubled.
    """

    def __init__(self, channels: int, factors: tuple[int, int]):
        super().__init__()
        self.conv = DoublingCausalConv3d(channels, factors)

    def construct(self, x):
        return self.conv(x)


class CausalEncoder(nn.Cell):
    """(B, in_channels, 4 k + 1, H, W) -> (B, out_channels, k + 1, H / s, W / s)

    Args:
        widths: channels of each level, finest first.
        factors: by how much time and space shrink after each level but the last, finest first.
        num_res_blocks: blocks per level.
        groups: groups of the norms.
        attention: use attention in the middle.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: Sequence[int],
        factors: Sequence[tuple[int, int]],
        num_res_blocks: int,
        groups: int,
        attention: bool,
    ):
        super().__init__()
        width = widths[0]
        self.conv_in = Conv(in_channels, width)
        levels = []
        for next_width, (time, space) in zip(widths, (*factors, (1, 1))):
            cells = OrderedDict(block=resnet_blocks(width, next_width, num_res_blocks, groups, Conv))
            width = next_width
            if time * space > 1:
                cells["downsample"] = Conv(width, width, stride=(time, space, space))
            levels.append(nn.SequentialCell(cells))
        self.down = nn.SequentialCell(levels)
        self.mid = _middle(width, groups, attention)
        self.norm_out = GroupNorm(width, groups)
        self.conv_out = Conv(width, out_channels)

    def construct(self, x):
        h = self.mid(self.down(self.conv_in(x)))
        return self.conv_out(ops.silu(self.norm_out(h)))


class CausalDecoder(nn.Cell):
    """(B, in_channels, k + 1, h, w) -> (B, out_channels, 4 k + 1, h * s, w * s)

    Args:
        widths, groups, attention: the encoder's.
        factors: by how much time and space grow after each level but the last, coarsest first.
        num_res_blocks: the encoder's; the decoder has one more per level.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: Sequence[int],
        factors: Sequence[tuple[int, int]],
        num_res_blocks: int,
        groups: int,
        attention: bool,
    ):
        super().__init__()
        width = widths[-1]
        self.conv_in = Conv(in_channels, width)
        self.mid = _middle(width, groups, attention)
        levels: list[nn.Cell] = []
        for next_width, (time, space) in zip(reversed(widths), (*factors, (1, 1))):
            cells = OrderedDict(block=resnet_blocks(width, next_width, num_res_blocks + 1, groups, Conv))
            width = next_width
            if time * space > 1:
                cells["upsample"] = Upsample(width, (time, space))
            levels.insert(0, nn.SequentialCell(cells))
        self.up = nn.CellList(levels)
        self.num_levels = len(levels)
        self.norm_out = GroupNorm(width, groups)
        self.conv_out = Conv(width, out_channels)

    @property
    def last_conv(self) -> nn.Cell:
        return self.conv_out

    def construct(self, z):
        return self.picture(self.features(z))

    def features(self, z):
        """Everything up to the input of the last convolution."""
        h = self.mid(self.conv_in(z))
        for i in range(self.num_levels):
            h = self.up[self.num_levels - 1 - i](h)  # the coarsest level first
        return ops.silu(self.norm_out(h))

    def picture(self, h):
        """The last convolution."""
        return self.conv_out(h)


def _middle(channels: int, groups: int, attention: bool) -> nn.SequentialCell:
    cells = OrderedDict(block_1=ResnetBlock(channels, channels, groups, Conv))
    if attention:
        cells["attn_1"] = CausalAttention(channels, groups)
    cells["block_2"] = ResnetBlock(channels, channels, groups, Conv)
    return nn.SequentialCell(cells)
