"""Exported ONNX graphs as PyTorch modules.

The graph becomes a `torch.fx.GraphModule`, operator by operator. What is several operators in ONNX but one in PyTorch
is recognised: SiLU here, the rest in `mg.deploy.torch_fusion`. Convolutions run channels last, and the operators
between them keep that layout.

Convolutions, products with weights and softmax attention run in the network's precision; PyTorch computes attention's
softmax in fp32. Norms, reductions, division, and other products of two activations (linear attention, whose sums exceed
fp16) run in fp32.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from mg.deploy.torch_fusion import attention_of, doubled_in_space, doubled_in_time, group_norm_of, rms_norm_of
from mg.deploy.torch_reader import Reader, add_zeros, attributes, channels_last, repeat_edges

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
    return Reader(model.graph, dtype).module(_OPERATORS)


def _operator(*ops: str):
    def register(function):
        _OPERATORS.update(dict.fromkeys(ops, function))
        return function

    return register


# Shapes.


@_operator("Reshape")
def _reshape(r: Reader, node):
    return r.call(Tensor.reshape, r.value(node.input[0]), r.integers(node.input[1]))


@_operator("Expand")
def _expand(r: Reader, node):
    return r.call(Tensor.expand, r.value(node.input[0]), r.integers(node.input[1]))


@_operator("Transpose")
def _transpose(r: Reader, node):
    return r.call(Tensor.permute, r.value(node.input[0]), list(attributes(node)["perm"]))


@_operator("Concat")
def _concat(r: Reader, node):
    axis = attributes(node)["axis"]
    doubled = doubled_in_time(r, node, axis)
    return r.call(torch.cat, [r.value(name) for name in node.input], axis) if doubled is None else doubled


@_operator("Split")
def _split(r: Reader, node):
    return r.call(torch.split, r.value(node.input[0]), r.integers(node.input[1]), attributes(node)["axis"])


@_operator("Slice")
def _slice(r: Reader, node):
    starts, stops, axes, steps = map(r.integers, node.input[1:])
    return r.call(_cut, r.value(node.input[0]), list(zip(axes, starts, stops, steps)))


def _cut(x: Tensor, ranges: list[tuple[int, int, int, int]]) -> Tensor:
    index = [slice(None)] * x.ndim
    for axis, *ends in ranges:
        index[axis] = slice(*ends)
    return x[tuple(index)]


@_operator("Pad")
def _pad(r: Reader, node):
    pads = np.reshape(r.integers(node.input[1]), (2, -1)).T.tolist()  # (before, after) per axis
    repeats = attributes(node).get("mode") == b"edge"
    return r.call(repeat_edges if repeats else add_zeros, r.value(node.input[0]), pads)


@_operator("Resize")
def _resize(r: Reader, node):
    return r.call(F.interpolate, r.value(node.input[0]), scale_factor=2.0, mode="nearest")


@_operator("DepthToSpace")
def _depth_to_space(r: Reader, node):
    doubled = doubled_in_space(r, node)
    if doubled is not None:
        return doubled
    return r.call(_interleave, r.value(node.input[0]), attributes(node)["blocksize"])


def _interleave(x: Tensor, block: int) -> Tensor:
    """(N, block * block * C, H, W) -> (N, C, block * H, block * W), channels last"""
    n, c, h, w = x.shape
    x = x.reshape(n, block, block, c // block**2, h, w).permute(0, 4, 1, 5, 2, 3)
    return x.reshape(n, h * block, w * block, c // block**2).permute(0, 3, 1, 2)


# Arithmetic.


@_operator("Add")
def _add(r: Reader, node):
    norm = group_norm_of(r, node)
    return r.call(_sum, *map(r.value, node.input)) if norm is None else norm


def _sum(x, y):
    """x + y; an fp32 activation, the mean of a shortcut, returns to the precision of the other."""
    if isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape and x.dtype != y.dtype:
        x, y = (x.to(y.dtype), y) if x.dtype == torch.float32 else (x, y.to(x.dtype))
    return x + y


@_operator("Mul")
def _mul(r: Reader, node):
    for x, y in (node.input, reversed(node.input)):
        sigmoid = r.producer(y, "Sigmoid")
        if sigmoid is not None and sigmoid.input[0] == x:
            return r.call(F.silu, r.value(x))
    norm = rms_norm_of(r, node)
    return r.call(torch.mul, *map(r.value, node.input)) if norm is None else norm


@_operator("Sub")
def _sub(r: Reader, node):
    return r.call(torch.sub, *map(r.value, node.input))


@_operator("Div")
def _div(r: Reader, node):
    return r.call(_divide, *map(r.value, node.input))


def _divide(x, y):
    return (x.float() if isinstance(x, Tensor) else x) / (y.float() if isinstance(y, Tensor) else y)


_UNARY = {"Relu": F.relu, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh, "Neg": torch.neg, "Abs": torch.abs}


@_operator(*_UNARY)
def _unary(r: Reader, node):
    return r.call(_UNARY[node.op_type], r.value(node.input[0]))


_WIDE = {"Sqrt": torch.sqrt, "Reciprocal": torch.reciprocal, "Exp": torch.exp, "Log": torch.log, "Erf": torch.erf}


@_operator(*_WIDE)
def _wide(r: Reader, node):
    return r.call(_WIDE[node.op_type], r.call(Tensor.float, r.value(node.input[0])))


@_operator("Softmax")
def _softmax(r: Reader, node):
    return r.call(torch.softmax, r.call(Tensor.float, r.value(node.input[0])), attributes(node)["axis"])


_REDUCTIONS = {"ReduceMean": torch.mean, "ReduceSum": torch.sum, "ReduceMax": torch.amax, "ReduceMin": torch.amin}


@_operator(*_REDUCTIONS)
def _reduce(r: Reader, node):
    x = r.call(Tensor.float, r.value(node.input[0]))
    return r.call(_REDUCTIONS[node.op_type], x, r.integers(node.input[1]), keepdim=True)


@_operator("ReduceSumSquare")
def _reduce_sum_square(r: Reader, node):
    x = r.call(torch.square, r.call(Tensor.float, r.value(node.input[0])))
    return r.call(torch.sum, x, r.integers(node.input[1]), keepdim=True)


# Layers.


@_operator("MatMul")
def _matmul(r: Reader, node):
    attention = attention_of(r, node)
    if attention is not None:
        return attention
    weighted = any(name in r.arrays for name in node.input)
    return r.call(_product, *map(r.value, node.input), r.dtype if weighted else torch.float32)


def _product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.matmul(x.to(dtype), y.to(dtype))


@_operator("Conv")
def _conv(r: Reader, node):
    known = attributes(node)
    dims = len(known["kernel_shape"])
    ones = [1] * dims
    settings = (known.get("strides", ones), known.get("dilations", ones), known.get("group", 1))
    if node.output[0] == r.last:
        # Under names of their own: another convolution may share the bias, if all its values are the same.
        weight, *bias = (r.parameter(f"{name}_fp32", r.array(name), torch.float32) for name in node.input[1:])
    else:
        weight, *bias = map(r.value, node.input[1:])
    pads = np.reshape(known.get("pads", [0] * 2 * dims), (2, dims)).T.tolist()
    return r.call(_convolve, r.value(node.input[0]), weight, bias[0] if bias else None, pads, *map(_plain, settings))


def _plain(value):
    return value if isinstance(value, int) else list(value)


def _convolve(x: Tensor, weight, bias, pads, strides, dilations, group: int) -> Tensor:
    x = x.to(weight.dtype)
    if any(before != after for before, after in pads):
        x, pads = add_zeros(x, pads), [(0, 0)] * len(pads)
    convolution = F.conv2d if x.ndim == 4 else F.conv3d
    return convolution(channels_last(x), weight, bias, strides, [before for before, _ in pads], dilations, group)
