"""The same functions with fewer products.

Where a kernel sees the same value under several taps, or only zeros under some, the taps are added or dropped first.
After nearest-neighbour doubling every sample appears twice in a row, so two of three taps see the same one: the first
of a pair is (w0, w1 + w2) on two small samples, the second (w0 + w1, w2). Computed this way, on the small grid, a
doubled axis costs 4 products instead of 6, a frame doubled in height and width 16 instead of 36, one also doubled in
time 64 instead of 216, and the large input never exists.
"""

from mindspore import ops


def fold(weight, axis: int, split=ops.split):
    """Fold three taps along `axis` into two for the first of a pair, and two for the second."""
    w0, w1, w2 = split(weight, 1, axis)
    return ops.cat((w0, w1 + w2), axis), ops.cat((w0 + w1, w2), axis)


def quarters(weight):
    """Fold a kernel (Cout, Cin, 3, 3) into one for each pixel of a 2x2 block, (Cout, Cin, 2, 2) each, row by row."""
    top, bottom = fold(weight, 2)
    return fold(top, 3) + fold(bottom, 3)


def tap_of_a_frame(weight, repeated: bool, before: int):
    """The kernel that a temporal kernel amounts to on a single frame: the sum of all taps if edges are repeated, else
    the tap at index `before`. (Cout, Cin, k, kh, kw) -> (Cout, Cin, kh, kw)"""
    return weight.sum(axis=2) if repeated else weight[:, :, before]


def product_of_pointwise(first, second):
    """The weight and bias of a 1x1 convolution that equals a 1x1 one in space followed by a 1x1 one in time."""
    weight = second.weight[:, :, 0, 0]
    joined = ops.matmul(weight, first.weight[:, :, 0, 0]).expand_dims(2).expand_dims(3)
    return joined, ops.matmul(weight, first.bias) + second.bias
