"""How much memory a graph needs on the device: its peak live memory, from the kernel graph that MindSpore saved.

Parameters and constants are live all the time. A kernel's output is live from its call to the last call that reads it,
also through views and tuples, and to the end if the graph returns it. Calls are assumed to run in the order in which
they are saved. MindSpore launches them breadth first, a difference of up to 4% in training steps at full size. What a
kernel needs besides its outputs, and what an allocator wastes, is not known here.
"""

import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from mg.ascend.kernels import Selection, Tensor, tensors

_BYTES = {"Bool": 1, "Int8": 1, "UInt8": 1, "Int16": 2, "UInt16": 2, "Float16": 2, "BFloat16": 2}
_BYTES |= {"Int32": 4, "UInt32": 4, "Float32": 4, "Int64": 8, "UInt64": 8, "Float64": 8}
_PARAMETER = re.compile(r"^%para\d+_\S+: (<.*?>)", re.MULTILINE)
# %3(name) = PrimFunc_Concat(%1, %2, I64(1)) primitive_attrs: ..., and below it : (inputs) -> (outputs). A constant
# among the arguments takes several lines.
_CALL = re.compile(
    r"^  (%\d+)\(.*?\) = (?:\w+::)?(?:PrimFunc_)?(\w+)\(((?s:.*?))\)(?: (?:\{instance|primitive_|cnode_).*)?\n"
    r" +: \(.*\) -> \((.*)\)$",
    re.MULTILINE,
)
_RETURN = re.compile(r"^  Return\((.*)\)", re.MULTILINE)
_NAME = re.compile(r"%para\d+_[^,() ]+|%\d+")
_CONSTANT = re.compile(r"Tensor\(shape=\[([\d, ]*)\], dtype=(\w+), value=")
_ITEM = re.compile(r"I64\((\d+)\)$")
_ELSEWHERE = re.compile(r"\bis_(?:parameter|inplace|view_output)\b")  # an output that shares an input's memory


@dataclass(frozen=True)
class _Buffer:
    """The memory of one output of a call."""

    node: str
    output: int
    size: int


_Value: TypeAlias = "_Buffer | tuple[_Value, ...]"


def peak(graphs: Sequence[Path], selection: Selection) -> int:
    """Peak bytes of the largest of these saved graphs, given the selected kernels; 0 without a graph."""
    computing = {kernel.primitive for kernel in selection.kernels if kernel.kind != "view"}
    return max((_peak(graph.read_text(errors="replace"), computing) for graph in graphs), default=0)


def _peak(graph: str, computing: Collection[str]) -> int:
    values: dict[str, _Value] = {}
    born: dict[_Buffer, int] = {}
    read: dict[_Buffer, int] = {}  # the last call that reads it
    constants = set()  # equal ones share a tensor, and nearly all are zeros
    calls = _CALL.findall(graph)
    for time, (node, primitive, arguments, outputs) in enumerate(calls):
        inputs = tuple(values.get(name, ()) for name in _NAME.findall(arguments))
        constants.update(_CONSTANT.findall(arguments))
        if primitive not in computing:
            values[node] = _passed_on(primitive, arguments, inputs)
            continue
        read.update(dict.fromkeys(_buffers(inputs), time))
        if _ELSEWHERE.search(outputs):
            values[node] = inputs[0]
            continue
        new = tuple(_Buffer(node, output, _size(tensor)) for output, tensor in enumerate(tensors(outputs)))
        values[node] = new[0] if len(new) == 1 and not outputs.startswith("<Tuple") else new
        born.update(dict.fromkeys(new, time))
    for name in _NAME.findall(" ".join(_RETURN.findall(graph))):
        read.update(dict.fromkeys(_buffers(values.get(name, ())), len(calls)))
    changes = [0] * (len(calls) + 2)
    for buffer, time in born.items():
        changes[time] += buffer.size
        changes[read.get(buffer, time) + 1] -= buffer.size
    live = most = 0
    for change in changes:
        live += change
        most = max(most, live)
    kept = [tensor for entry in _PARAMETER.findall(graph) for tensor in tensors(entry)]
    kept += [Tensor(dtype, tuple(map(int, re.findall(r"\d+", shape)))) for shape, dtype in constants]
    return most + sum(map(_size, kept))


def _passed_on(primitive: str, arguments: str, inputs: tuple[_Value, ...]) -> _Value:
    """The result of a call that moves no data, e.g. a view, Load or Depend: its first input, except for tuples."""
    if primitive == "MakeTuple":
        return inputs
    if primitive == "UpdateState" or not inputs:  # only orders calls, no data
        return ()
    item, first = _ITEM.search(arguments), inputs[0]
    if primitive == "TupleGetItem" and item and isinstance(first, tuple) and int(item[1]) < len(first):
        return first[int(item[1])]
    return first


def _buffers(value: _Value) -> Iterator[_Buffer]:
    if isinstance(value, _Buffer):
        yield value
    else:
        for part in value:
            yield from _buffers(part)


def _size(tensor: Tensor) -> int:
    return _BYTES[tensor.dtype] * math.prod(tensor.shape)
