"""Large clips piece by piece along time, so that of what a layer makes on the way no more than a piece exists at once.

For a CPU, where MindSpore runs operator by operator, and in inference. A compiled graph gains nothing: each piece adds
operators, of which MindSpore's compiler keeps more than the pieces save. Clips are (B, T, C, H, W), frames first.
"""

import itertools

from mindspore import mint, nn, ops

from mg import runtime

most_values = 2**21  # of a piece: 8 MB in fp32


class InPieces(nn.Cell):
    """A layer that takes large clips in pieces, where Python calls it: a compiler sees `construct` alone.

    Attributes:
        growth: how many values it makes of one, if they are more; 0 of a layer that takes no pieces.
    """

    growth = 1.0

    def __call__(self, x, *args):
        if self.training or x.size * self.growth <= most_values or not _op_by_op():
            return super().__call__(x, *args)
        if len(x) > 1:  # clips, or images, know nothing of each other
            parts = ((self(x[start:stop], *args), start, stop) for start, stop in bounds(x, self.growth, axis=0))
            return _join(parts, len(x), axis=0)
        return self.in_pieces(x, *args) if x.shape[1] > 1 else super().__call__(x, *args)

    def in_pieces(self, x, *args):
        """What `construct` gives, to rounding; by itself that of each frame alone."""
        return along_time(self.construct, x, self.growth)


def _op_by_op() -> bool:
    """Whether a CPU runs operators one by one, for their values alone."""
    return runtime.device() == "cpu" and not runtime.is_graph_mode() and not runtime.records_gradients()


def bounds(x, growth: float = 1, axis: int = 1) -> list[tuple[int, int]]:
    """Where each piece along `axis` starts and stops; all are of about the same length."""
    length = x.shape[axis]
    count = min(length, -(-int(x.size * growth) // most_values))
    stops = [length * i // count for i in range(count + 1)]
    return list(itertools.pairwise(stops))


def each(x):
    """The pieces of x, one at a time."""
    for start, stop in bounds(x):
        yield ops.narrow(x, 1, start, stop - start)


def frames(x, start: int, stop: int, repeated: bool = True):
    """The frames from `start` to `stop`; outside of x they are its edges, or zeros."""
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
    """What `function` makes of x, piece by piece.

    Args:
        function: takes a piece with the frames `before` and `behind` it, gives what becomes of the piece alone.
        growth: see `InPieces`.
        repeated: outside of x there are its edges; or zeros.
    """

    def parts():
        for start, stop in bounds(x, growth):
            yield function(frames(x, start - before, stop + behind, repeated)), start, stop

    return _join(parts(), x.shape[1])


def _join(parts, length: int, axis: int = 1):
    """One tensor of `parts` along `axis`, each with where it starts and stops in a `length` that may have grown since.

    Each is copied when it comes: a cat would hold all of them beside the whole. A tensor on a CPU and its array share
    their memory.
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
