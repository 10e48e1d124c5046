"""Frames of a clip as pictures, their channels under a kernel in time, and the sums over its taps."""

from mindspore import ops


def pictures(x):
    """(B, T, C, H, W) -> (B*T, C, H, W)"""
    b, t, c, h, w = x.shape
    return x.reshape(b * t, c, h, w)


def clips(x, frames: int):
    """(B*T, C, H, W) -> (B, T, C, H, W)"""
    n, c, h, w = x.shape
    return x.reshape(n // frames, frames, c, h, w)


def shifted(x, offset: int, repeated: bool):
    """As many frames as x has, from `offset` on; outside of x its edges, or zeros."""
    b, t, c, h, w = x.shape
    if offset == 0:
        return x
    missing = min(abs(offset), t)
    inner = ops.narrow(x, 1, max(offset, 0), t - missing) if missing < t else None
    if repeated:
        outer = (ops.narrow(x, 1, 0 if offset < 0 else t - 1, 1),) * missing
    else:
        outer = (ops.zeros((b, missing, c, h, w), x.dtype),)
    if inner is None:
        return ops.cat(outer, 1) if len(outer) > 1 else outer[0]
    return ops.cat(outer + (inner,) if offset < 0 else (inner,) + outer, 1)


def sum_of_taps(taps, before: int, repeated: bool):
    """The sum over i of what tap i gives `before` - i frames earlier; `taps`, each (B, T, C, H, W)."""
    y = shifted(taps[0], -before, repeated)
    for i in range(1, len(taps)):
        y = y + shifted(taps[i], i - before, repeated)
    return y


def convolve_within(conv2d, x, weights):
    """A convolution in time, one of `weights` a tap, of the frames that have all under their kernel: tap by tap.

    (B, t + k - 1, Cin, H, W) -> (B*t, Cout, H', W'), t
    """
    t = x.shape[1] - len(weights) + 1
    total = conv2d(pictures(ops.narrow(x, 1, 0, t)), weights[0])
    for i, weight in enumerate(weights[1:], start=1):
        total = total + conv2d(pictures(ops.narrow(x, 1, i, t)), weight)
    return total, t


def under_kernel(x, frames: int, size: int, stride: int):
    """The frames under a kernel of `size` frames as channels of one. (B, T, C, H, W) -> (B*frames, C*size, H, W)"""
    b, t, c, h, w = x.shape
    missing = size - 1 + frames * stride - t
    if missing > 0:  # for the reshape below; no kernel sees them
        x = ops.cat((x, ops.zeros((b, missing, c, h, w), x.dtype)), 1)
    seen = ()
    for i in range(size):
        frames_seen = ops.narrow(x, 1, i, frames * stride)
        if stride > 1:  # not a slice with a step: on CPUs MindSpore 2.10 has no gradient for one in a batch
            frames_seen = ops.narrow(frames_seen.reshape(b, frames, stride, c, h, w), 2, 0, 1)
        seen += (frames_seen.reshape(b, frames, c, h, w),)
    return ops.stack(seen, axis=3).reshape(b * frames, c * size, h, w)


def join_taps(weight):
    """A kernel for what `under_kernel` gives. (Cout, Cin, k, kh, kw) -> (Cout, Cin*k, kh, kw)"""
    c_out, c_in, size, height, width = weight.shape
    return weight.reshape(c_out, c_in * size, height, width)


def add_bias(x, bias):
    """(N, C, H, W) + (C,) or None"""
    return x if bias is None else ops.bias_add(x, bias.astype(x.dtype))
