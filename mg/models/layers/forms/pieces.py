"""Large clips piece by piece along time, so that a layer's intermediate results only exist for one piece at a time.

For inference on a CPU where MindSpore runs op by op. A compiled graph gains nothing: each piece adds operators, for
which MindSpore's compiler keeps more memory than the pieces save. Clips are (B, T, C, H, W), frames first.
"""

import itertools

from mindspore import mint, nn, ops

from mg import runtime

most_values = 2**21  # per piece: 8 MB in fp32


class InPieces(nn.Cell):
    """A layer that processes large clips in pieces when called from Python; a compiler only sees `construct`.

    Attributes:
        growth: output values per input value, at least 1; 0 if the layer cannot work in pieces.
    """

    growth = 1.0

    def __call__(self, x, *args):
        if self.training or x.size * self.growth <= most_values or not _op_by_op():
            return super().__call__(x, *args)
        if len(x) > 1:  # clips, or images, are independent
            parts = ((self(x[start:stop], *args), start, stop) for start, stop in bounds(x, self.growth, axis=0))
            return _join(parts, len(x), axis=0)
        return self.in_pieces(x, *args) if x.shape[1] > 1 else super().__call__(x, *args)

    def in_pieces(self, x, *args):
        """`construct`, to rounding; by default for layers that process each frame independently."""
        return along_time(self.construct, x, self.growth)


def _op_by_op() -> bool:
    """Whether a CPU runs op by op, without gradients."""
    return runtime.device() == "cpu" and not runtime.is_graph_mode() and not runtime.records_gradients()


def bounds(x, growth: float = 1, axis: int = 1) -> list[tuple[int, int]]:
    """(start, stop) of each piece along `axis`; all have about the same length."""
    length = x.shape[axis]
    count = min(length, -(-int(x.size * growth) // most_values))
    stops = [length * i // count for i in range(count + 1)]
    return list(itertools.pairwise(stops))


def each(x):
    """The pieces of x, one at a time."""
    for start, stop in bounds(x):
        yield ops.narrow(x, 1, start, stop - start)


def frames(x, start: int, stop: int, repeated: bool = True):
    """The frames from `start` to `stop`; outside x they are its edges, or zeros."""
    b, t, c, h, w = x.shape
    before, behind = max(0, -start), max(0, stop - t)
    inner = ops.narrow(x, 1, start + before, stop - start - before - behind)
    if before + behind == 0:
        return inner
    if repeated:
        first, last = ops.narrow(x, 1, 0, 1), ops.narrow(x, 1, t - 1, 1)
    else:
        first = last = ops.zeros((b, 1, c, h, w), x.dtype)
    return ops.cat((first,) * before + (inner,) + (last,) * behind, 1)


def along_time(function, x, growth: float = 1, before: int = 0, behind: int = 0, repeated: bool = True):
    """Apply `function` to x piece by piece.

    Args:
        function: receives a piece with the frames `before` and `behind` it, and returns the result for the piece only.
        growth: see `InPieces`.
        repeated: pad x with its edges, otherwise with zeros.
    """

    def parts():
        for start, stop in bounds(x, growth):
            yield function(frames(x, start - before, stop + behind, repeated)), start, stop

    return _join(parts(), x.shape[1])


def _join(parts, length: int, axis: int = 1):
    """Join `parts` along `axis`, each with its start and stop in the input's `length`, which the layer may have grown.

    Each part is copied as it arrives: a cat would hold all of them next to the result. On a CPU a tensor and its array
    share memory.
    """
    whole = None
    for part, start, stop in parts:
        factor = part.shape[axis] / (stop - start)
        if whole is None:
            shape = list(part.shape)
            shape[axis] = round(length * factor)
            whole = mint.empty(shape, dtype=part.dtype)
            array = whole.asnumpy().swapaxes(0, axis)
        first = round(start * factor)
        array[first : first + part.shape[axis]] = part.asnumpy().swapaxes(0, axis)
    return whole
