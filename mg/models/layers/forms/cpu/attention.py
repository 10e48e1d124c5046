"""Attention in the frames-first layout."""

import mindspore as ms
from mindspore import ops

from mg.models.layers import attention


class SpatialAttention(attention.SpatialAttention):
    def images(self, x):
        b, t, c, h, w = x.shape
        return x.reshape(b * t, c, h * w)

    def clips(self, y, shape):
        return y.reshape(shape)


class TemporalAttention(attention.TemporalAttention):
    def tokens(self, x):
        b, t, c, h, w = x.shape
        return x.reshape(b, t, c, h * w).transpose(0, 3, 1, 2).reshape(b * h * w, t, c)

    def clips(self, y, shape):
        b, t, c, h, w = shape
        return y.reshape(b, h * w, t, c).transpose(0, 2, 3, 1).reshape(shape)


class CausalAttention(attention.CausalAttention):
    def tokens(self, x):
        b, t, c, h, w = x.shape
        return x.reshape(b, t, c, h * w).transpose(0, 1, 3, 2).reshape(b, t * h * w, c)

    def clips(self, y, shape):
        b, t, c, h, w = shape
        return y.reshape(b, t, h * w, c).transpose(0, 1, 3, 2).reshape(shape)


class LinearAttention(attention.LinearAttention):
    """Frame by frame, with the sums over tokens added up over frames, so that tokens need not be contiguous."""

    def construct(self, first, second):
        b, t, c, h, w = first.shape
        x = ops.cat((first, second), 2).reshape(b * t, -1, 3 * self.head, h * w)
        q, k, v = ops.split(x, self.head, 2)  # (B*T, heads, head, H*W)
        q, k, v = self.cast(ops.relu(q)), self.cast(ops.relu(k)), self.cast(v)
        keys = self.over_frames(k.astype(ms.float32).sum(axis=3, keepdims=True), t)
        values = self.over_frames(self.across(v, k).astype(ms.float32), t)
        out = self.cast(ops.bmm(values, q)).astype(ms.float32)
        total = self.cast(self.sums(keys, q)).astype(ms.float32)  # (B*T, heads, 1, H*W)
        out = out * ops.broadcast_to(1.0 / (total + 1e-15), out.shape)
        return out.reshape(b, t, 2 * c // 3, h, w)

    def over_frames(self, x, frames):
        """(B*T, ...) -> the sums over T, for every frame again"""
        n, heads, rows, columns = x.shape
        total = x.reshape(n // frames, frames, heads, rows, columns).sum(axis=1, keepdims=True)
        total = ops.broadcast_to(self.cast(total), (n // frames, frames, heads, rows, columns))
        return total.reshape(x.shape)
