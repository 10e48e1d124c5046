"""Floating-point operations of a call, counted in the graphs that MindSpore compiles for it.

    with count_operations() as count:
        model.encode(x)
    count.total         # 2 for every multiply-add of convolutions and matrix products

As in `torch.utils.flop_counter`, elementwise work (norms, activations, biases, the optimizer) is not counted, and
zero padding of convolutions counts like any pixel. A training step's backward pass is part of its graph.
"""

import contextlib
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from mindspore import nn
from mindspore.train.anf_ir_pb2 import GraphProto, ModelProto

from mg import runtime

Shape = tuple[int, ...]


@dataclass
class Operations:
    """Counted operations by primitive name."""

    by_primitive: Counter = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return sum(self.by_primitive.values())


@contextlib.contextmanager
def count_operations() -> Iterator[Operations]:
    """Count the operations of all cells called in the block, at every call, whether it compiles or not.

    Raises:
        RuntimeError: not in graph mode.
        ValueError: a graph has an unknown kind of convolution or product.
    """
    if not runtime.is_graph_mode():
        raise RuntimeError("operations are counted in compiled graphs: call mg.runtime.setup with mode graph")
    count, known = Operations(), {}
    compile_and_run = nn.Cell.compile_and_run

    def counted(cell, *args, **kwargs):
        result = compile_and_run(cell, *args, **kwargs)
        graph = (id(cell), cell.current_phase)  # the phase names the compiled graph
        if graph not in known:
            known[graph] = graph_operations(ModelProto.FromString(cell.get_func_graph_proto()).graph)
        count.by_primitive += known[graph]
        return result

    nn.Cell.compile_and_run = counted
    try:
        yield count
    finally:
        nn.Cell.compile_and_run = compile_and_run


def graph_operations(graph: GraphProto) -> Counter:
    """Operations of one run of a graph, by primitive name.

    Raises:
        ValueError: an unknown kind of convolution or product.
    """
    shapes: dict[str, Shape] = {parameter.name: _shape(parameter.type) for parameter in graph.parameters}
    shapes |= {constant.key: tuple(constant.value.tensor_val.dims) for constant in graph.const_vals}
    shapes |= {node.name: _shape(node.output_type) for node in graph.node}
    count: Counter = Counter()
    for node in graph.node:
        if node.op_type in _COUNTS:
            inputs = [shapes.get(edge.name, ()) for edge in node.input]
            count[node.op_type] += _COUNTS[node.op_type](inputs, shapes[node.name])
        elif _HEAVY.search(node.op_type):
            raise ValueError(f"operations of {node.op_type} ({node.scope}) are not known to mg.benchmark.operations")
    return count


def _shape(kind) -> Shape:
    return tuple(dim.size for dim in kind.tensor_type.shape.dim)


# One multiply-add for every value of the output and every weight that it depends on. A weight is (Cout, Cin / groups,
# *kernel). A gradient needs as many: the output's gradient is the first of the inputs in 2-D, the second in 3-D.


def _convolution(inputs: list[Shape], output: Shape) -> int:
    return 2 * math.prod(output) * math.prod(inputs[1][1:])


def _convolution2d_input(inputs: list[Shape], output: Shape) -> int:
    return 2 * math.prod(inputs[0]) * math.prod(inputs[1][1:])


def _convolution3d_input(inputs: list[Shape], output: Shape) -> int:
    return _convolution2d_input(inputs[1::-1], output)


def _convolution2d_weight(inputs: list[Shape], output: Shape) -> int:
    return 2 * math.prod(inputs[0]) * math.prod(output[1:])


def _convolution3d_weight(inputs: list[Shape], output: Shape) -> int:
    return _convolution2d_weight(inputs[1::-1], output)


def _product(inputs: list[Shape], output: Shape) -> int:
    """(..., M, K) x (..., K, N), either possibly transposed: K^2 = MK * KN / MN"""
    left, right = (math.prod(shape[-2:]) for shape in inputs[:2])
    return 2 * math.prod(output) * math.isqrt(left * right // math.prod(output[-2:]))


_COUNTS = {
    **dict.fromkeys(("Conv2D", "Conv3D"), _convolution),
    "Conv2DBackpropInput": _convolution2d_input,
    "Conv3DBackpropInput": _convolution3d_input,
    "Conv2DBackpropFilter": _convolution2d_weight,
    "Conv3DBackpropFilter": _convolution3d_weight,
    **dict.fromkeys(("MatMul", "BatchMatMul", "MatMulExt", "BatchMatMulExt"), _product),
}
_HEAVY = re.compile(r"Conv(?!ert)|MatMul|Attention|Einsum|Dense|Addmm|Addbmm|Baddbmm|LSTM|GRU|^Dot$|^Mv$")
