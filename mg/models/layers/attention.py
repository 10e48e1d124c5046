"""Attention: spatial, over a frame's pixels; temporal, over a pixel's frames; over both, causal; and linear.

These are residual and have a single head, except the linear one. `MultiHeadAttention` is for transformers.
"""

import mindspore as ms
from mindspore import Parameter, mint, nn, ops
from mindspore.common.initializer import HeNormal, TruncatedNormal, initializer

from mg.models.layers.conv import SpatialConv
from mg.models.layers.layout import narrow, split, swap_frames
from mg.models.layers.norm import GroupNorm
from mg.models.layers.precision import PrecisionCell


class Dense(PrecisionCell):
    """A linear layer over the last axis. (..., C) -> (..., C)"""

    def __init__(self, channels: int, weight_init="zeros"):
        super().__init__()
        self.weight = Parameter(initializer(weight_init, (channels, channels)), name="weight")
        self.bias = Parameter(initializer("zeros", (channels,)), name="bias")

    def construct(self, x):
        y = ops.matmul(self.cast(x), self.cast(self.weight).transpose(1, 0))
        return self.cast(y + self.cast(self.bias))


class DotProductAttention(PrecisionCell):
    """softmax(q^T k / sqrt(C)) v for q (N, C, L) and k, v (N, C, M) -> (N, C, L); the softmax is in fp32.

    If the N*L*M scores would exceed `most_scores`, 1 GB, the queries are processed in pieces.

    Args:
        channels_last: inputs and outputs are (N, L, C) and (N, M, C), optionally with more leading axes.
    """

    most_scores = 2**28

    def __init__(self, channels_last: bool = False):
        super().__init__()
        self.tokens = -2 if channels_last else -1  # the tokens' axis
        if channels_last:
            self.match, self.mix = ops.BatchMatMul(transpose_b=True), ops.BatchMatMul()
        else:
            self.match, self.mix = ops.BatchMatMul(transpose_a=True), ops.BatchMatMul(transpose_b=True)

    def construct(self, q, k, v, hidden=None):
        """hidden: True at masked keys, of a shape that broadcasts to the scores' (..., L, M)."""
        keys, length = k.shape[self.tokens], q.shape[self.tokens]
        if keys == 1:
            # A single key gets all the weight. (In MindSpore 2.10's PyNative, once a gradient of a softmax over one
            # value has been taken, all later ones are wrong.)
            return ops.broadcast_to(self.cast(v), q.shape)
        n = 1
        for size in q.shape[:-2]:
            n = n * size
        piece = max(1, self.most_scores // (n * keys))
        if length <= piece:
            return self._attend(q, k, v, hidden)
        rest = length % piece
        pieces = ()
        for part in split(q, (piece,) * (length // piece) + ((rest,) if rest else ()), self.tokens):
            pieces += (self._attend(part, k, v, hidden),)
        return mint.cat(pieces, dim=self.tokens)

    def _attend(self, q, k, v, hidden):
        channels = q.shape[-3 - self.tokens]
        scores = self.cast(self.match(self.cast(q), self.cast(k))).astype(ms.float32) * channels**-0.5  # (..., L, M)
        if hidden is not None:
            scores = ops.masked_fill(scores, hidden, -1e30)
        weights = self.cast(ops.softmax(scores, axis=-1))
        if self.tokens == -2:
            return self.cast(self.mix(weights, self.cast(v)))
        return self.cast(self.mix(self.cast(v), weights))


class MultiHeadAttention(PrecisionCell):
    """Multi-head attention. q (B, L, heads, C), k and v (B, M, heads, C) -> (B, L, heads * C)

    Args:
        flash: use flash attention on Ascend, in its form of this layer.
    """

    def __init__(self, flash: bool = False):
        super().__init__()
        self.flash = flash
        self.attention = DotProductAttention(channels_last=True)

    def construct(self, q, k, v, hidden=None):
        """hidden: (B, 1, 1, M), True at masked keys; each sample must have at least one unmasked key."""
        return self.attend(q, k, v, hidden)

    def attend(self, q, k, v, hidden):
        b, length, heads, channels = q.shape
        q, k, v = q.transpose(0, 2, 1, 3), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        return self.attention(q, k, v, hidden).transpose(0, 2, 1, 3).reshape(b, length, heads * channels)


class SpatialAttention(nn.Cell):
    """Residual attention over the H*W pixels of every frame. Its output projection is initialised to zero."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = GroupNorm(channels, groups)
        self.q = SpatialConv(channels, channels, 1, padding=(0, 0, 0, 0))
        self.k = SpatialConv(channels, channels, 1, padding=(0, 0, 0, 0))
        self.v = SpatialConv(channels, channels, 1, padding=(0, 0, 0, 0))
        self.attention = DotProductAttention()
        self.proj_out = SpatialConv(channels, channels, 1, padding=(0, 0, 0, 0), zero=True)

    def construct(self, x):
        y = self.norm(x)
        y = self.attention(self.images(self.q(y)), self.images(self.k(y)), self.images(self.v(y)))
        return x + self.proj_out(self.clips(y, x.shape))

    def images(self, x):
        """(B, C, T, H, W) -> (B*T, C, H*W)"""
        b, c, t, h, w = x.shape
        return swap_frames(x).reshape(b * t, c, h * w)

    def clips(self, y, shape):
        """(B*T, C, H*W) -> (B, C, T, H, W), `shape`"""
        b, c, t, h, w = shape
        return swap_frames(y.reshape(b, t, c, h, w))


class TemporalAttention(nn.Cell):
    """Residual attention over the T frames of every pixel. Its output projection is initialised to zero."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = GroupNorm(channels, groups)
        self.to_q = Dense(channels, TruncatedNormal(0.02))
        self.to_k = Dense(channels, TruncatedNormal(0.02))
        self.to_v = Dense(channels, TruncatedNormal(0.02))
        self.attention = DotProductAttention(channels_last=True)
        self.proj_out = Dense(channels)

    def construct(self, x):
        y = self.tokens(self.norm(x))
        y = self.proj_out(self.attention(self.to_q(y), self.to_k(y), self.to_v(y)))
        return x + self.clips(y, x.shape)

    def tokens(self, x):
        """(B, C, T, H, W) -> (B*H*W, T, C)"""
        b, c, t, h, w = x.shape
        return x.reshape(b, c, t, h * w).transpose(0, 3, 2, 1).reshape(b * h * w, t, c)

    def clips(self, y, shape):
        """(B*H*W, T, C) -> (B, C, T, H, W), `shape`"""
        b, c, t, h, w = shape
        return y.reshape(b, h * w, t, c).transpose(0, 3, 2, 1).reshape(b, c, t, h, w)


class CausalAttention(nn.Cell):
    """Residual attention over the pixels of all frames; each pixel sees those of its own and of earlier frames.

    Queries are processed frame by frame, each with the keys that it may see: this needs no mask, saves half the
    products, and of the (T*H*W)^2 scores only H*W * T*H*W exist at once; for the backward pass, half of all are kept.
    Its output projection is initialised to zero.
    """

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = GroupNorm(channels, groups)
        self.q = Dense(channels, HeNormal(nonlinearity="linear"))
        self.k = Dense(channels, HeNormal(nonlinearity="linear"))
        self.v = Dense(channels, HeNormal(nonlinearity="linear"))
        self.attention = DotProductAttention(channels_last=True)
        self.proj_out = Dense(channels)

    def construct(self, x):
        y = self.tokens(self.norm(x))  # (B, T*H*W, C), frame by frame
        q, k, v = self.q(y), self.k(y), self.v(y)
        pixels = x.shape[3] * x.shape[4]
        frames = ()
        for stop in range(pixels, q.shape[1] + 1, pixels):
            seen = narrow(q, 1, stop - pixels, pixels), narrow(k, 1, 0, stop), narrow(v, 1, 0, stop)
            frames += (self.attention(*seen),)  # (B, H*W, C)
        # No cat of a single frame: MindSpore 2.10 warns about its gradient.
        y = self.proj_out(mint.cat(frames, dim=1) if len(frames) > 1 else frames[0])
        return x + self.clips(y, x.shape)

    def tokens(self, x):
        """(B, C, T, H, W) -> (B, T*H*W, C)"""
        b, c, t, h, w = x.shape
        return x.reshape(b, c, t * h * w).transpose(0, 2, 1)

    def clips(self, y, shape):
        """(B, T*H*W, C) -> (B, C, T, H, W), `shape`"""
        return y.transpose(0, 2, 1).reshape(shape)


class LinearAttention(PrecisionCell):
    """relu(q) attends to relu(k) without a softmax: (v k^T) q / (sum of k)^T q, over all T*H*W tokens.

    EfficientViT's (arXiv 2205.14756), with cost linear in the number of tokens thanks to the order of the products.
    Inputs are two sets of heads, (B, 3C, T, H, W) each, with the channels of q, k and v of one head after the other;
    returns (B, 2C, T, H, W) in fp32.

    Args:
        head: channels per head.
    """

    leaves_fp16 = True  # it sums over all tokens

    def __init__(self, head: int):
        super().__init__()
        self.head = head
        self.across = ops.BatchMatMul(transpose_b=True)
        self.sums = ops.BatchMatMul(transpose_a=True)

    def construct(self, first, second):
        b, c, t, h, w = first.shape
        heads = mint.cat((first, second), dim=1).reshape(-1, 3 * self.head, t * h * w)
        return self.attend(*split(heads, self.head, 1)).reshape(b, 2 * c // 3, t, h, w)

    def attend(self, q, k, v):
        """q, k, v (N, head, tokens) -> the same"""
        q, k, v = self.cast(ops.relu(q)), self.cast(ops.relu(k)), self.cast(v)
        keys = self.cast(mint.sum(k.astype(ms.float32), dim=2, keepdim=True))  # (N, head, 1)
        values = self.cast(self.across(v, k))  # (N, head, head)
        out = self.cast(ops.bmm(values, q)).astype(ms.float32)
        norm = self.cast(self.sums(keys, q)).astype(ms.float32)  # (N, 1, tokens)
        return self.over(out, norm + 1e-15)

    def over(self, values, norm):
        """values (N, head, tokens) / norm (N, 1, tokens)"""
        return values * mint.reciprocal(norm)
