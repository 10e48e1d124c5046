"""Single-head attention: within a frame, over its pixels; along time, over a pixel's frames; over both, causal."""

import mindspore as ms
from mindspore import Parameter, nn, ops
from mindspore.common.initializer import HeNormal, TruncatedNormal, initializer

from mg.models.layers.conv import SpatialConv
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
    """softmax(q k^T / sqrt(C)) v for q (N, L, C) and k, v (N, M, C); the softmax in fp32.

    Where the N*L*M scores would be more than `most_scores`, 1 GB, the queries go in as many pieces as that takes.
    """

    most_scores = 2**28

    def construct(self, q, k, v):
        n, length, _ = q.shape
        if k.shape[1] == 1:
            # A lone key has all the weight. (PyNative in MindSpore 2.10, once it has had a gradient of a softmax over
            # one value, gets every later one wrong.)
            return ops.broadcast_to(self.cast(v), (n, length, v.shape[2]))
        piece = max(1, self.most_scores // (n * k.shape[1]))
        if length <= piece:
            return self._attend(q, k, v)
        pieces = ()
        for start in range(0, length, piece):
            pieces += (self._attend(q[:, start : start + piece], k, v),)
        return ops.cat(pieces, axis=1)

    def _attend(self, q, k, v):
        scores = self.cast(ops.bmm(self.cast(q), self.cast(k).transpose(0, 2, 1)))  # (N, L, M)
        weights = ops.softmax(scores.astype(ms.float32) * q.shape[-1] ** -0.5, axis=-1)
        return self.cast(ops.bmm(self.cast(weights), self.cast(v)))


class SpatialAttention(nn.Cell):
    """Residual attention over the H*W pixels of every frame. Its output projection starts at zero: no effect."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = GroupNorm(channels, groups)
        self.q = SpatialConv(channels, channels, 1, padding=(0, 0, 0, 0))
        self.k = SpatialConv(channels, channels, 1, padding=(0, 0, 0, 0))
        self.v = SpatialConv(channels, channels, 1, padding=(0, 0, 0, 0))
        self.attention = DotProductAttention()
        self.proj_out = SpatialConv(channels, channels, 1, padding=(0, 0, 0, 0), zero=True)

    def construct(self, x):
        b, c, t, h, w = x.shape
        y = self.norm(x)
        y = self.attention(_pixels(self.q(y)), _pixels(self.k(y)), _pixels(self.v(y)))  # (B*T, H*W, C)
        y = y.reshape(b, t, h, w, c).transpose(0, 4, 1, 2, 3)
        return x + self.proj_out(y)


class TemporalAttention(PrecisionCell):
    """Residual attention over the T frames of every pixel. Its output projection starts at zero: no effect."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = GroupNorm(channels, groups)
        self.to_q = Dense(channels, TruncatedNormal(0.02))
        self.to_k = Dense(channels, TruncatedNormal(0.02))
        self.to_v = Dense(channels, TruncatedNormal(0.02))
        self.attention = DotProductAttention()
        self.proj_out = Dense(channels)

    def construct(self, x):
        b, c, t, h, w = x.shape
        y = self.norm(x).transpose(0, 3, 4, 2, 1).reshape(b * h * w, t, c)  # (B*H*W, T, C)
        v = self.to_v(y)
        if t > 1 or self.plain:  # a single frame has but itself to attend to
            v = self.attention(self.to_q(y), self.to_k(y), v)
        y = self.proj_out(v)
        return x + y.reshape(b, h, w, t, c).transpose(0, 4, 3, 1, 2)


class CausalAttention(nn.Cell):
    """Residual attention over the pixels of all frames, of which each sees those of its own frame and of earlier ones.

    The queries go frame by frame, each with the keys that it may see: there is no mask, half the products of one are
    saved, and of the (T*H*W)^2 scores only H*W * T*H*W exist at once; for the backward pass, half of all are kept.
    Its output projection starts at zero: no effect.
    """

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = GroupNorm(channels, groups)
        self.q = Dense(channels, HeNormal(nonlinearity="linear"))
        self.k = Dense(channels, HeNormal(nonlinearity="linear"))
        self.v = Dense(channels, HeNormal(nonlinearity="linear"))
        self.attention = DotProductAttention()
        self.proj_out = Dense(channels)

    def construct(self, x):
        b, c, t, h, w = x.shape
        y = self.norm(x).transpose(0, 2, 3, 4, 1).reshape(b, t * h * w, c)  # (B, T*H*W, C)
        q, k, v = self.q(y), self.k(y), self.v(y)
        frames = ()
        for i in range(t):
            start, stop = i * h * w, (i + 1) * h * w
            frames += (self.attention(q[:, start:stop], k[:, :stop], v[:, :stop]),)  # (B, H*W, C)
        # One alone as it is: MindSpore 2.10 warns of the gradient of a cat of one.
        y = self.proj_out(ops.cat(frames, axis=1) if t > 1 else frames[0])
        return x + y.reshape(b, t, h, w, c).transpose(0, 4, 1, 2, 3)


def _pixels(x):
    """(B, C, T, H, W) -> (B*T, H*W, C)"""
    b, c, t, h, w = x.shape
    return x.transpose(0, 2, 3, 4, 1).reshape(b * t, h * w, c)
