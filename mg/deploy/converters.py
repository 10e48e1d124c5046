"""Converts MindSpore's operators to ONNX: a table of functions, and the walk through a graph.

A converter gets the `Builder`, the node and its converted inputs, and returns the converted output. All shapes are
known.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import helper

from mg.deploy.mindir import ExportError, Graph, Node, Value
from mg.deploy.onnx_graph import GraphBuilder
from mg.deploy.upsampling import Upsampling

_CONVERTERS: dict[str, Callable] = {}


class Builder(GraphBuilder):
    """The builder that converters write to.

    Attributes:
        upsampling: which values are doubled.
        with_bias: the result of a convolution without bias -> a function that adds the convolution with one.
    """

    def __init__(self):
        super().__init__()
        self.upsampling = Upsampling(self)
        self.with_bias: dict[str, Callable] = {}


def convert(graph: Graph, input_name: str, output_name: str):
    """Convert a graph to an `onnx.ModelProto`.

    Args:
        input_name, output_name: names for its input and output.

    Raises:
        ExportError: an operator has no converter; the message names it.
    """
    missing = sorted({node.op for node in graph.nodes} - _CONVERTERS.keys())
    if missing:
        raise ExportError(f"no ONNX converter for MindSpore's {', '.join(missing)}; add it to mg/deploy/converters.py")
    builder = Builder()
    made: dict[str, Any] = {graph.input: builder.input(input_name, graph.input_shape)}

    def resolved(value):
        if isinstance(value, Value):
            return made[value.name]
        return tuple(map(resolved, value)) if isinstance(value, tuple) else value

    for node in graph.nodes:
        results = _CONVERTERS[node.op](builder, node, *map(resolved, node.inputs))
        results = results if isinstance(results, list) else [results]
        for name, shape, result in zip(node.outputs, node.shapes, results):
            if result is not None and builder.shape(result) != shape:
                raise ExportError(f"{node.op}: its shape became {builder.shape(result)}, in MindSpore it is {shape}")
            made[name] = result
    return builder.model(resolved(graph.output), output_name)


def _converts(*ops: str):
    def register(function):
        _CONVERTERS.update(dict.fromkeys(ops, function))
        return function

    return register


# Shapes.


@_converts("Reshape")
def _reshape(g: Builder, node: Node, x, shape):
    doubled = g.upsampling.reshape(x, node.shapes[0])
    return g.reshape(x, shape) if doubled is None else doubled


@_converts("ExpandDims", "Squeeze")
def _expand_dims(g: Builder, node: Node, x, *_):
    return g.reshape(x, node.shapes[0])


@_converts("Transpose")
def _transpose(g: Builder, node: Node, x, order):
    doubled = g.upsampling.transpose(x, order)
    return g.transpose(x, order) if doubled is None else doubled


@_converts("BroadcastTo")
def _broadcast(g: Builder, node: Node, x, *_):
    shape = node.shapes[0]
    return x if g.shape(x) == shape else g.add("Expand", x, np.array(shape, np.int64), shape=shape)


@_converts("Concat")
def _concat(g: Builder, node: Node, parts, axis):
    shape = node.shapes[0]
    axis %= len(shape)
    parts = [part for part in parts if g.shape(part)[axis]]
    if len(parts) == 1:
        return parts[0]
    edges = _repeated_edges(g, parts, axis)
    return g.add("Concat", *parts, shape=shape, axis=axis) if edges is None else edges


def _repeated_edges(g: Builder, parts, axis: int):
    """One Pad for parts that are a value between repeats of its first and last slice; None if they aren't.

    If the value is itself such a Pad, they are merged: there is one for all axes.
    """
    x = max(parts, key=lambda part: g.shape(part)[axis])
    length, at = g.shape(x)[axis], next(i for i, part in enumerate(parts) if part is x)
    if isinstance(x, np.ndarray) or length < 2 or not all(_is_slice(g, part, x, axis, 0) for part in parts[:at]):
        return None
    if not all(_is_slice(g, part, x, axis, length - 1) for part in parts[at + 1 :]):
        return None
    rank = len(g.shape(x))
    pads = np.zeros((2, rank), np.int64)
    pads[:, axis] = at, len(parts) - 1 - at
    before = g.producer(x, "Pad")
    if before is not None and helper.get_node_attr_value(before, "mode") == b"edge":
        pads += g.operand(before, 1).reshape(2, rank)
        x = g.operand(before, 0)
    shape = [n + a + b for n, a, b in zip(g.shape(x), *pads.tolist())]
    return g.add("Pad", x, pads.reshape(-1), shape=shape, mode="edge")


def _is_slice(g: Builder, part, x, axis: int, index: int) -> bool:
    """Whether `part` is x's slice of one sample at `index` along `axis`."""
    cut = g.producer(part, "Slice")
    if cut is None or cut.input[0] != x:
        return False
    start, stop, axes = (g.operand(cut, i).tolist() for i in (1, 2, 3))
    return (start, stop, axes) == ([index], [index + 1], [axis])


@_converts("Stack")
def _stack(g: Builder, node: Node, parts):
    shape = node.shapes[0]
    axis = node.attributes["axis"] % len(shape)
    one = shape[:axis] + (1,) + shape[axis + 1 :]
    if all(part is parts[0] for part in parts):
        stacked = g.add("Expand", g.reshape(parts[0], one), np.array(shape, np.int64), shape=shape)
        if len(parts) == 2 and isinstance(stacked, str):
            g.upsampling.note_stack(stacked, parts[0], axis)
        return stacked
    return g.add("Concat", *(g.reshape(part, one) for part in parts), shape=shape, axis=axis)


@_converts("Split")
def _split(g: Builder, node: Node, x, axis, _):
    sizes = np.array([shape[axis] for shape in node.shapes], np.int64)
    return g.add_several("Split", x, sizes, shapes=node.shapes, axis=axis)


@_converts("Slice")
def _slice(g: Builder, node: Node, x, begin, size):
    sizes = [length - start if n == -1 else n for length, start, n in zip(g.shape(x), begin, size)]
    return _cut(g, x, begin, [start + n for start, n in zip(begin, sizes)], [1] * len(begin))


@_converts("NarrowView")
def _narrow(g: Builder, node: Node, x, axis, start, length, _):
    begin, end = [0] * len(g.shape(x)), list(g.shape(x))
    begin[axis], end[axis] = start, start + length
    return _cut(g, x, begin, end, [1] * len(begin))


@_converts("StridedSlice")
def _strided_slice(g: Builder, node: Node, x, begin, end, step, begin_mask, end_mask, ellipsis, new_axis, shrink):
    if ellipsis or new_axis:
        raise ExportError("StridedSlice: a mask for an ellipsis or a new axis has no converter")
    starts, stops, steps = list(begin), list(end), list(step)
    for i, length in enumerate(g.shape(x)[: len(begin)]):
        if shrink >> i & 1:
            stops[i] = starts[i] + 1 if starts[i] != -1 else length
        else:
            starts[i] = 0 if begin_mask >> i & 1 else starts[i]
            stops[i] = length if end_mask >> i & 1 else stops[i]
    return g.reshape(_cut(g, x, starts, stops, steps), node.shapes[0])  # drops the shrunk axes


def _cut(g: Builder, x, starts, stops, steps):
    """x[starts:stops:steps] along the first axes; the Slice only names axes that it shortens."""
    shape = list(g.shape(x))
    ranges = [slice(*part).indices(length) for part, length in zip(zip(starts, stops, steps), shape)]
    if any(step < 1 for _, _, step in ranges):
        raise ExportError("a slice that runs backwards has no converter")
    cut = [axis for axis, (*ends, step) in enumerate(ranges) if (*ends, step) != (0, shape[axis], 1)]
    if not cut:
        return x
    for axis in cut:
        shape[axis] = len(range(*ranges[axis]))
    if min(shape[axis] for axis in cut) > 1:  # not an edge to be repeated
        doubled = g.upsampling.cut(x, set(cut), lambda small: _cut(g, small, starts, stops, steps))
        if doubled is not None:
            return doubled
    columns = zip(*((*ranges[axis][:2], axis, ranges[axis][2]) for axis in cut))
    return g.add("Slice", x, *(np.array(column, np.int64) for column in columns), shape=shape)


# Arithmetic.

_NEUTRAL = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1}  # right operands that change nothing


@_converts("Add", "Sub", "Mul", "Div", "Adds", "Subs", "Muls", "Divs", "RealDiv")
def _binary(g: Builder, node: Node, x, y):
    op = "Div" if node.op == "RealDiv" else node.op.removesuffix("s")
    x, y = _tensor(x), _tensor(y)
    if isinstance(y, np.ndarray) and y.size == 1 and y.item() == _NEUTRAL[op] and g.shape(x) == node.shapes[0]:
        return x
    if isinstance(x, np.ndarray) and x.size == 1 and op == "Add" and x.item() == 0 and g.shape(y) == node.shapes[0]:
        return y
    if op == "Add":
        joined = _add_to_convolution(g, x, y)
        if joined is not None:
            return joined
    return g.add(op, x, y, shape=node.shapes[0])


@_converts("SubExt", "AddExt")
def _scaled_binary(g: Builder, node: Node, x, y, alpha):
    if alpha != 1:
        y = g.add("Mul", _tensor(y), np.float32([alpha]), shape=g.shape(_tensor(y)))
    return g.add(node.op.removesuffix("Ext"), _tensor(x), _tensor(y), shape=node.shapes[0])


def _add_to_convolution(g: Builder, x, bias):
    """Fold a per-channel constant into the bias of the convolution that computes x, which may be reshaped after the
    channels; None if it isn't one."""
    if isinstance(x, np.ndarray) or not isinstance(bias, np.ndarray):
        return None
    shape, conv = g.shape(x), x
    before = g.producer(x, "Reshape")
    if conv not in g.with_bias and before is not None and g.shape(before.input[0])[:2] == shape[:2]:
        conv = before.input[0]
    per_channel = (1, shape[1]) + (1,) * (len(shape) - 2)
    if conv not in g.with_bias or (1,) * (len(shape) - bias.ndim) + bias.shape != per_channel:
        return None
    return g.reshape(g.with_bias[conv](bias.reshape(-1)), shape)


_UNARY = {
    "ReLU": "Relu",
    "Sigmoid": "Sigmoid",
    "Tanh": "Tanh",
    "Exp": "Exp",
    "Log": "Log",
    "Sqrt": "Sqrt",
    "Neg": "Neg",
    "Abs": "Abs",
    "Reciprocal": "Reciprocal",
    "Erf": "Erf",
}


@_converts(*_UNARY)
def _unary(g: Builder, node: Node, x):
    return g.add(_UNARY[node.op], x, shape=node.shapes[0])


@_converts("SiLU")
def _silu(g: Builder, node: Node, x):
    return g.add("Mul", x, g.add("Sigmoid", x, shape=node.shapes[0]), shape=node.shapes[0])


@_converts("Square")
def _square(g: Builder, node: Node, x):
    return g.add("Mul", x, x, shape=node.shapes[0])


@_converts("Rsqrt")
def _rsqrt(g: Builder, node: Node, x):
    return g.add("Reciprocal", g.add("Sqrt", x, shape=node.shapes[0]), shape=node.shapes[0])


@_converts("Softmax")
def _softmax(g: Builder, node: Node, x, axis):
    return g.add("Softmax", x, shape=node.shapes[0], axis=axis[0] if isinstance(axis, tuple) else axis)


@_converts("Cast")
def _cast(g: Builder, node: Node, x, *_):
    if not isinstance(x, np.ndarray):  # a network in fp32 casts only constants
        raise ExportError("Cast: only networks in fp32 can be exported")
    return x.astype(np.float32)


_REDUCTIONS = {
    "ReduceMean": "ReduceMean",
    "MeanExt": "ReduceMean",
    "ReduceSum": "ReduceSum",
    "SumExt": "ReduceSum",
    "ReduceMax": "ReduceMax",
    "ReduceMin": "ReduceMin",
}


@_converts(*_REDUCTIONS)
def _reduce(g: Builder, node: Node, x, axes, *_):
    axes = (axes,) if isinstance(axes, int) else tuple(axes or range(len(g.shape(x))))
    shape = [1 if axis in {a % len(g.shape(x)) for a in axes} else n for axis, n in enumerate(g.shape(x))]
    reduced = g.add(_REDUCTIONS[node.op], x, np.array(axes, np.int64), shape=shape, keepdims=1)
    return g.reshape(reduced, node.shapes[0])


# Layers.


@_converts("MatMulExt", "MatMul", "BatchMatMul")
def _matmul(g: Builder, node: Node, x, y, transpose_x=False, transpose_y=False):
    operands = []
    for value, transposed in ((x, transpose_x), (y, transpose_y)):
        axes = list(range(len(g.shape(value))))
        operands.append(g.transpose(value, axes[:-2] + axes[:-3:-1]) if transposed else value)
    return g.add("MatMul", *operands, shape=node.shapes[0])


@_converts("Conv2D", "Conv3D")
def _convolution(g: Builder, node: Node, x, weight):
    known = node.attributes
    if known["format"] not in ("NCHW", "NCDHW"):
        raise ExportError(f"{node.op}: format {known['format']} has no converter")
    dims, group = len(g.shape(weight)) - 2, known["group"]
    before, behind = list(known["pad_list"][::2]), list(known["pad_list"][1::2])
    x = _absorb_zeros(g, x, before, behind)
    strides, dilations = list(known["stride"][-dims:]), _per_axis(known["dilation"], dims)
    form = _depthwise if dims == 3 and group == g.shape(x)[1] > 1 else _dense

    def with_bias(*bias):
        return form(g, x, weight, node.shapes[0], strides, dilations, before, behind, group, *bias)

    result = with_bias()
    if isinstance(result, str):
        g.with_bias[result] = with_bias
    return result


def _dense(g: Builder, x, weight, shape, strides, dilations, before, behind, group, *bias):
    plain = group == 1 and {*strides, *dilations} == {1}
    small = g.upsampling.convolution(x, weight, shape, np.array([before, behind]), plain, bias)
    return _conv(g, x, weight, shape, strides, dilations, before, behind, group, *bias) if small is None else small


def _conv(g: Builder, x, weight, shape, strides, dilations, before, behind, group, *bias):
    return g.add(
        "Conv",
        x,
        weight,
        *bias,
        shape=shape,
        kernel_shape=list(g.shape(weight)[2:]),
        strides=strides,
        dilations=dilations,
        pads=before + behind,
        group=group,
    )


def _depthwise(g: Builder, x, weight, shape, strides, dilations, before, behind, group, *bias):
    """A depthwise convolution in space and time as a sum of convolutions in space, one per frame of the kernel.

    onnxruntime's own for 5-D tensors takes 2 to 7 times as long (3 and 5 frames); in OpenVINO the sum takes 1.5 times.
    """
    b, c, frames, h, w = shape
    x = g.transpose(x, (0, 2, 1, 3, 4))  # (B, T, C, H, W)
    if before[0] or behind[0]:
        padded = list(g.shape(x))
        padded[1] += before[0] + behind[0]
        pads = np.int64([0, before[0], 0, 0, 0, 0, behind[0], 0, 0, 0])
        x = g.add("Pad", x, pads, shape=padded, mode="constant")
    total = None
    for i in range(g.shape(weight)[2]):
        start = i * dilations[0]
        part = _cut(g, x, [0, start], [b, start + (frames - 1) * strides[0] + 1], [1, strides[0]])
        part = g.reshape(part, (b * frames, c, *g.shape(x)[3:]))
        flat = (b * frames, c, h, w)
        own = bias if i == 0 else ()
        part = _conv(g, part, weight[:, :, i], flat, strides[1:], dilations[1:], before[1:], behind[1:], group, *own)
        total = part if total is None else g.add("Add", total, part, shape=flat)
    return g.transpose(g.reshape(total, (b, frames, c, h, w)), (0, 2, 1, 3, 4))


def _per_axis(value, dims: int) -> list[int]:
    return [value] * dims if isinstance(value, int) else list(value[-dims:])


def _absorb_zeros(g: Builder, x, before: list[int], behind: list[int]):
    """x without the zeros concatenated to it in space and time; they are added to the pads."""
    joined = g.producer(x, "Concat")
    if joined is None:
        return x
    axis = joined.attribute[0].i
    parts = [g.operand(joined, i) for i in range(len(joined.input))]
    known = [isinstance(part, np.ndarray) and not part.any() for part in parts]
    if axis < 2 or known.count(False) != 1:
        return x
    at = known.index(False)
    before[axis - 2] += sum(g.shape(part)[axis] for part in parts[:at])
    behind[axis - 2] += sum(g.shape(part)[axis] for part in parts[at + 1 :])
    return parts[at]


@_converts("BiasAdd")
def _bias_add(g: Builder, node: Node, x, bias, *_):
    bias = bias.reshape((1, -1) + (1,) * (len(node.shapes[0]) - 2))
    joined = _add_to_convolution(g, x, bias)
    return g.add("Add", x, bias, shape=node.shapes[0]) if joined is None else joined


@_converts("GroupNorm")
def _group_norm(g: Builder, node: Node, x, groups, gamma, beta, eps):
    """Mean and squared deviations per short row of a group, combined over rows; then one gain and one bias.

    InstanceNormalization sums a group at once, and is off by 2e-4 for the 8 million values of a large tile.
    """
    shape, row = node.shapes[0], _row(node.shapes[0][-1])
    rows = (shape[0], groups, math.prod(shape[1:]) // groups // row, row)
    of_groups = (shape[0], groups, 1, 1)
    # On the axes that x had before it was reshaped for the norm, so that the reshape after it drops out.
    source = g.producer(x, "Reshape")
    full = g.shape(g.operand(source, 0)) if source is not None else shape
    if full[:2] != shape[:2]:
        full = shape
    of_channels = (*shape[:2], *(1,) * (len(full) - 2))
    gamma, beta = (weights.reshape((1, *of_channels[1:])) for weights in (gamma, beta))

    def over_group(op, y):
        y = g.add(op, g.reshape(y, rows), np.int64([3]), shape=(*rows[:3], 1), keepdims=1)
        return g.add("ReduceMean", y, np.int64([2]), shape=of_groups, keepdims=1)

    def per_channel(y):  # (B, groups, 1, 1) -> (B, C, 1, ...)
        spread = (shape[0], groups, shape[1] // groups, 1)
        return g.reshape(g.add("Expand", y, np.int64(spread), shape=spread), of_channels)

    apart = g.add("Sub", g.reshape(x, full), per_channel(over_group("ReduceMean", x)), shape=full)
    variance = g.add("Mul", over_group("ReduceSumSquare", apart), np.float32([1 / row]), shape=of_groups)
    deviation = g.add("Sqrt", g.add("Add", variance, np.float32([eps]), shape=of_groups), shape=of_groups)
    gain = g.add("Div", gamma, per_channel(deviation), shape=of_channels)
    y = g.add("Mul", apart, gain, shape=full)
    return [g.reshape(g.add("Add", y, beta, shape=full), shape), None, None]


def _row(length: int) -> int:
    """The largest divisor of `length` up to 2**12."""
    return next(row for row in range(min(length, 2**12), 0, -1) if length % row == 0)


def _tensor(value):
    """A plain number as an array."""
    return np.float32([value]) if isinstance(value, (int, float)) else value
