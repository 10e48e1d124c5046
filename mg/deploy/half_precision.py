"""Exported graphs in fp16, for onnxruntime, which computes in the precision that a graph is written in.

As in the engine torch, the last convolution, norms, softmax, and products of two activations stay in fp32; here those
of softmax attention too.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

# Operators that sum or divide, or whose results may exceed fp16.
_WIDE = set(
    "ReduceMean ReduceSum ReduceSumSquare ReduceMax ReduceMin Softmax Sub Div Sqrt Reciprocal Exp Log Erf".split()
)
# Operators that leave fp32. Any other, such as a norm's gain or a reshape, stays in it after an operator of the above.
_NARROW = {"Conv", "MatMul", "Sigmoid", "Relu", "Tanh"}


def read_in_fp16(path: str | Path) -> ModelProto:
    """Read an exported graph; its input and output stay in fp32, most of what is between becomes fp16."""
    model = onnx.load(path)
    graph, nodes = model.graph, []
    constants = {constant.name: constant for constant in graph.initializer}
    kinds = {value.name: TensorProto.FLOAT for value in graph.input}  # the precision of each activation
    results = {value.name for value in graph.output}
    results.update([node.output[0] for node in graph.node if node.op_type == "Conv"][-1:])
    for node in graph.node:
        wide = not results.isdisjoint(node.output) or _is_wide(node, kinds)
        kind = TensorProto.FLOAT if wide else TensorProto.FLOAT16
        for i, name in enumerate(node.input):
            new = f"{name}_fp{32 if wide else 16}"
            if kinds.get(name, kind) != kind:
                if new not in kinds:
                    nodes.append(helper.make_node("Cast", [name], [new], to=kind))
                    kinds[new] = kind
                node.input[i] = new
            elif not wide and node.op_type != "Resize" and _is_fp32(constants.get(name)):
                values = numpy_helper.to_array(constants[name]).astype(np.float16)
                constants[new] = numpy_helper.from_array(values, new)
                node.input[i] = new
        kinds.update(dict.fromkeys(node.output, kind))
        nodes.append(node)
    used = {name for node in nodes for name in node.input}
    weights = [constant for name, constant in constants.items() if name in used]
    for field, values in ((graph.node, nodes), (graph.initializer, weights), (graph.value_info, [])):
        del field[:]
        field.extend(values)
    return model


def _is_fp32(constant: TensorProto | None) -> bool:
    return constant is not None and constant.data_type == TensorProto.FLOAT


def _is_wide(node: NodeProto, kinds: dict[str, int]) -> bool:
    """Whether a node computes in fp32, by its operator and the precisions of its inputs."""
    inputs = [name for name in node.input if name in kinds]
    square = node.op_type == "Mul" and len(set(inputs)) < len(inputs)
    product = node.op_type == "MatMul" and len(inputs) == 2
    follows = node.op_type not in _NARROW and all(kinds[name] == TensorProto.FLOAT for name in inputs)
    return node.op_type in _WIDE or square or product or follows
