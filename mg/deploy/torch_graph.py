"""Exported ONNX graphs as PyTorch modules.

The graph becomes a `torch.fx.GraphModule`, operator by operator. What is several operators in ONNX but one in PyTorch
is recognised: group and RMS norm, SiLU, softmax attention, and upsampling, whose convolutions on the small grid are one
transposed convolution. Convolutions run channels last, and the operators between them keep that layout.

Convolutions and products with weights run in the network's precision. Norms, softmax, reductions, division, and
products of two activations (linear attention, whose sums exceed fp16) run in fp32.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, fx, nn
from torch.nn import functional as F

_OPERATORS: dict[str, Callable] = {}


def read_network(path: str | Path, dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    """Read an exported graph as a module that maps one tensor to one tensor, both fp32.

    Args:
        path: the .onnx file; external data is next to it.
        dtype: the network's precision, torch.float32, float16 or bfloat16.

    Raises:
        ValueError: an operator is not known; the message names it.
    """
    model = onnx.load(path)
    missing = sorted({node.op_type for node in model.graph.node} - _OPERATORS.keys())
    if missing:
        raise ValueError(f"engine torch has no operator {', '.join(missing)}; add it to mg/deploy/torch_graph.py")
    return _Reader(model.graph, dtype).module()


class _Reader:
    """Builds the module from an ONNX graph.

    Attributes:
        values: what was built for each ONNX value.
        users: by value, the operators that use it.
        last: the last convolution's output. It stays in fp32: in bf16 it costs `assets/image_vae` 0.3 dB.
    """

    def __init__(self, graph: onnx.GraphProto, dtype: torch.dtype):
        self.onnx, self.dtype = graph, dtype
        self.root, self.graph = nn.Module(), fx.Graph()
        self.arrays = {constant.name: constant for constant in graph.initializer}
        self.nodes = {output: node for node in graph.node for output in node.output}
        self.last = next((node.output[0] for node in reversed(graph.node) if node.op_type == "Conv"), None)
        self.users: dict[str, set[str]] = {}
        for node in graph.node:
            for name in node.input:
                self.users.setdefault(name, set()).add(node.op_type)
        self.values: dict[str, Any] = {}

    def module(self) -> fx.GraphModule:
        x = self.graph.placeholder("x")
        self.values[self.onnx.input[0].name] = self.call(Tensor.to, x, self.dtype)
        for node in self.onnx.node:
            built = _OPERATORS[node.op_type](self, node)
            if len(node.output) == 1:
                self.values[node.output[0]] = built
            else:
                for i, name in enumerate(node.output):
                    self.values[name] = self.call(_item, built, i)
        self.graph.output(self.call(Tensor.float, self.values[self.onnx.output[0].name]))
        self.graph.eliminate_dead_code()  # the parts of what was put together
        module = fx.GraphModule(self.root, self.graph)
        module.delete_all_unused_submodules()
        used = {node.target for node in self.graph.nodes if node.op == "get_attr"}
        for name in [name for name, _ in module.named_parameters() if name not in used]:
            delattr(module, name)
        return module.eval().requires_grad_(False)

    def call(self, function: Callable, *inputs, **options) -> fx.Node:
        return self.graph.call_function(function, inputs, options)

    def producer(self, name: str, op: str) -> Any:
        """The node that computes a value, if it is an `op`; else None."""
        node = self.nodes.get(name)
        return node if node is not None and node.op_type == op else None

    def before(self, name: str, *ops: str) -> str:
        """The value that `name` is computed from by nothing but these operators."""
        while name in self.nodes and self.nodes[name].op_type in ops:
            name = self.nodes[name].input[0]
        return name

    def array(self, name: str) -> Any:
        """A constant as an array; None if the value isn't one."""
        return numpy_helper.to_array(self.arrays[name]) if name in self.arrays else None

    def scalar(self, name: str) -> float | None:
        """A constant of one value; None if it isn't one."""
        constant = self.arrays.get(name)
        return None if constant is None or math.prod(constant.dims) != 1 else self.array(name).item()

    def integers(self, name: str) -> list[int]:
        return self.array(name).tolist()

    def value(self, name: str) -> Any:
        """What an operator computes with: a node of the module, or a number for a constant of one value."""
        if name in self.values:
            return self.values[name]
        number = self.scalar(name)
        self.values[name] = self.parameter(name, self.array(name)) if number is None else number
        return self.values[name]

    def parameter(self, name: str, array: np.ndarray, dtype: torch.dtype | None = None) -> fx.Node:
        """A weight, in the network's precision unless `dtype` is given."""
        weight = _channels_last(torch.tensor(array).to(dtype or self.dtype))
        self.root.register_parameter(name, nn.Parameter(weight, requires_grad=False))
        return self.graph.get_attr(name)


def _operator(*ops: str):
    def register(function):
        _OPERATORS.update(dict.fromkeys(ops, function))
        return function

    return register


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _channels_last(x: Tensor) -> Tensor:
    """x with channels last in memory, if it is an image or a clip."""
    if x.ndim not in (4, 5):
        return x.contiguous()
    x = x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    if torch.compiler.is_compiling() or 1 not in x.shape:
        return x
    # PyTorch recognises the layout by all strides, those of axes of length 1 too, where reshapes leave any number.
    strides = [math.prod(x.shape[axis + 1 :]) * x.shape[1] for axis in range(x.ndim)]
    return x.as_strided(x.shape, [math.prod(x.shape[1:]), 1, *strides[2:]])


def _item(values: Sequence, i: int):
    return values[i]


# Shapes.


@_operator("Reshape")
def _reshape(r: _Reader, node):
    return r.call(Tensor.reshape, r.value(node.input[0]), r.integers(node.input[1]))


@_operator("Expand")
def _expand(r: _Reader, node):
    return r.call(Tensor.expand, r.value(node.input[0]), r.integers(node.input[1]))


@_operator("Transpose")
def _transpose(r: _Reader, node):
    return r.call(Tensor.permute, r.value(node.input[0]), list(_attributes(node)["perm"]))


@_operator("Concat")
def _concat(r: _Reader, node):
    axis = _attributes(node)["axis"]
    doubled = _doubled_in_time(r, node, axis)
    return r.call(torch.cat, [r.value(name) for name in node.input], axis) if doubled is None else doubled


@_operator("Split")
def _split(r: _Reader, node):
    return r.call(torch.split, r.value(node.input[0]), r.integers(node.input[1]), _attributes(node)["axis"])


@_operator("Slice")
def _slice(r: _Reader, node):
    starts, stops, axes, steps = map(r.integers, node.input[1:])
    return r.call(_cut, r.value(node.input[0]), list(zip(axes, starts, stops, steps)))


def _cut(x: Tensor, ranges: list[tuple[int, int, int, int]]) -> Tensor:
    index = [slice(None)] * x.ndim
    for axis, *ends in ranges:
        index[axis] = slice(*ends)
    return x[tuple(index)]


@_operator("Pad")
def _pad(r: _Reader, node):
    pads = np.reshape(r.integers(node.input[1]), (2, -1)).T.tolist()  # (before, after) per axis
    repeats = _attributes(node).get("mode") == b"edge"
    return r.call(_repeat_edges if repeats else _add_zeros, r.value(node.input[0]), pads)


def _repeat_edges(x: Tensor, pads: list[list[int]]) -> Tensor:
    x = x.movedim(1, -1)  # `F.pad` would lose channels last on CUDA
    for axis, (before, after) in enumerate(pads[2:], 1):
        if before or after:
            first, last = x.narrow(axis, 0, 1), x.narrow(axis, x.shape[axis] - 1, 1)
            x = torch.cat([*[first] * before, x, *[last] * after], axis)
    return x.movedim(-1, 1)


def _add_zeros(x: Tensor, pads: list[list[int]]) -> Tensor:
    return F.pad(x, [n for before_after in reversed(pads) for n in before_after])


@_operator("Resize")
def _resize(r: _Reader, node):
    return r.call(F.interpolate, r.value(node.input[0]), scale_factor=2.0, mode="nearest")


@_operator("DepthToSpace")
def _depth_to_space(r: _Reader, node):
    doubled = _doubled_in_space(r, node)
    if doubled is not None:
        return doubled
    return r.call(_interleave, r.value(node.input[0]), _attributes(node)["blocksize"])


def _interleave(x: Tensor, block: int) -> Tensor:
    """(N, block * block * C, H, W) -> (N, C, block * H, block * W), channels last"""
    n, c, h, w = x.shape
    x = x.reshape(n, block, block, c // block**2, h, w).permute(0, 4, 1, 5, 2, 3)
    return x.reshape(n, h * block, w * block, c // block**2).permute(0, 3, 1, 2)


# Arithmetic.


@_operator("Add")
def _add(r: _Reader, node):
    norm = _group_norm_of(r, node)
    return r.call(_sum, *map(r.value, node.input)) if norm is None else norm


def _sum(x, y):
    """x + y; an fp32 activation, the mean of a shortcut, returns to the precision of the other."""
    if isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape and x.dtype != y.dtype:
        x, y = (x.to(y.dtype), y) if x.dtype == torch.float32 else (x, y.to(x.dtype))
    return x + y


@_operator("Mul")
def _mul(r: _Reader, node):
    for x, y in (node.input, reversed(node.input)):
        sigmoid = r.producer(y, "Sigmoid")
        if sigmoid is not None and sigmoid.input[0] == x:
            return r.call(F.silu, r.value(x))
    norm = _rms_norm_of(r, node)
    return r.call(torch.mul, *map(r.value, node.input)) if norm is None else norm


@_operator("Sub")
def _sub(r: _Reader, node):
    return r.call(torch.sub, *map(r.value, node.input))


@_operator("Div")
def _div(r: _Reader, node):
    return r.call(_divide, *map(r.value, node.input))


def _divide(x, y):
    return (x.float() if isinstance(x, Tensor) else x) / (y.float() if isinstance(y, Tensor) else y)


_UNARY = {"Relu": F.relu, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh, "Neg": torch.neg, "Abs": torch.abs}


@_operator(*_UNARY)
def _unary(r: _Reader, node):
    return r.call(_UNARY[node.op_type], r.value(node.input[0]))


_WIDE = {"Sqrt": torch.sqrt, "Reciprocal": torch.reciprocal, "Exp": torch.exp, "Log": torch.log, "Erf": torch.erf}


@_operator(*_WIDE)
def _wide(r: _Reader, node):
    return r.call(_WIDE[node.op_type], r.call(Tensor.float, r.value(node.input[0])))


@_operator("Softmax")
def _softmax(r: _Reader, node):
    return r.call(torch.softmax, r.call(Tensor.float, r.value(node.input[0])), _attributes(node)["axis"])


_REDUCTIONS = {"ReduceMean": torch.mean, "ReduceSum": torch.sum, "ReduceMax": torch.amax, "ReduceMin": torch.amin}


@_operator(*_REDUCTIONS)
def _reduce(r: _Reader, node):
    x = r.call(Tensor.float, r.value(node.input[0]))
    return r.call(_REDUCTIONS[node.op_type], x, r.integers(node.input[1]), keepdim=True)


@_operator("ReduceSumSquare")
def _reduce_sum_square(r: _Reader, node):
    x = r.call(torch.square, r.call(Tensor.float, r.value(node.input[0])))
    return r.call(torch.sum, x, r.integers(node.input[1]), keepdim=True)


# Norms.


def _group_norm_of(r: _Reader, node):
    """A group norm, if `node` is its last operator; None if it isn't.

    (x - mean) * (gain / deviation) + bias, with mean and deviation of groups, see `mg.deploy.converters`.
    """
    scaled, bias = r.producer(node.input[0], "Mul"), r.array(node.input[1])
    apart = scaled and r.producer(scaled.input[0], "Sub")
    gain = scaled and r.producer(scaled.input[1], "Div")
    if apart is None or gain is None or bias is None:
        return None
    x, weight = apart.input[0], r.array(gain.input[0])
    mean = r.producer(r.before(apart.input[1], "Reshape", "Expand"), "ReduceMean")
    rows = mean and r.producer(mean.input[0], "ReduceMean")
    squares = r.producer(
        r.before(gain.input[1], "Reshape", "Expand", "Sqrt", "Add", "Mul", "ReduceMean"), "ReduceSumSquare"
    )
    if rows is None or squares is None or weight is None:
        return None
    if r.before(rows.input[0], "Reshape") != r.before(x, "Reshape"):
        return None
    if r.before(squares.input[0], "Reshape") != apart.output[0]:
        return None
    variance = r.producer(r.before(gain.input[1], "Reshape", "Expand", "Sqrt"), "Add")
    groups, eps = r.integers(r.nodes[rows.input[0]].input[1])[1], r.scalar(variance.input[1])
    weight, bias = (
        r.parameter(f"{node.output[0]}_{name}", array.reshape(-1), torch.float32)
        for name, array in (("weight", weight), ("bias", bias))
    )
    return r.call(_group_norm, r.value(x), groups, weight, bias, eps)


def _group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    if x.is_cuda:  # where weights must have the precision of x; compiled, the casts cost nothing
        return F.group_norm(x.float(), groups, weight, bias, eps).to(x.dtype)
    return F.group_norm(_channels_last(x), groups, weight, bias, eps)  # computes in fp32 too


def _rms_norm_of(r: _Reader, node):
    """An RMS norm over one axis, if `node` is its last operator: x * (1 / sqrt(mean(x * x) + eps)) * gain."""
    scaled, gain = r.producer(node.input[0], "Mul"), r.array(node.input[1])
    root = scaled and r.producer(scaled.input[1], "Reciprocal")
    root = root and r.producer(root.input[0], "Sqrt")
    shifted = root and r.producer(root.input[0], "Add")
    mean = shifted and r.producer(shifted.input[0], "ReduceMean")
    square = mean and r.producer(mean.input[0], "Mul")
    if square is None or gain is None or list(square.input) != [scaled.input[0]] * 2:
        return None
    axes, eps = r.integers(mean.input[1]), r.scalar(shifted.input[1])
    if len(axes) != 1 or gain.size != gain.shape[axes[0]] or eps is None:
        return None
    weight = r.parameter(f"{node.output[0]}_weight", gain.reshape(-1), torch.float32)
    return r.call(_rms_norm, r.value(scaled.input[0]), axes[0], weight, eps)


def _rms_norm(x: Tensor, axis: int, weight: Tensor, eps: float) -> Tensor:
    y = F.rms_norm(x.movedim(axis, -1).float(), weight.shape, weight, eps)
    return y.to(x.dtype).movedim(-1, axis)


# Layers.


@_operator("MatMul")
def _matmul(r: _Reader, node):
    attention = _attention_of(r, node)
    if attention is not None:
        return attention
    weighted = any(name in r.arrays for name in node.input)
    return r.call(_product, *map(r.value, node.input), r.dtype if weighted else torch.float32)


def _product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.matmul(x.to(dtype), y.to(dtype))


def _attention_of(r: _Reader, node):
    """softmax(q k) v, if `node` is its last product; with v first the result is its transpose."""
    flipped = r.producer(node.input[1], "Transpose")
    v_first = flipped is not None and r.producer(flipped.input[0], "Softmax") is not None
    weights = r.producer(flipped.input[0] if v_first else node.input[0], "Softmax")
    if weights is None or _attributes(weights)["axis"] != -1:
        return None
    if v_first:
        order = list(_attributes(flipped)["perm"])
        if order != [*range(len(order) - 2), len(order) - 1, len(order) - 2]:
            return None
    scores, scale = r.producer(weights.input[0], "MatMul"), 1.0
    if scores is None:
        scaled = r.producer(weights.input[0], "Mul")
        scores = scaled and r.producer(scaled.input[0], "MatMul")
        scale = scaled and r.scalar(scaled.input[1])
    if scores is None or scale is None:
        return None
    q, k = map(r.value, scores.input)
    return r.call(_attention, q, k, r.value(node.input[0 if v_first else 1]), scale, v_first)


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float, v_first: bool) -> Tensor:
    """q (..., L, D), k (..., D, S), v (..., S, E) -> (..., L, E); with v first (..., E, S) -> (..., E, L)"""
    k, v = k.mT, v.mT if v_first else v
    y = F.scaled_dot_product_attention(*(part.unsqueeze(-3) for part in (q, k, v)), scale=scale).squeeze(-3)
    return y.mT if v_first else y


@_operator("Conv")
def _conv(r: _Reader, node):
    known = _attributes(node)
    dims = len(known["kernel_shape"])
    ones = [1] * dims
    settings = (known.get("strides", ones), known.get("dilations", ones), known.get("group", 1))
    if node.output[0] == r.last:
        weight, *bias = (r.parameter(name, r.array(name), torch.float32) for name in node.input[1:])
    else:
        weight, *bias = map(r.value, node.input[1:])
    pads = np.reshape(known.get("pads", [0] * 2 * dims), (2, dims)).T.tolist()
    return r.call(_convolve, r.value(node.input[0]), weight, bias[0] if bias else None, pads, *map(_plain, settings))


def _plain(value):
    return value if isinstance(value, int) else list(value)


def _convolve(x: Tensor, weight, bias, pads, strides, dilations, group: int) -> Tensor:
    x = x.to(weight.dtype)
    if any(before != after for before, after in pads):
        x, pads = _add_zeros(x, pads), [(0, 0)] * len(pads)
    convolution = F.conv2d if x.ndim == 4 else F.conv3d
    return convolution(_channels_last(x), weight, bias, strides, [before for before, _ in pads], dilations, group)


# Upsampling. The convolutions of `mg.deploy.upsampling`, one for even and one for odd samples along each doubled axis,
# are one transposed convolution, which needs neither their padded inputs nor a copy that interleaves their outputs.


def _doubled_in_space(r: _Reader, node):
    """The transposed convolution for a DepthToSpace that interleaves four convolutions; None if it doesn't.

    For clips it is (N, C, T, H, W) where ONNX has (N, C * T, H, W); the operators after it are reshapes.
    """
    joined = r.producer(r.before(node.input[0], "Reshape"), "Concat")
    if joined is None or len(joined.input) != 4 or _attributes(joined)["axis"] != 1:
        return None
    parts = dict(zip(itertools.product((0, 1), repeat=2), (r.producer(name, "Conv") for name in joined.input)))
    if None in parts.values():
        return None
    dims = len(_attributes(parts[0, 0])["kernel_shape"])
    if dims == 3 and r.users[node.output[0]] != {"Reshape"}:
        return None
    return _transposed_convolution(r, parts, [dims - 2, dims - 1], node.output[0])


def _doubled_in_time(r: _Reader, node, axis: int):
    """The transposed convolution for a Concat that interleaves two convolutions, of even and odd frames."""
    shaped = [r.producer(name, "Reshape") for name in node.input]
    parts: dict[tuple[int, ...], Any] = {
        (i,): part and r.producer(part.input[0], "Conv") for i, part in enumerate(shaped)
    }
    if len(parts) != 2 or None in parts.values() or axis < 3:
        return None
    doubled = _transposed_convolution(r, parts, [axis - 3], node.output[0])
    shape = r.integers(shaped[0].input[1])
    return doubled and r.call(Tensor.reshape, doubled, [*shape[:axis], 2, *shape[axis + 1 :]])


def _transposed_convolution(r: _Reader, parts: dict[tuple[int, ...], onnx.NodeProto], axes: list[int], name: str):
    """One transposed convolution for convolutions given by phase, even or odd, along `axes` (0 is the first after the
    channels); None if they don't read the same value, or aren't a half each of one kernel of four taps."""
    first = next(iter(parts.values()))
    dims = len(_attributes(first)["kernel_shape"])
    inputs, pads = set(), {}
    for phase, part in parts.items():
        known, x, edges = _attributes(part), part.input[0], np.zeros((2, dims), np.int64)
        if {*known.get("strides", [1]), *known.get("dilations", [1]), known.get("group", 1)} != {1}:
            return None
        padded = r.producer(x, "Pad")
        if padded is not None and _attributes(padded).get("mode") == b"edge":
            x, edges = padded.input[0], np.reshape(r.integers(padded.input[1]), (2, -1))[:, 2:]
        inputs.add((x, *part.input[2:]))
        pads[phase] = np.stack([edges, np.reshape(known.get("pads", [0] * 2 * dims), (2, dims))])
    together = np.max(list(pads.values()), axis=0)  # repeated edges and zeros, before and after, along each axis
    for phase, own in pads.items():
        wanted = together.copy()
        for axis, odd in zip(axes, phase):
            wanted[:, 1 - odd, axis] = 0  # even samples look back, odd ones ahead
        if not np.array_equal(own, wanted):
            return None
    if len(inputs) > 1 or any(
        together[:, :, axis].tolist() not in ([[0, 0], [1, 1]], [[1, 1], [0, 0]]) for axis in axes
    ):
        return None
    (edges, zeros), strides, padding = together, [1] * dims, []
    kernel = _merged({phase: r.array(part.input[1]) for phase, part in parts.items()}, axes)
    for axis, length in enumerate(kernel.shape[2:]):
        if axis in axes:
            strides[axis] = 2
            padding.append(3 if edges[0, axis] else 1)
            zeros[:, axis] = 0
        else:
            kernel = np.flip(kernel, axis + 2)
            padding.append(length - 1)
    weight = r.parameter(f"{name}_weight", kernel.swapaxes(0, 1).copy())
    x, *bias = inputs.pop()
    around = [[[0, 0], [0, 0], *kind.T.tolist()] for kind in (edges, zeros)]
    return r.call(_upsample, r.value(x), weight, r.value(bias[0]) if bias else None, *around, strides, padding)


def _merged(parts: dict[tuple[int, ...], np.ndarray], axes: Sequence[int]) -> np.ndarray:
    """The kernel whose transposed convolution puts sample i's taps where the parts' convolutions find sample i."""
    while axes:
        *axes, axis = axes
        merged = {}
        for phase in itertools.product((0, 1), repeat=len(axes)):
            even, odd = (np.moveaxis(parts[phase + (i,)], axis + 2, 0) for i in (0, 1))
            merged[phase] = np.moveaxis(np.stack([odd[1], even[1], odd[0], even[0]]), 0, axis + 2)
        parts = merged
    return parts[()]


def _upsample(x: Tensor, weight, bias, edges, zeros, strides, padding) -> Tensor:
    x = _add_zeros(_repeat_edges(x.to(weight.dtype), edges), zeros)
    convolution = F.conv_transpose2d if x.ndim == 4 else F.conv_transpose3d
    return convolution(_channels_last(x), weight, bias, strides, padding)
