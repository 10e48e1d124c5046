"""The encoder and decoder of latent diffusion's autoencoder, per frame or factorised in space and time.

They are latent diffusion's (arXiv 2112.10752); Movie Gen (arXiv 2410.13720, section 3.1.1) follows every spatial
convolution with one in time, every spatial attention with a temporal one, and halves the frame rate where it halves the
frame. Without the temporal parts this is the image VAE of SD and SDXL. Parameters have latent diffusion's names.
"""

import itertools
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
from mindspore import Tensor, nn, ops

from mg.models.layers.attention import SpatialAttention, TemporalAttention
from mg.models.layers.conv import FactorizedConv, SpatialConv
from mg.models.layers.norm import GroupNorm
from mg.models.layers.resample import SpatialDownsample, SpatialUpsample, TemporalDownsample, TemporalUpsample


class ResnetBlock(nn.Cell):
    """Norm, SiLU and conv, twice, plus the input, through a 1x1 conv if the width changes.

    The second conv is initialised to zero: an untrained network is then nearly linear, and learns from scratch far
    faster.

    Args:
        groups, eps: of the norms.
        conv: builds a size-preserving convolution, `conv(in_channels, out_channels, kernel_size=3, zero=False)`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, groups: int, conv: Callable[..., nn.Cell], eps: float = 1e-6
    ):
        super().__init__()
        self.norm1 = GroupNorm(in_channels, groups, eps)
        self.conv1 = conv(in_channels, out_channels)
        self.norm2 = GroupNorm(out_channels, groups, eps)
        self.conv2 = conv(out_channels, out_channels, zero=True)
        self.widens = in_channels != out_channels
        if self.widens:
            self.nin_shortcut = conv(in_channels, out_channels, kernel_size=1)

    def construct(self, x):
        h = self.conv1(ops.silu(self.norm1(x)))
        h = self.conv2(ops.silu(self.norm2(h)))
        if self.widens:
            x = self.nin_shortcut(x)
        return x + h


class ResnetEncoder(nn.Cell):
    """(B, in_channels, T, H, W) -> (B, out_channels, ceil(T / 2^m), H / 2^n, W / 2^n), n = len(widths) - 1

    Args:
        widths: channels of each level, finest first.
        groups: groups of the norms.
        temporal: build the temporal convolutions.
        temporal_attention: add temporal attention in the middle.
        temporal_levels: the m levels after which the frame rate is halved.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: list[int],
        num_res_blocks: int,
        groups: int = 32,
        temporal: bool = False,
        temporal_attention: bool = False,
        temporal_levels: tuple[int, ...] = (),
    ):
        super().__init__()
        conv = FactorizedConv if temporal else _spatial_conv
        self.conv_in = conv(in_channels, widths[0])
        levels = []
        width = widths[0]
        for level, next_width in enumerate(widths):
            cells = OrderedDict(block=resnet_blocks(width, next_width, num_res_blocks, groups, conv))
            width = next_width
            if level < len(widths) - 1:
                cells["downsample_spat" if temporal else "downsample"] = SpatialDownsample(width)
            if level in temporal_levels:
                cells["downsample_temp"] = TemporalDownsample(width)
            levels.append(nn.SequentialCell(cells))
        self.down = nn.SequentialCell(levels)
        self.mid = _middle(width, temporal, temporal_attention, groups)
        self.norm_out = GroupNorm(width, groups)
        self.conv_out = conv(width, out_channels)
        _start_transparent(self.mid[-1], self.norm_out, self.conv_out)
        start_certain(_spatial(self.conv_out))

    def construct(self, x):
        h = self.mid(self.down(self.conv_in(x)))
        return self.conv_out(ops.silu(self.norm_out(h)))


class ResnetDecoder(nn.Cell):
    """(B, in_channels, t, h, w) -> (B, out_channels, t * 2^m, h * 2^n, w * 2^n), n = len(widths) - 1

    Args:
        widths, groups, temporal, temporal_attention: the encoder's.
        num_res_blocks: the encoder's; the decoder has one more per level.
        temporal_levels: the m levels after which the frame rate is doubled.
        temporal_padding: "replicate" or "zeros", for temporal upsampling.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: list[int],
        num_res_blocks: int,
        groups: int = 32,
        temporal: bool = False,
        temporal_attention: bool = False,
        temporal_levels: tuple[int, ...] = (),
        temporal_padding: str = "replicate",
    ):
        super().__init__()
        conv = FactorizedConv if temporal else _spatial_conv
        width = widths[-1]
        self.conv_in = conv(in_channels, width)
        self.mid = _middle(width, temporal, temporal_attention, groups)
        levels: list[nn.Cell] = []
        for level in reversed(range(len(widths))):
            cells = OrderedDict(block=resnet_blocks(width, widths[level], num_res_blocks + 1, groups, conv))
            width = widths[level]
            if level > 0:
                cells["upsample_spat" if temporal else "upsample"] = SpatialUpsample(width)
            if level in temporal_levels:
                cells["upsample_temp"] = TemporalUpsample(width, temporal_padding)
            levels.insert(0, nn.SequentialCell(cells))
        self.up = nn.CellList(levels)
        self.num_levels = len(levels)
        self.norm_out = GroupNorm(width, groups)
        self.temporal = temporal
        self.conv_out = conv(width, out_channels)
        _start_transparent(levels[0][0][-1], self.norm_out, self.conv_out)

    @property
    def last_conv(self) -> nn.Cell:
        return self.conv_out.conv_temp if self.temporal else self.conv_out

    def construct(self, z):
        return self.picture(self.features(z))

    def features(self, z):
        """Everything up to the input of the last convolution."""
        h = self.mid(self.conv_in(z))
        for i in range(self.num_levels):
            h = self.up[self.num_levels - 1 - i](h)  # the coarsest level first
        h = ops.silu(self.norm_out(h))
        return self.conv_out.conv_spat(h) if self.temporal else h

    def picture(self, h):
        """The last convolution."""
        return self.conv_out.conv_temp(h) if self.temporal else self.conv_out(h)


def resnet_blocks(
    in_channels: int, out_channels: int, count: int, groups: int, conv: Callable[..., nn.Cell], eps: float = 1e-6
) -> nn.SequentialCell:
    """`count` consecutive blocks, the first of which changes the width."""
    widths = [in_channels] + [out_channels] * count
    return nn.SequentialCell([ResnetBlock(*pair, groups, conv, eps) for pair in itertools.pairwise(widths)])


def _spatial_conv(in_channels: int, out_channels: int, kernel_size: int = 3, zero: bool = False) -> SpatialConv:
    return SpatialConv(in_channels, out_channels, kernel_size, padding=(kernel_size // 2,) * 4, zero=zero)


def _middle(channels: int, temporal: bool, temporal_attention: bool, groups: int) -> nn.SequentialCell:
    conv = FactorizedConv if temporal else _spatial_conv
    attention = SpatialAttention(channels, groups)
    if temporal:  # a sequence, so that the temporal one next to it has a name
        attention = nn.SequentialCell([attention] + [TemporalAttention(channels, groups)] * temporal_attention)
    return nn.SequentialCell(
        OrderedDict(
            block_1=ResnetBlock(channels, channels, groups, conv),
            attn_1=attention,
            block_2=ResnetBlock(channels, channels, groups, conv),
        )
    )


# An untrained network loses what it needs most: the last norm removes each image's brightness and contrast, and the
# posterior drowns the latents in noise. The functions below initialise it so that neither happens.

_MARGIN, _SHIFT = 4.0, 3.0


def _start_transparent(block: ResnetBlock, norm: GroupNorm, conv: nn.Cell) -> None:
    """Initialise silu(norm(h)) to about h + constant.

    Constants of both signs, large compared with the features, are added before the norm, which removes them: it then
    divides by their deviation, not the image's. This needs an even number of channels per group.
    """
    channels = norm.gamma.shape[0]
    if channels // norm.groups % 2:
        return
    constants = np.tile(np.float32([_MARGIN, -_MARGIN]), channels // 2)
    _spatial(block.conv2).bias.set_data(Tensor(constants))
    norm.gamma.set_data(Tensor(np.full(channels, _MARGIN, np.float32)))
    norm.beta.set_data(Tensor(_SHIFT - constants))  # where SiLU is nearly linear
    weight = _spatial(conv).weight.asnumpy()
    _spatial(conv).bias.set_data(Tensor(-weight.sum(axis=(1, 2, 3)) * _SHIFT / (1 + np.exp(np.float32(-_SHIFT)))))


def through_transparent(count: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Matrices that carry features through the initial silu(norm(h)): (count, channels), then (channels, count).

    Each feature appears with both signs, so it has no mean for the norm to remove and no square for SiLU to add. The
    first three, brightness and colours, have both signs on constants of either sign, so they don't enter the deviation
    either. Features beyond the available channels are left out.
    """
    spread = np.zeros((count, channels))
    taken = 0
    for feature in range(count):
        signs = [1, 1, -1, -1] if feature < 3 else [1, -1]
        if taken + len(signs) <= channels:
            spread[feature, taken : taken + len(signs)] = signs
            taken += len(signs)
    sigmoid = 1 / (1 + np.exp(-_SHIFT))
    slope = sigmoid + _SHIFT * sigmoid * (1 - sigmoid)  # of SiLU at _SHIFT
    return spread, spread.T / np.maximum(np.abs(spread).sum(1), 1) / slope


def start_certain(conv: nn.Cell, logvar: float = -6.0) -> None:
    """Initialise the second half of `conv`'s output, the posterior's log-variance, to a small constant."""
    weights, biases = conv.weight.asnumpy().copy(), conv.bias.asnumpy().copy()
    weights[len(weights) // 2 :] = 0
    biases[len(biases) // 2 :] = logvar
    conv.weight.set_data(Tensor(weights))
    conv.bias.set_data(Tensor(biases))


def _spatial(conv: nn.Cell) -> SpatialConv:
    return conv.conv_spat if isinstance(conv, FactorizedConv) else conv
