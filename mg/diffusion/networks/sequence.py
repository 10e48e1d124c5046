"""Sequence parallelism: workers share a clip's tokens, each with some patches of every frame.

Only attention within frames needs other workers' patches: queries stay local, keys and values are gathered from all
workers by AllGather. Open-Sora instead exchanges heads for patches and back by all-to-all, which sends less with more
than two workers; but MindSpore has no AlltoAll for CPUs, and AllGather works with any number of heads and patches.
"""

from mindspore import nn

from mg.collectives import AllGather, Group
from mg.models.layers.layout import narrow, zeros_behind


class AllTokens(nn.Cell):
    """For a worker that has all tokens."""

    def own(self, x):
        """This worker's share of all tokens (B, T, S, C)."""
        return x

    def whole(self, x, patches):
        """The inverse; `patches` is S."""
        return x

    def keys(self, k, patches):
        """Keys or values of all patches, (N, S, heads, C), from this worker's."""
        return k


class SharedTokens(AllTokens):
    """For a worker that has part of the patches; all workers of a group have equally many, after zero padding."""

    def __init__(self, group: Group):
        super().__init__()
        self.rank, self.size = group.rank, group.size
        self.gather = AllGather(group)

    def own(self, x):
        each = -(-x.shape[2] // self.size)
        return narrow(zeros_behind(x, 2, each * self.size - x.shape[2]), 2, self.rank * each, each)

    def whole(self, x, patches):
        b, t, s, c = x.shape
        return self._collect(x.reshape(b * t, s, c), patches).reshape(b, t, patches, c)

    def keys(self, k, patches):
        n, s, heads, channels = k.shape
        return self._collect(k.reshape(n, s, heads * channels), patches).reshape(n, patches, heads, channels)

    def _collect(self, x, patches):
        """(N, s, C) of each worker -> (N, patches, C)"""
        n, s, c = x.shape
        x = self.gather(x).reshape(self.size, n, s, c).transpose(1, 0, 2, 3)
        return narrow(x.reshape(n, self.size * s, c), 1, 0, patches)
