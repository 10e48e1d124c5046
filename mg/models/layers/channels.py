"""Channels shifted, scaled and exchanged with frames, each as a device does it best.

On CPUs MindSpore 2.10 keeps a table of places for every operator that broadcasts, four times as large as its result,
until the process ends. So there, `on_cpu`, nothing broadcasts by itself.
"""

from mindspore import ops


def swap_frames(x):
    """(B, C, T, H, W) -> (B, T, C, H, W), and back"""
    b, first, second, h, w = x.shape
    if first == 1 or second == 1:
        return x.reshape(b, second, first, h, w)
    return x.transpose(0, 2, 1, 3, 4)


def shift(x, offsets, on_cpu: bool):
    """Add a number to every channel. (B, C, T, H, W), offsets (C,) of x's dtype"""
    b, c, t, h, w = x.shape
    if on_cpu:
        return ops.bias_add(x.reshape(b, c, t, h * w), offsets).reshape(b, c, t, h, w)
    return x + offsets.reshape(1, c, 1, 1, 1)


def scale(x, factors, on_cpu: bool):
    """Multiply by numbers for whole rows or columns; `factors` has x's rank, and 1 where they are the same."""
    return x * (ops.broadcast_to(factors, x.shape) if on_cpu else factors)
