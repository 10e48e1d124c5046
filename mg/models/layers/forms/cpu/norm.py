"""Norms: channel gains and offsets are applied by a batch norm or a bias."""

import mindspore as ms
from mindspore import ops

from mg.models.layers import norm
from mg.models.layers.forms.pieces import InPieces, along_time, each

_LARGE = 2**16  # values


class GroupNorm(InPieces, norm.GroupNorm):
    """Composed of simpler operators, in half the time. In training that gains nothing, and compiles twice as long."""

    def prepare(self):
        self.affine = ops.BatchNorm(is_training=False, epsilon=1e-12)

    def in_parts(self, x):
        return not self.training and x.size >= _LARGE

    def construct(self, x):
        y = x.astype(ms.float32)
        return self.cast(self.composed(y) if self.in_parts(x) else self.whole(y))

    def whole(self, x):
        b, t, c, h, w = x.shape
        y = self.exchange(x).reshape(b, c, t, h * w)
        y = ops.group_norm(y, self.groups, self.gamma, self.beta, self.eps)
        return self.exchange(y.reshape(b, c, t, h, w))

    def exchange(self, x):
        """`swap_frames`, without the tensors that a transpose keeps"""
        b, first, second, h, w = x.shape
        if first == 1 or second == 1:
            return x.reshape(b, second, first, h, w)
        if first < second:  # whichever makes fewer pieces
            return ops.stack(ops.unstack(x, axis=1), axis=2)
        return ops.stack(ops.unstack(x, axis=2), axis=1)

    def composed(self, x):
        mean = self.of_groups(self.sums(x), x)
        variance = self.of_groups(self.sums(add_to_channels(x, -mean).square()), x)
        return self.scaled(x, mean, self.factors(variance))

    def in_pieces(self, x):
        return along_time(self.scaling(x), x)

    def scaling(self, x):
        """Return a function that normalises pieces of x by the statistics of all of x."""
        mean = self.of_groups(ops.cat([self.sums(piece) for piece in each(x)], 1), x)
        squares = [self.sums(add_to_channels(piece, -mean).square()) for piece in each(x)]
        factors = self.factors(self.of_groups(ops.cat(squares, 1), x))
        return lambda piece: self.cast(self.scaled(piece, mean, factors))

    def sums(self, x):
        """Sum over the pixels of each frame separately: on a CPU one sum of millions of values is off by 5e-4.

        (B, T, C, H, W) -> (B, T, C)
        """
        b, t, c, h, w = x.shape
        return x.astype(ms.float32).reshape(b * t * c, h * w).sum(axis=1).reshape(b, t, c)

    def of_groups(self, sums, x):
        """The mean over a group's channels and all frames and pixels of x, repeated for each of its channels, (B, C)"""
        b, t, c, h, w = x.shape
        means = sums.sum(axis=1).reshape(b, self.groups, c // self.groups).sum(axis=2, keepdims=True)
        means = means * (self.groups / (t * c * h * w))
        return ops.broadcast_to(means, (b, self.groups, c // self.groups)).reshape(b, c)

    def factors(self, variance):
        return ops.rsqrt(variance + self.eps) * self.gamma.reshape(1, -1)

    def scaled(self, x, mean, factors):
        """(x - mean) * factors + beta; x (B, T, C, H, W), mean and factors (B, C)"""
        b, t, c, h, w = x.shape
        mean, factors = over_frames(mean, t), over_frames(factors, t)
        beta = over_frames(ops.broadcast_to(self.beta.reshape(1, c), (b, c)), t)
        x = x.astype(ms.float32).reshape(1, b * t * c, h, w)
        return affine(self.affine, x, factors, beta, mean).reshape(b, t, c, h, w)


def over_frames(values, frames: int):
    """(B, C) -> (B * frames * C,)"""
    b, c = values.shape
    return ops.broadcast_to(values.reshape(b, 1, c), (b, frames, c)).reshape(-1)


def add_to_channels(x, offsets):
    """x (B, T, C, H, W) + offsets (B, C), in fp32"""
    b, t, c, h, w = x.shape
    y = x.astype(ms.float32).reshape(1, b * t * c, h * w)
    return ops.bias_add(y, over_frames(offsets, t)).reshape(x.shape)


def affine(batch_norm, x, factors, offsets, means=None):
    """(x (N, C, H, W) - means (C,)) * factors (C,) + offsets (C,), as a norm with constant statistics, which keeps only
    x."""
    means = ops.zeros(factors.shape, ms.float32) if means is None else means
    return batch_norm(x, factors, offsets, means, ops.ones(factors.shape, ms.float32))[0]


class RMSNorm(InPieces, norm.RMSNorm):
    def prepare(self):
        self.affine = ops.BatchNorm(is_training=False, epsilon=1e-12)

    def construct(self, x):
        b, t, c, h, w = x.shape
        x = x.astype(ms.float32).reshape(b * t, c, h * w)
        squares = x.square()
        mean = ops.matmul(ops.ones((1, c), ms.float32), squares) * (1 / c)  # (B*T, 1, H*W); sums of rows are slow
        x = x * ops.broadcast_to(ops.rsqrt(mean + self.eps), x.shape)
        return self.cast(affine(self.affine, x.reshape(b * t, c, h, w), self.gamma, self.beta)).reshape(b, t, c, h, w)
