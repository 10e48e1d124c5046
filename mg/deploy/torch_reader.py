"""What all operators of `mg.deploy.torch_graph` use: `Reader`, an ONNX graph as it becomes a PyTorch module, and a few
functions on tensors."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, fx, nn
from torch.nn import functional as F


class Reader:
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

    def module(self, operators: Mapping[str, Callable]) -> fx.GraphModule:
        """Build the module; `operators` has a function for each ONNX operator, of this reader and a node."""
        x = self.graph.placeholder("x")
        self.values[self.onnx.input[0].name] = self.call(Tensor.to, x, self.dtype)
        for node in self.onnx.node:
            built = operators[node.op_type](self, node)
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
        weight = channels_last(torch.tensor(array).to(dtype or self.dtype))
        self.root.register_parameter(name, nn.Parameter(weight, requires_grad=False))
        return self.graph.get_attr(name)


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _item(values: Sequence, i: int):
    return values[i]


def channels_last(x: Tensor) -> Tensor:
    """x with channels last in memory, if it is an image or a clip."""
    if x.ndim not in (4, 5):
        return x.contiguous()
    x = x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    if torch.compiler.is_compiling() or 1 not in x.shape:
        return x
    # PyTorch recognises the layout by all strides, those of axes of length 1 too, where reshapes leave any number.
    strides = [math.prod(x.shape[axis + 1 :]) * x.shape[1] for axis in range(x.ndim)]
    return x.as_strided(x.shape, [math.prod(x.shape[1:]), 1, *strides[2:]])


def repeat_edges(x: Tensor, pads: list[list[int]]) -> Tensor:
    """Repeat the edges of a clip or an image; `pads` has (before, after) for each axis, channels included."""
    x = x.movedim(1, -1)  # `F.pad` would lose channels last on CUDA
    for axis, (before, after) in enumerate(pads[2:], 1):
        if before or after:
            first, last = x.narrow(axis, 0, 1), x.narrow(axis, x.shape[axis] - 1, 1)
            x = torch.cat([*[first] * before, x, *[last] * after], axis)
    return x.movedim(-1, 1)


def add_zeros(x: Tensor, pads: list[list[int]]) -> Tensor:
    """Pad with zeros; `pads` has (before, after) for each of the last axes."""
    return F.pad(x, [n for before_after in reversed(pads) for n in before_after])
