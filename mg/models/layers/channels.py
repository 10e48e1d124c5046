"""Channels shifted, scaled and exchanged with frames, each as a device does it best.

On CPUs MindSpore 2.10 keeps a table of places for every operator that broadcasts, four times as large as its result, and
one of twice the size for every transpose, both until the process ends; and a norm of its own costs three times what these
pieces do. So on a CPU nothing broadcasts here and little is transposed. `on_cpu` says which way to take.
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


def shift(x, offsets):
    """Add a number to every channel. (B, C, T, H, W), offsets (C,) of x's dtype"""
    b, c, t, h, w = x.shape
    return ops.bias_add(x.reshape(b, c, t, h * w), offsets).reshape(b, c, t, h, w)


def scale(x, factors, on_cpu: bool):
    """Multiply every channel by a number. (N, C, L), factors (N or 1, C)"""
    if not on_cpu:
        return x * factors.expand_dims(2)
    n, c, length = x.shape
    # By diagonal matrices of a few channels: a product that costs what memory costs.
    size = 8 if c % 8 == 0 else c
    diagonal = ops.eye(size, size, x.dtype) * factors.reshape(-1, c // size, size, 1)
    return ops.matmul(diagonal, x.reshape(n, c // size, size, length)).reshape(n, c, length)
