"""Reads a MindIR file: MindSpore's compiled graph as a list of operators, with constants and weights filled in."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mindspore.train.mind_ir_pb2 import AttributeProto, ModelProto, TensorProto

_DTYPES = {
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
    TensorProto.DOUBLE: np.float64,
    TensorProto.INT32: np.int32,
    TensorProto.INT64: np.int64,
    TensorProto.BOOL: np.bool_,
}
_SEQUENCES = (AttributeProto.TUPLE, AttributeProto.LIST)
_NOTHING = (AttributeProto.UMONAD, AttributeProto.IOMONAD, AttributeProto.NONE)


class ExportError(ValueError):
    """A network that cannot be exported; messages name the operator."""


@dataclass
class Value:
    """A tensor that is only known when the graph runs."""

    name: str


@dataclass
class Node:
    """One operator.

    Attributes:
        op: the primitive's name, e.g. Conv2D.
        inputs: `Value`s, numpy arrays (weights and constant tensors) and plain constants, or tuples of these.
        attributes: of the primitive.
        outputs: names of its outputs; several if the operator returns a tuple.
        shapes: of the outputs.
    """

    op: str
    inputs: list[Any]
    attributes: dict[str, Any]
    outputs: list[str]
    shapes: list[tuple[int, ...]]


@dataclass
class Graph:
    """Operators in an order in which they can run, and the network's input and output."""

    nodes: list[Node]
    input: str
    input_shape: tuple[int, ...]
    output: Any


def read_graph(path: Path, weight: Callable[[str], np.ndarray]) -> Graph:
    """Read the graph of a network with one input and one output.

    Args:
        path: X.mindir, or if weights are stored separately, X_graph.mindir.
        weight: returns a parameter by its name in the network.

    Raises:
        ExportError: the graph is more than a list of operators.
    """
    model = ModelProto()
    model.ParseFromString(path.read_bytes())
    graph = model.graph
    if model.functions or len(graph.input) != 1 or len(graph.output) != 1:
        raise ExportError(
            f"the graph has {len(model.functions)} functions, {len(graph.input)} inputs and {len(graph.output)} "
            "outputs; only one without functions, with one input and one output, can be exported"
        )
    source = graph.input[0]
    primitives = {primitive.name: primitive for primitive in model.primitives}
    values: dict[str, Any] = {source.name: Value(source.name)}
    for parameter in graph.parameter:
        values[parameter.name] = weight(parameter.name.rpartition(":")[2])
        parameter.raw_data = b""  # one copy is enough
    nodes = []
    for proto in graph.node:
        name = proto.output[0]
        if proto.op_type == "Constant":
            values[name] = _constant(proto.attribute[0])
            continue
        primitive = primitives.get(proto.op_type.removeprefix("REF::"))
        op = primitive.op_type if primitive else proto.op_type
        inputs = [values[key] for key in proto.input]
        if op in ("Load", "Depend"):  # these order side effects; there are none
            values[name] = inputs[0]
        elif op == "UpdateState":
            values[name] = None
        elif op == "MakeTuple":
            values[name] = tuple(inputs)
        elif op == "TupleGetItem":
            values[name] = inputs[0][inputs[1]]
        else:
            shapes = _shapes(next(item for item in proto.attribute if item.name == "shape"))
            several = isinstance(shapes, list)
            names = [f"{name}/{i}" for i in range(len(shapes))] if several else [name]
            values[name] = tuple(map(Value, names)) if several else Value(name)
            attributes = {item.name: _constant(item) for item in primitive.attribute} if primitive else {}
            nodes.append(Node(op, inputs, attributes, names, shapes if isinstance(shapes, list) else [shapes]))
    return Graph(nodes, source.name, tuple(source.tensor[0].dims), values[graph.output[0].name])


def output_shape(path: Path) -> tuple[int, ...]:
    """The output shape of the network in a MindIR file."""
    model = ModelProto()
    model.ParseFromString(path.read_bytes())
    return tuple(model.graph.output[0].tensor[0].dims)


def _constant(item) -> Any:
    """An attribute as a Python value or an array."""
    kind = item.type
    if kind in _SEQUENCES:
        return tuple(map(_constant, item.values))
    if kind == AttributeProto.TENSORS:
        return _tensor(item.tensors[0])
    if kind in (AttributeProto.FLOAT, AttributeProto.DOUBLE):
        return item.f if kind == AttributeProto.FLOAT else item.d
    if kind == AttributeProto.STRING:
        return item.s.decode()
    if kind == AttributeProto.BOOL:
        return bool(_integer(item))
    return None if kind in _NOTHING else _integer(item)


def _integer(item) -> int:
    """A number, alone or in a tuple."""
    return item.ints[0] if item.ints else item.i


def _tensor(proto) -> np.ndarray:
    if proto.data_type not in _DTYPES:
        raise ExportError(
            f"a constant has data type {TensorProto.DataType.Name(proto.data_type)}, which is not supported"
        )
    values = np.frombuffer(proto.raw_data, _DTYPES[proto.data_type])
    return values.reshape(tuple(proto.dims))


def _shapes(item) -> tuple[int, ...] | list[tuple[int, ...]]:
    """The shape of an operator's output, or a list of them if it returns a tuple."""
    if item.type in _SEQUENCES:
        return [tuple(value.tensors[0].dims) for value in item.values]
    return tuple(item.tensors[0].dims)
