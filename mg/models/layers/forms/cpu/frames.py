"""Frames of a clip as pictures, frames under a temporal kernel as channels, and sums over its taps."""

from mindspore import ops

# Reshapes again in a compiled backward pass, until which it would otherwise hold the copy.
reshape_again = ops.Reshape().recompute()


def pictures(x):
    """(B, T, C, H, W) -> (B*T, C, H, W)"""
    b, t, c, h, w = x.shape
    return x.reshape(b * t, c, h, w)


def clips(x, frames: int):
    """(B*T, C, H, W) -> (B, T, C, H, W)"""
    n, c, h, w = x.shape
    return x.reshape(n // frames, frames, c, h, w)


def shifted(x, offset: int, repeated: bool):
    """x shifted by `offset` frames, keeping its length; outside x there are its edges, or zeros."""
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


def convolve_within(conv2d, x, weights):
    """A temporal convolution, tap by tap with one of `weights` each, of the frames whose whole kernel is inside x.

    (B, t + k - 1, Cin, H, W) -> (B*t, Cout, H', W'), t
    """
    t = x.shape[1] - len(weights) + 1
    total = conv2d(pictures(ops.narrow(x, 1, 0, t)), weights[0])
    for i, weight in enumerate(weights[1:], start=1):
        total = total + conv2d(pictures(ops.narrow(x, 1, i, t)), weight)
    return total, t


def under_kernel(x, frames: int, size: int, stride: int):
    """Stack the frames under a kernel of `size` frames as channels. (B, T, C, H, W) -> (B*frames, C*size, H, W)"""
    b, t, c, h, w = x.shape
    missing = size - 1 + frames * stride - t
    if missing > 0:  # for the reshape below; no kernel sees them
        x = ops.cat((x, ops.zeros((b, missing, c, h, w), x.dtype)), 1)
    seen = ()
    for i in range(size):
        frames_seen = ops.narrow(x, 1, i, frames * stride)
        if stride > 1:  # not a strided slice: on CPUs MindSpore 2.10 has no gradient for one in a batch
            frames_seen = ops.narrow(frames_seen.reshape(b, frames, stride, c, h, w), 2, 0, 1)
        seen += (frames_seen.reshape(b, frames, c, h, w),)
    return ops.stack(seen, axis=3).reshape(b * frames, c * size, h, w)


def join_taps(weight):
    """The kernel for `under_kernel`'s output. (Cout, Cin, k, kh, kw) -> (Cout, Cin*k, kh, kw)"""
    c_out, c_in, size, height, width = weight.shape
    return reshape_again(weight, (c_out, c_in * size, height, width))


def add_bias(x, bias):
    """(N, C, H, W) + (C,) or None"""
    return x if bias is None else ops.bias_add(x, bias.astype(x.dtype))
