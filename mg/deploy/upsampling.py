"""Nearest neighbour by 2, and convolutions behind it, which are convolutions of fewer taps on the small grid.

Of a kernel of 3 that slides over samples that all stand twice, two taps always meet the same sample. So what comes out
at even places is a convolution of 2 taps of the samples as they were, at odd places another one: along H and W that
makes 16 products of 36, along T, H and W 64 of 216.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import helper

from mg.deploy.onnx_graph import GraphBuilder


@dataclass(frozen=True)
class Doubled:
    """A value whose samples all stand twice along `axes`; `small` has them once."""

    small: str
    axes: frozenset[int]


class Upsampling:
    """Knows which values of a graph are doubled, and carries that through reshapes, transposes and slices."""

    def __init__(self, builder: GraphBuilder):
        self.g = builder
        self._doubled: dict[str, Doubled] = {}
        self._stacked: dict[str, tuple[str, int]] = {}  # a value next to itself along a new axis

    def note_stack(self, stacked: str, x: str, axis: int) -> None:
        """`stacked` is x twice, along a new axis."""
        self._stacked[stacked] = (x, axis)

    def reshape(self, x, shape: Sequence[int]):
        """The reshaped value if doubling explains it, or stays what it is; else None."""
        if isinstance(x, np.ndarray):
            return None
        if x in self._stacked:
            source, axis = self._stacked[x]
            if not axis:
                return None
            known = self._doubled.get(source, Doubled(source, frozenset()))
            x = self.repeat(known.small, known.axes | {axis - 1})
            if self.g.shape(x) == tuple(shape):
                return x
        if x not in self._doubled:
            return None
        known, old, shape = self._doubled[x], self.g.shape(x), tuple(shape)
        before = _common(old, shape)
        behind = _common(old[::-1], shape[::-1])
        first, last = min(known.axes), max(known.axes)
        if last < before:
            moved = 0
        elif first >= len(old) - behind:
            moved = len(shape) - len(old)
        else:
            return None
        axes = frozenset(axis + moved for axis in known.axes)
        small = [length // 2 if axis in axes else length for axis, length in enumerate(shape)]
        return self.repeat(self.g.reshape(known.small, small), axes)

    def transpose(self, x, order: Sequence[int]):
        """The transposed value if x is doubled; else None."""
        known = None if isinstance(x, np.ndarray) else self._doubled.get(x)
        if known is None:
            return None
        axes = frozenset(axis for axis, source in enumerate(order) if source in known.axes)
        return self.repeat(self.g.transpose(known.small, order), axes)

    def cut(self, x, axes: set[int], slice_of: Callable):
        """A slice along `axes` of more than one sample if x is doubled along others, too; else None."""
        known = None if isinstance(x, np.ndarray) else self._doubled.get(x)
        if known is None or not known.axes - axes:
            return None
        return self.repeat(slice_of(self.repeat(known.small, known.axes & axes)), known.axes - axes)

    def repeat(self, small: str, axes: frozenset[int] | set[int]) -> str:
        """Every sample twice along `axes`."""
        if not axes:
            return small
        g, y, left = self.g, small, set(axes)
        *outer, h, w = g.shape(small)
        rank = len(outer) + 2
        if {rank - 2, rank - 1} <= left:  # the one operator that engines have for it
            images = int(np.prod(outer))
            y = g.add(
                "Resize",
                g.reshape(y, (1, images, h, w)),
                "",
                np.float32([1, 1, 2, 2]),
                shape=(1, images, 2 * h, 2 * w),
                mode="nearest",
                coordinate_transformation_mode="asymmetric",
                nearest_mode="floor",
            )
            y = g.reshape(y, (*outer, 2 * h, 2 * w))
            left -= {rank - 2, rank - 1}
        for axis in left:
            shape = g.shape(y)
            apart = (*shape[: axis + 1], 2, *shape[axis + 1 :])
            y = g.reshape(y, (*shape[: axis + 1], 1, *shape[axis + 1 :]))
            y = g.add("Expand", y, np.array(apart, np.int64), shape=apart)
            y = g.reshape(y, (*shape[:axis], 2 * shape[axis], *shape[axis + 1 :]))
        self._doubled[y] = Doubled(small, frozenset(axes))
        return y

    def convolution(self, x, weight, shape: Sequence[int], pads: np.ndarray, plain: bool, bias: Sequence = ()):
        """A convolution of a doubled value, on the small grid; None where there is nothing to save.

        Args:
            shape: of the result.
            pads: zeros before and behind, (2, spatial axes).
            plain: stride, dilation and group are 1.
            bias: none or one array.
        """
        g = self.g
        edged = g.producer(x, "Pad")
        edges = np.zeros((2, len(shape)), np.int64)
        if edged is not None and helper.get_node_attr_value(edged, "mode") == b"edge":
            edges = g.operand(edged, 1).reshape(2, -1)
            x = g.operand(edged, 0)
        known = None if isinstance(x, np.ndarray) else self._doubled.get(x)
        if known is None or not plain or not isinstance(weight, np.ndarray) or min(known.axes) < 2:
            return None
        axes = sorted(known.axes)
        zeros = np.concatenate([np.zeros((2, 2), np.int64), pads], axis=1)  # of all axes, as `edges`
        for axis in axes:
            either = {(*edges[:, axis].tolist(), *zeros[:, axis].tolist())}
            if weight.shape[axis] != 3 or not either <= {(1, 1, 0, 0), (0, 0, 1, 1)}:
                return None
        small = [length // 2 if axis in axes else length for axis, length in enumerate(shape)]
        parts = {}
        for phase in itertools.product((0, 1), repeat=len(axes)):
            kernel, part_edges, part_zeros = weight, edges.copy(), zeros.copy()
            for axis, odd in zip(axes, phase):
                kernel = _two_taps(kernel, axis, odd)
                part_edges[odd ^ 1, axis] = part_zeros[odd ^ 1, axis] = 0  # the even look back, the odd ahead
            y = known.small
            if part_edges.any():
                padded = [n + a + b for n, a, b in zip(g.shape(y), *part_edges.tolist())]
                y = g.add("Pad", y, part_edges.reshape(-1), shape=padded, mode="edge")
            parts[phase] = g.add(
                "Conv",
                y,
                kernel,
                *bias,
                shape=small,
                kernel_shape=list(kernel.shape[2:]),
                pads=part_zeros[:, 2:].reshape(-1).tolist(),
            )
        return self._interleave(parts, axes)

    def _interleave(self, parts: dict[tuple[int, ...], str], axes: list[int]) -> str:
        """Even and odd samples along `axes`, by phase, in their places."""
        g = self.g
        rank = len(g.shape(next(iter(parts.values()))))
        if axes[-2:] == [rank - 2, rank - 1]:
            joined = {}
            for phase in itertools.product((0, 1), repeat=len(axes) - 2):
                four = [parts[phase + last] for last in itertools.product((0, 1), repeat=2)]
                n, c, *frames, h, w = g.shape(four[0])
                images = c * int(np.prod(frames))
                y = g.add("Concat", *four, shape=(n, 4 * c, *frames, h, w), axis=1)
                y = g.reshape(y, (n, 4 * images, h, w))
                y = g.add("DepthToSpace", y, shape=(n, images, 2 * h, 2 * w), blocksize=2, mode="DCR")
                joined[phase] = g.reshape(y, (n, c, *frames, 2 * h, 2 * w))
            parts, axes = joined, axes[:-2]
        while axes:
            *axes, axis = axes
            joined = {}
            for phase in itertools.product((0, 1), repeat=len(axes)):
                shape = g.shape(parts[phase + (0,)])
                apart = (*shape[: axis + 1], 1, *shape[axis + 1 :])
                pair = [g.reshape(parts[phase + (odd,)], apart) for odd in (0, 1)]
                y = g.add("Concat", *pair, shape=(*shape[: axis + 1], 2, *shape[axis + 1 :]), axis=axis + 1)
                joined[phase] = g.reshape(y, (*shape[:axis], 2 * shape[axis], *shape[axis + 1 :]))
            parts = joined
        return parts[()]


def _two_taps(kernel: np.ndarray, axis: int, odd: int) -> np.ndarray:
    """What 3 taps are at even or odd places of samples that stand twice."""
    first, middle, last = np.moveaxis(kernel, axis, 0)
    return np.stack([first + middle, last] if odd else [first, middle + last], axis)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many items two rows begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
