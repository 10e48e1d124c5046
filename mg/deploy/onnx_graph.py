"""Builds an ONNX graph of known shapes: folds constants, and merges consecutive reshapes and transposes."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

OPSET = 18
_LARGEST = 2**31 - 2**20  # bytes of weights that fit into one protobuf file, with room for the graph itself


class GraphBuilder:
    """Operators are added one by one, in an order in which they can run; their inputs are names of values or arrays.

    Anything computed only from arrays is an array again. Unused values are left out of the model.

    Attributes:
        shapes: of every value, by name.
    """

    def __init__(self):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._nodes: dict[str, onnx.NodeProto] = {}  # by output name
        self._constants: dict[str, np.ndarray] = {}
        self._names: dict[Any, str] = {}  # of constants
        self._numbers = itertools.count()

    def input(self, name: str, shape: Sequence[int]) -> str:
        self.shapes[name] = tuple(shape)
        return name

    def shape(self, value: str | np.ndarray) -> tuple[int, ...]:
        return value.shape if isinstance(value, np.ndarray) else self.shapes[value]

    def producer(self, value: str | np.ndarray, op: str) -> onnx.NodeProto | None:
        """The node that computes a value, if it is an `op`."""
        node = None if isinstance(value, np.ndarray) else self._nodes.get(value)
        return node if node is not None and node.op_type == op else None

    def operand(self, node: onnx.NodeProto, i: int) -> Any:
        """An input of a node: the name of a value, or an array."""
        return self._constants.get(node.input[i], node.input[i])

    def add(self, op: str, *inputs: str | np.ndarray, shape: Sequence[int], **attributes) -> str | np.ndarray:
        """Add an operator with one output."""
        return self.add_several(op, *inputs, shapes=[shape], **attributes)[0]

    def add_several(
        self, op: str, *inputs: str | np.ndarray, shapes: Sequence[Sequence[int]], **attributes
    ) -> list[str | np.ndarray]:
        """Add an operator with one output for each of `shapes`."""
        outputs = [f"{op}_{next(self._numbers)}" for _ in shapes]
        if all(isinstance(value, np.ndarray) for value in inputs):
            return _computed(helper.make_node(op, [f"i{i}" for i in range(len(inputs))], outputs, **attributes), inputs)
        names = [self._name(value) if isinstance(value, np.ndarray) else value for value in inputs]
        node = helper.make_node(op, names, outputs, name=outputs[0], **attributes)
        for output, shape in zip(outputs, shapes):
            self._nodes[output] = node
            self.shapes[output] = tuple(shape)
        return outputs

    def reshape(self, x: str | np.ndarray, shape: Sequence[int]) -> str | np.ndarray:
        """Reshape; of two in a row only the second is kept, and none to the same shape."""
        shape = _whole_shape(self.shape(x), shape)
        before = self.producer(x, "Reshape")
        if before is not None and self.shape(x) != shape:
            x = self.operand(before, 0)
        if self.shape(x) == shape:
            return x
        return self.add("Reshape", x, np.array(shape, np.int64), shape=shape)

    def transpose(self, x: str | np.ndarray, order: Sequence[int]) -> str | np.ndarray:
        """Transpose; two in a row are merged, and one that only moves axes of length 1 is a reshape."""
        before = self.producer(x, "Transpose")
        if before is not None:
            first = list(helper.get_node_attr_value(before, "perm"))
            x, order = self.operand(before, 0), [first[axis] for axis in order]
        old = self.shape(x)
        shape = tuple(old[axis] for axis in order)
        moved = [axis for axis in order if old[axis] != 1]
        if moved == sorted(moved):
            return self.reshape(x, shape)
        return self.add("Transpose", x, shape=shape, perm=list(order))

    def model(self, output: str, output_name: str) -> onnx.ModelProto:
        """The model that computes `output` from the inputs, renamed to `output_name`."""
        needed: set[str] = set()
        order: list[onnx.NodeProto] = []
        todo = [output]
        while todo:
            node = self._nodes.get(todo.pop())
            if node is not None and node.name not in needed:
                needed.add(node.name)
                todo += node.input
        for node in self._nodes.values():  # in the order in which they were added
            if node.name in needed and (not order or order[-1] is not node):
                order.append(node)
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in order]
        for node in nodes:
            for names in (node.input, node.output):
                for i, name in enumerate(names):
                    names[i] = output_name if name == output else name
        used = {name for node in nodes for name in node.input}
        made = {name for node in nodes for name in node.output}
        inputs = [
            helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, self.shapes[name])
            for name in self.shapes
            if name in used - made
        ]
        graph = helper.make_graph(
            nodes,
            "network",
            inputs,
            [helper.make_tensor_value_info(output_name, onnx.TensorProto.FLOAT, self.shapes[output])],
            [numpy_helper.from_array(array, name) for name, array in self._constants.items() if name in used],
        )
        return helper.make_model(
            graph, producer_name="mg", ir_version=9, opset_imports=[helper.make_opsetid("", OPSET)]
        )

    def _name(self, array: np.ndarray) -> str:
        """The name of a constant; small ones share a name if equal, large ones if they are the same object."""
        key = (array.dtype.str, array.shape, array.tobytes()) if array.size <= 1024 else id(array)
        if key not in self._names:
            name = f"constant_{next(self._numbers)}"
            self._names[key], self._constants[name] = name, np.ascontiguousarray(array).reshape(array.shape)
            if array.size > 1024:
                self._names[(id(array), "kept")] = array  # so that its id is not reused
        return self._names[key]


def write_model(model: onnx.ModelProto, path) -> None:
    """Write a model into one file; if that is too large for protobuf, the weights go next to it, in `path`.data."""
    if sum(math.prod(tensor.dims) * 4 for tensor in model.graph.initializer) < _LARGEST:
        path.write_bytes(model.SerializeToString())
    else:
        onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)


def _computed(node: onnx.NodeProto, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The outputs of a node for arrays."""
    graph = helper.make_graph(
        [node],
        "constants",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in zip(node.input, inputs)
        ],
        [onnx.ValueInfoProto(name=name) for name in node.output],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    return ReferenceEvaluator(model).run(None, dict(zip(node.input, inputs)))


def _whole_shape(old: tuple[int, ...], new: Sequence[int]) -> tuple[int, ...]:
    """`new` with -1 replaced by the length it stands for."""
    known = math.prod(length for length in new if length != -1)
    return tuple(math.prod(old) // known if length == -1 else length for length in new)
