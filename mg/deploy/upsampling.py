"""Nearest-neighbour upsampling by 2 followed by a convolution, as convolutions with fewer taps on the small grid.

When a kernel of 3 slides over repeated samples, two of its taps always see the same sample. So the outputs at even
positions are a convolution of 2 taps over the original samples, those at odd positions another one: along H and W this
needs 16 products instead of 36, along T, H and W 64 instead of 216.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import helper

from mg.deploy.onnx_graph import GraphBuilder


@dataclass(frozen=True)
class Doubled:
    """A value whose samples are all repeated along `axes`; `small` has each of them once."""

    small: str
    axes: frozenset[int]


class Upsampling:
    """Tracks which values of a graph are doubled, through reshapes, transposes and slices."""

    def __init__(self, builder: GraphBuilder):
        self.g = builder
        self._doubled: dict[str, Doubled] = {}
        self._stacked: dict[str, tuple[str, int]] = {}  # a value stacked with itself along a new axis

    def note_stack(self, stacked: str, x: str, axis: int) -> None:
        """`stacked` is x twice, along a new axis."""
        self._stacked[stacked] = (x, axis)

    def reshape(self, x, shape: Sequence[int]):
        """The reshaped value if it is doubled, by this reshape or before; else None."""
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
        """A slice of more than one sample along `axes` if x is doubled along other axes too; else None."""
        known = None if isinstance(x, np.ndarray) else self._doubled.get(x)
        if known is None or not known.axes - axes:
            return None
        return self.repeat(slice_of(self.repeat(known.small, known.axes & axes)), known.axes - axes)

    def repeat(self, small: str, axes: frozenset[int] | set[int]) -> str:
        """Repeat every sample along `axes`."""
        if not axes:
            return small
        g, y, left = self.g, small, set(axes)
        *outer, h, w = g.shape(small)
        rank = len(outer) + 2
        if {rank - 2, rank - 1} <= left:  # the one operator for it in engines
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
        """A convolution of a doubled value, on the small grid; None if that saves nothing.

        Args:
            shape: of the result.
            pads: zeros before and after, (2, spatial axes).
            plain: stride, dilation and group are 1.
            bias: empty, or one array.
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
        zeros = np.concatenate([np.zeros((2, 2), np.int64), pads], axis=1)  # for all axes, like `edges`
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
                part_edges[odd ^ 1, axis] = part_zeros[odd ^ 1, axis] = 0  # even positions look back, odd ones ahead
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
        """Interleave the even and odd samples along `axes`, given by phase."""
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
    """The 2 taps that 3 taps amount to at even or odd positions of repeated samples."""
    first, middle, last = np.moveaxis(kernel, axis, 0)
    return np.stack([first + middle, last] if odd else [first, middle + last], axis)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common prefix of two sequences."""
    return next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
