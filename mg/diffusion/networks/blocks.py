"""The layers that the networks share, in the order of the forward pass: embedders, attention, modulation, last layer.

Tokens are (B, T, S, C) throughout: T latent frames, S patches of each. Shifts, scales and gates come from the timestep
(DiT, arXiv 2212.09748; shared by all blocks, plus a table per block: PixArt-alpha, arXiv 2310.00426). Parameter names
are Open-Sora's.
"""

import math

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, mint, nn, ops
from mindspore.common.initializer import Normal, initializer

from mg.diffusion.networks.positions import rotate
from mg.diffusion.networks.sequence import AllTokens
from mg.models.layers.attention import MultiHeadAttention
from mg.models.layers.layout import narrow, zeros_behind
from mg.models.layers.linear import Linear
from mg.models.layers.norm import LastAxisRMSNorm, LayerNorm
from mg.models.layers.precision import PrecisionCell

_SMALL = 0.02  # standard deviation of the initial weights of timestep and caption embedders


# Embedders.


class PatchEmbed3D(nn.Cell):
    """Latents to patch tokens: a non-overlapping convolution as a matrix product, after zero padding."""

    def __init__(self, patch_size: tuple[int, int, int], in_channels: int, channels: int):
        super().__init__()
        self.patch_size = patch_size
        shape = (channels, in_channels, *patch_size)
        self.proj = Linear(in_channels * math.prod(patch_size), channels, shape=shape)

    def construct(self, x):
        """(B, C_in, T, H, W) -> (B, T', H', W', C)"""
        for axis in range(3):
            x = zeros_behind(x, axis + 2, -x.shape[axis + 2] % self.patch_size[axis])
        b, c, t, h, w = x.shape
        pt, ph, pw = self.patch_size
        x = x.reshape(b, c, t // pt, pt, h // ph, ph, w // pw, pw).transpose(0, 2, 4, 6, 1, 3, 5, 7)
        return self.proj(x.reshape(b, t // pt, h // ph, w // pw, c * pt * ph * pw))


def unpatchify(x, grid, patch_size, size):
    """The inverse: (B, T', S, patch * C_out) -> (B, C_out, T, H, W), cropped to `size` (T, H, W); in fp32."""
    (t, h, w), (pt, ph, pw) = grid, patch_size
    b, c = x.shape[0], x.shape[3] // (pt * ph * pw)
    x = x.astype(ms.float32).reshape(b, t, h, w, pt, ph, pw, c).transpose(0, 7, 1, 4, 2, 5, 3, 6)
    x = x.reshape(b, c, t * pt, h * ph, w * pw)
    for axis in range(3):
        if x.shape[axis + 2] > size[axis]:
            x = narrow(x, axis + 2, 0, size[axis])
    return x


class ScalarEmbedder(nn.Cell):
    """One number per sample, such as a timestep: cosines and sines in fp32, and an MLP. (B,) -> (B, C)"""

    def __init__(self, channels: int, frequencies: int = 256, first_init=None, last_init=None):
        super().__init__()
        half = frequencies // 2
        self.frequencies = Tensor(np.exp(-math.log(10000) * np.arange(half) / half).astype(np.float32))
        self.mlp = nn.SequentialCell(
            Linear(frequencies, channels, first_init), nn.SiLU(), Linear(channels, channels, last_init)
        )

    def construct(self, values):
        angles = values.astype(ms.float32).expand_dims(1) * self.frequencies.expand_dims(0)
        return self.mlp(mint.cat((mint.cos(angles), mint.sin(angles)), dim=1))


class TimestepEmbedder(ScalarEmbedder):
    """`ScalarEmbedder` with other initial weights."""

    def __init__(self, channels: int):
        super().__init__(channels, first_init=Normal(_SMALL), last_init=Normal(_SMALL))


def modulation_block(channels: int, number: int, weight_init=None) -> nn.SequentialCell:
    """Shifts, scales and gates from an embedded timestep: (B, C) -> (B, number * C)"""
    return nn.SequentialCell(nn.SiLU(), Linear(channels, number * channels, weight_init or Normal(_SMALL)))


class Mlp(nn.Cell):
    """Linear, GELU (tanh approximation), linear."""

    def __init__(self, in_channels: int, hidden: int, out_channels: int, first_init=None, last_init=None):
        super().__init__()
        self.fc1 = Linear(in_channels, hidden, first_init)
        self.fc2 = Linear(hidden, out_channels, last_init)

    def construct(self, x):
        return self.fc2(ops.gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbedder(nn.Cell):
    """Projects captions from the text encoder's channels to the network's. (B, L, D) -> (B, L, C)

    `y_embedding` (tokens, D) is the null caption, which replaces the caption for guidance and, now and then, in
    training. It is in the text encoder's channels and is not trained.
    """

    def __init__(self, in_channels: int, channels: int, tokens: int):
        super().__init__()
        null = initializer(Normal(in_channels**-0.5), (tokens, in_channels))
        self.y_embedding = Parameter(null, name="y_embedding", requires_grad=False)
        self.y_proj = Mlp(in_channels, channels, channels, Normal(_SMALL), Normal(_SMALL))

    def construct(self, y):
        return self.y_proj(y)


class LabelEmbedder(PrecisionCell):
    """Class numbers (B,) to (B, C). The last row, `num_classes`, stands for no class."""

    def __init__(self, num_classes: int, channels: int):
        super().__init__()
        self.embedding_table = EmbeddingTable(num_classes + 1, channels)

    def construct(self, y):
        return self.cast(ops.gather(self.embedding_table.weight, y, 0))


class EmbeddingTable(nn.Cell):
    """The table of an embedding."""

    def __init__(self, rows: int, channels: int):
        super().__init__()
        self.weight = Parameter(initializer(Normal(_SMALL), (rows, channels)), name="weight")


# Attention.


class Attention(nn.Cell):
    """Self-attention. (N, L, C) -> the same

    Args:
        qk_norm: normalise queries and keys per head.
        qk_norm_legacy: normalise them after the rotation instead of before it, as Open-Sora 1.1 was trained.
        proj_init: initial weights of the output projection.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        qk_norm: bool = False,
        qk_norm_legacy: bool = False,
        flash: bool = False,
        proj_init=None,
    ):
        super().__init__()
        self.channels, self.num_heads = channels, num_heads
        self.qk_norm_legacy = qk_norm_legacy
        self.qkv = Linear(channels, 3 * channels)
        self.q_norm = LastAxisRMSNorm(channels // num_heads) if qk_norm else None
        self.k_norm = LastAxisRMSNorm(channels // num_heads) if qk_norm else None
        self.tokens = AllTokens()
        self.attention = MultiHeadAttention(flash)
        self.proj = Linear(channels, channels, proj_init)

    def construct(self, x, rope=None, patches=None):
        """
        Args:
            rope: from a `RotaryEmbedding`, to rotate queries and keys; None for no rotation.
            patches: the total number of tokens, if workers may share them.
        """
        n, length, _ = x.shape
        q, k, v = mint.split(self.qkv(x), self.channels, 2)
        shape = (n, length, self.num_heads, self.channels // self.num_heads)
        q, k, v = q.reshape(shape), k.reshape(shape), v.reshape(shape)
        if rope is not None and self.qk_norm_legacy:
            q, k = rotate(q, rope), rotate(k, rope)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None and not self.qk_norm_legacy:
            q, k = rotate(q, rope), rotate(k, rope)
        # One by one: PyNative in MindSpore 2.10 computes a wrong gradient for a cat of the two.
        k, v = self.tokens.keys(k.astype(v.dtype), patches), self.tokens.keys(v, patches)
        return self.proj(self.attention(q, k, v))


class MultiHeadCrossAttention(nn.Cell):
    """Attention from tokens (B, T, S, C) to a caption (B, L, C)."""

    def __init__(self, channels: int, num_heads: int, flash: bool = False, proj_init=None):
        super().__init__()
        self.channels, self.num_heads = channels, num_heads
        self.q_linear = Linear(channels, channels)
        self.kv_linear = Linear(channels, 2 * channels)
        self.attention = MultiHeadAttention(flash)
        self.proj = Linear(channels, channels, proj_init)

    def construct(self, x, y, hidden=None):
        """hidden: from `hidden_tokens`, or None."""
        b, t, s, channels = x.shape
        head = channels // self.num_heads
        q = self.q_linear(x).reshape(b, t * s, self.num_heads, head)
        k, v = mint.split(self.kv_linear(y), channels, 2)
        k, v = k.reshape(b, -1, self.num_heads, head), v.reshape(b, -1, self.num_heads, head)
        return self.proj(self.attention(q, k, v, hidden)).reshape(x.shape)


def hidden_tokens(mask):
    """Inverts a caption mask (B, L), True at tokens, to what attention needs: (B, 1, 1, L), True at padding. A caption
    without tokens counts as one without a mask."""
    seen = mask.astype(ms.float32)
    none = mint.sum(seen, dim=1, keepdim=True) == 0
    hidden = mint.logical_and(seen == 0, mint.logical_not(none))
    return hidden.reshape(mask.shape[0], 1, 1, mask.shape[1])


def within_frames(attention, x, patches=None):
    """Self-attention over the patches of each frame, for tokens (B, T, S, C); `patches` as in `Attention`."""
    b, t, s, c = x.shape
    return attention(x.reshape(b * t, s, c), None, patches).reshape(b, t, s, c)


def along_time(attention, x, rope=None):
    """Self-attention over the frames of each patch, for tokens (B, T, S, C)."""
    b, t, s, c = x.shape
    x = x.transpose(0, 2, 1, 3).reshape(b * s, t, c)
    return attention(x, rope).reshape(b, s, t, c).transpose(0, 2, 1, 3)


# Modulation.


def of_frames(x_mask, generated, given):
    """Pick the values of each frame: (B, C) -> (B, 1 or T, 1, C)

    Args:
        x_mask: (B, T), True at generated frames; None if all are.
        generated, given: values for generated and for given frames, (B, C).
    """
    generated = generated.expand_dims(1)
    if x_mask is not None:
        generated = ops.where(x_mask.expand_dims(2), generated, given.expand_dims(1))
    return generated.expand_dims(2)


def modulations(table, t):
    """A block's table (1, n, C) plus the shared modulations (B, 1 or T, 1, n * C): n tensors (B, 1 or T, 1, C)."""
    _, n, c = table.shape
    return mint.split(table.reshape(1, 1, n, c) + t.reshape(t.shape[0], t.shape[1], n, c), 1, 2)


def scale_shift_table(rows: int, channels: int) -> Parameter:
    """The table of a block or of the last layer."""
    return Parameter(initializer(Normal(channels**-0.5), (rows, channels)))


class ModulatedNorm(PrecisionCell):
    """LayerNorm(x) * (1 + scale) + shift, in fp32. x (B, T, S, C), scale and shift (B, 1 or T, 1, C)"""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = LayerNorm(channels)

    def construct(self, x, shift, scale):
        return self.cast(self.norm(x) * (1 + scale.astype(ms.float32)) + shift.astype(ms.float32))


class Gate(PrecisionCell):
    """gate * y; gate (B, 1 or T, 1, C)"""

    def construct(self, gate, y):
        return self.cast(self.cast(gate) * self.cast(y))


class Sum(PrecisionCell):
    """x + y in the precision of products. (A block's final sum is an operator of the block itself: gradient
    checkpointing only keeps that.)"""

    def construct(self, x, y):
        return self.cast(self.cast(x) + self.cast(y))


class T2IFinalLayer(nn.Cell):
    """Tokens (B, T, S, C) to patches (B, T, S, values).

    Args:
        norm_given_twice: given frames are normalised and modulated as if generated, and then once more as given.
    """

    def __init__(self, channels: int, values: int, norm_given_twice: bool = False, weight_init=None):
        super().__init__()
        self.norm_given_twice = norm_given_twice
        self.scale_shift_table = scale_shift_table(2, channels)
        self.norm_final = ModulatedNorm(channels)
        self.linear = Linear(channels, values, weight_init)

    def construct(self, x, t, t0=None, x_mask=None):
        """t, t0: embedded timesteps (B, C) of generated and of given frames, as in `of_frames`."""
        table = self.scale_shift_table.expand_dims(0)
        if x_mask is None or not self.norm_given_twice:
            return self.linear(self.modulate(x, table, of_frames(x_mask, t, t0)))
        once = self.modulate(x, table, of_frames(None, t, None))
        twice = self.modulate(once, table, of_frames(None, t0, None))
        return self.linear(ops.where(x_mask.expand_dims(2).expand_dims(3), once, twice))

    def modulate(self, x, table, t):
        """table (1, 2, C), t (B, 1 or T, 1, C)"""
        shift, scale = mint.split(table.expand_dims(0) + t, 1, 2)
        return self.norm_final(x, shift, scale)
