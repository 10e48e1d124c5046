"""Where clips enter and leave the layers, and how frames and channels are swapped.

Every layer here maps (B, C, T, H, W) to (B, C, T, H, W). In some forms (mg.models.layers.forms) they work in another
layout: `Enter` then converts their input to it, and `Leave` converts their output back.
"""

from mindspore import mint, nn, ops


class Enter(nn.Cell):
    """(B, C, T, H, W) -> the layers' layout"""

    def construct(self, x):
        return x


class Leave(nn.Cell):
    """The layers' layout -> (B, C, T, H, W)"""

    def construct(self, x):
        return x


def swap_frames(x):
    """(B, C, T, H, W) -> (B, T, C, H, W), and back"""
    b, first, second, h, w = x.shape
    if first == 1 or second == 1:
        return x.reshape(b, second, first, h, w)
    return x.transpose(0, 2, 1, 3, 4)


def repeat_edges(x, axis: int, before: int, after: int):
    """Repeat the first slice along `axis` `before` more times, and the last one `after`."""
    if x.shape[axis] == 1:
        # Not a cat of x with itself: its gradient is wrong in MindSpore 2.10's PyNative.
        return ops.broadcast_to(x, x.shape[:axis] + (before + 1 + after,) + x.shape[axis + 1 :])
    first, *middle, last = ends(x, axis)
    return mint.cat((first,) * (before + 1) + tuple(middle) + (last,) * (after + 1), dim=axis)


def zeros_behind(x, axis: int, number: int):
    """Append `number` slices of zeros at the end of `axis`."""
    if not number:
        return x
    shape = x.shape[:axis] + (number,) + x.shape[axis + 1 :]
    return mint.cat((x, mint.zeros(shape, dtype=x.dtype)), dim=axis)


# All of these are views, which cost nothing on Ascend; `ops.split`, `ops.narrow` and slices are kernels, compiled
# online. `mint.split` is a view too, but its gradients are wrong in MindSpore 2.10's PyNative.


def narrow(x, axis: int, start: int, length: int):
    """`length` slices along `axis`, starting at `start`."""
    return mint.narrow(x, axis, start, length)


def split(x, sizes, axis: int):
    """Split `axis` into parts of these sizes, which must add up to its length; an int is the size of every part."""
    if isinstance(sizes, int):
        sizes = (sizes,) * (x.shape[axis] // sizes)
    parts, start = (), 0
    for size in sizes:
        parts += (mint.narrow(x, axis, start, size),)
        start = start + size
    return parts


def ends(x, axis: int):
    """The first slice along `axis`, those in between (if any) and the last."""
    between = x.shape[axis] - 2
    return split(x, (1, between, 1) if between else (1, 1), axis)
