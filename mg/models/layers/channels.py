"""Channels shifted, scaled and exchanged with frames, each as a device does it best.

On CPUs MindSpore 2.10 keeps a table of places for every operator that broadcasts, four times as large as its result,
and one of twice the size for every transpose, both until the process ends. So there, `on_cpu`, nothing broadcasts by
itself, and little is transposed.
"""

from mindspore import ops


def frames_first(x, on_cpu: bool):
    """(B, C, T, H, W) -> (B, T, C, H, W)"""
    b, c, t, h, w = x.shape
    if t == 1:
        return x.reshape(b, t, c, h, w)
    return ops.stack(ops.unstack(x, axis=2), axis=1) if on_cpu else x.transpose(0, 2, 1, 3, 4)


def channels_first(x, on_cpu: bool):
    """(B, T, C, H, W) -> (B, C, T, H, W)"""
    b, t, c, h, w = x.shape
    if t == 1:
        return x.reshape(b, c, t, h, w)
    return ops.stack(ops.unstack(x, axis=1), axis=2) if on_cpu else x.transpose(0, 2, 1, 3, 4)


def shift(x, offsets, on_cpu: bool):
    """Add a number to every channel. (B, C, T, H, W), offsets (C,) of x's dtype"""
    b, c, t, h, w = x.shape
    if on_cpu:
        return ops.bias_add(x.reshape(b, c, t, h * w), offsets).reshape(b, c, t, h, w)
    return x + offsets.reshape(1, c, 1, 1, 1)


def scale(x, factors, on_cpu: bool):
    """Multiply by numbers for whole rows or columns; `factors` has x's rank, and 1 where they are the same."""
    return x * (ops.broadcast_to(factors, x.shape) if on_cpu else factors)
