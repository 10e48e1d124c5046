"""What is several operators in ONNX but one in PyTorch: group and RMS norm, softmax attention, and upsampling, whose
convolutions on the small grid are one transposed convolution.

Each public function gets the last operator of a group, and builds the one that replaces them all; None if `node` isn't
such an operator. The others are then unused, and the reader removes them.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor
from torch.nn import functional as F

from mg.deploy.torch_reader import Reader, add_zeros, attributes, channels_last, repeat_edges

# Norms.


def group_norm_of(r: Reader, node):
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
    return F.group_norm(channels_last(x), groups, weight, bias, eps)  # computes in fp32 too


def rms_norm_of(r: Reader, node):
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


# Attention.


def attention_of(r: Reader, node):
    """softmax(q k) v, if `node` is its last product; with v first the result is its transpose."""
    flipped = r.producer(node.input[1], "Transpose")
    v_first = flipped is not None and r.producer(flipped.input[0], "Softmax") is not None
    weights = r.producer(flipped.input[0] if v_first else node.input[0], "Softmax")
    if weights is None or attributes(weights)["axis"] != -1:
        return None
    if v_first:
        order = list(attributes(flipped)["perm"])
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


# Upsampling. The convolutions of `mg.deploy.upsampling`, one for even and one for odd samples along each doubled axis,
# are one transposed convolution, which needs neither their padded inputs nor a copy that interleaves their outputs.


def doubled_in_space(r: Reader, node):
    """The transposed convolution for a DepthToSpace that interleaves four convolutions; None if it doesn't.

    For clips it is (N, C, T, H, W) where ONNX has (N, C * T, H, W); the operators after it are reshapes.
    """
    joined = r.producer(r.before(node.input[0], "Reshape"), "Concat")
    if joined is None or len(joined.input) != 4 or attributes(joined)["axis"] != 1:
        return None
    parts = dict(zip(itertools.product((0, 1), repeat=2), (r.producer(name, "Conv") for name in joined.input)))
    if None in parts.values():
        return None
    dims = len(attributes(parts[0, 0])["kernel_shape"])
    if dims == 3 and r.users[node.output[0]] != {"Reshape"}:
        return None
    return _transposed_convolution(r, parts, [dims - 2, dims - 1], node.output[0])


def doubled_in_time(r: Reader, node, axis: int):
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


def _transposed_convolution(r: Reader, parts: dict[tuple[int, ...], onnx.NodeProto], axes: list[int], name: str):
    """One transposed convolution for convolutions given by phase, even or odd, along `axes` (0 is the first after the
    channels); None if they don't read the same value, or aren't a half each of one kernel of four taps."""
    first = next(iter(parts.values()))
    dims = len(attributes(first)["kernel_shape"])
    inputs, pads = set(), {}
    for phase, part in parts.items():
        known, x, edges = attributes(part), part.input[0], np.zeros((2, dims), np.int64)
        if {*known.get("strides", [1]), *known.get("dilations", [1]), known.get("group", 1)} != {1}:
            return None
        padded = r.producer(x, "Pad")
        if padded is not None and attributes(padded).get("mode") == b"edge":
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
    x = add_zeros(repeat_edges(x.to(weight.dtype), edges), zeros)
    convolution = F.conv_transpose2d if x.ndim == 4 else F.conv_transpose3d
    return convolution(channels_last(x), weight, bias, strides, padding)
