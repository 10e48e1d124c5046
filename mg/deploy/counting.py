"""Operation counts of ONNX graphs."""

import math
import os

_SMALL = 1024  # constants up to this many values may determine shapes


def operations(model) -> int:
    """Floating-point operations of an ONNX graph: 2 per multiply-add of its convolutions and matrix products.

    Elementwise work, norms and activations, is not counted.

    Args:
        model: a file (external data is not read) or an `onnx.ModelProto`.

    Raises:
        ValueError: a shape cannot be inferred; the message names the node.
    """
    import onnx

    if isinstance(model, (str, os.PathLike)):
        model = onnx.load(model, load_external_data=False)
    shapes = _shapes(model)
    return sum(_COUNTS[node.op_type](node, shapes) for node in model.graph.node if node.op_type in _COUNTS)


class _Shapes(dict):
    """Name of a value -> its shape; an unknown one is an error."""

    def of(self, name: str, node) -> tuple[int, ...]:
        if name not in self:
            raise ValueError(f"{node.op_type} {node.name or node.output[0]}: the shape of {name} is not known")
        return self[name]


def _shapes(model) -> _Shapes:
    import onnx

    shapes = _Shapes({constant.name: tuple(constant.dims) for constant in model.graph.initializer})
    bare = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    bare.graph.name = model.graph.name
    bare.graph.node.extend(model.graph.node)
    bare.graph.output.extend(model.graph.output)
    bare.graph.value_info.extend(model.graph.value_info)
    for constant in model.graph.initializer:  # without weights: only shapes are needed, and protobuf is limited to 2 GB
        if math.prod(constant.dims) <= _SMALL and not constant.external_data:
            bare.graph.initializer.append(constant)
        else:
            value = onnx.helper.make_tensor_value_info(constant.name, constant.data_type, constant.dims)
            bare.graph.input.append(value)
    bare.graph.input.extend(value for value in model.graph.input if value.name not in shapes)
    inferred = onnx.shape_inference.infer_shapes(bare, data_prop=True).graph
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
            shapes[value.name] = tuple(dim.dim_value for dim in dims)
    return shapes


def _convolution(node, shapes: _Shapes) -> int:
    weight = shapes.of(node.input[1], node)  # (Cout, Cin / group, kernel ...)
    return 2 * math.prod(shapes.of(node.output[0], node)) * math.prod(weight[1:])


def _transposed_convolution(node, shapes: _Shapes) -> int:
    weight = shapes.of(node.input[1], node)  # (Cin, Cout / group, kernel ...)
    return 2 * math.prod(shapes.of(node.input[0], node)) * math.prod(weight[1:])


def _product(node, shapes: _Shapes) -> int:
    return 2 * math.prod(shapes.of(node.output[0], node)) * shapes.of(node.input[0], node)[-1]


def _gemm(node, shapes: _Shapes) -> int:
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    depth = shapes.of(node.input[0], node)[0 if transposed else 1]
    return 2 * math.prod(shapes.of(node.output[0], node)) * depth


_COUNTS = {"Conv": _convolution, "ConvTranspose": _transposed_convolution, "MatMul": _product, "Gemm": _gemm}
