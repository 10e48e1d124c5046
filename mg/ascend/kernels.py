"""What MindSpore's Ascend plugin selected for a graph, read from its log and from the kernel graph that it saved.

The log has the kind of kernel for each primitive once: aclnn, which comes precompiled with CANN; aclop, which CANN
compiles again for every shape; or, if the plugin has neither, a kernel on the host's CPU. If there is no host kernel
either, the graph is refused. The saved graph has every call with the types and shapes of its inputs and outputs.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Settings that `read` needs: MindSpore must log the selection, and save the graph after it.
SAVED_AFTER = "end_opt_acl_graph_after_kernel_packet"
LOGGING = {
    "GLOG_v": "3",
    "MS_SUBMODULE_LOG_v": "{DEVICE:1}",
    "MS_DEV_SAVE_GRAPHS": "1",
    "MS_DEV_DUMP_IR_PASSES": SAVED_AFTER,
}

_SELECTED = re.compile(r"CollectOpSelectedType\] (\w+) select (\w+) kernel")
_ON_HOST = re.compile(r"Try to use backoff CPU kernel, node:(\S+)")
_REFUSED = re.compile(r"selection failed.*?node is (\S+)")
_ERROR = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*", re.MULTILINE)
# %3(name) = PrimFunc_Conv2DExt(%1, %2) primitive_attrs: ..., and below it : (inputs) -> (outputs)
_CALL = re.compile(r"^  %\d+\(.*?\) = (?:\w+::)?(?:PrimFunc_)?(\w+)\(")
_TYPES = re.compile(r"^ +: \((.*)\) -> \((.*)\)$")
_SCOPE = re.compile(r"^ +# Fullname with scope: \((.*)\)$")
_ENTRY = re.compile(r"<(.*?)>")
_DTYPE = re.compile(r"Tensor\[(\w+)\](?:\*(\d+))?")
_SHAPE = re.compile(r"\(([-\d, ]*)\)")


@dataclass(frozen=True)
class Tensor:
    """The type, e.g. Float32, and shape of a kernel's input or output."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Kernel:
    """A call of a kernel.

    Attributes:
        primitive: MindSpore's name of the operator.
        kind: aclnn | aclop | host | view, or another kind of the plugin.
        inputs, outputs: only the tensors among them, in order.
        scope: where in the model it is.
    """

    primitive: str
    kind: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    scope: str


@dataclass(frozen=True)
class Selection:
    """The kernels selected for a graph.

    Attributes:
        kernels: in the order of the saved graph.
        failure: why there is no graph, in one line; empty if there is one.
        refused: whether there is no graph because the plugin lacks a kernel.
    """

    kernels: tuple[Kernel, ...] = ()
    failure: str = ""
    refused: bool = False

    @property
    def launches(self) -> int:
        """The number of kernels that a device runs; views only compute strides on the host."""
        return sum(kernel.kind != "view" for kernel in self.kernels)

    def count(self, kind: str) -> Counter[str]:
        """The number of kernels of a kind, by primitive."""
        return Counter(kernel.primitive for kernel in self.kernels if kernel.kind == kind)


def read(log: str, saved: Path) -> Selection:
    """Read the log and saved graphs of a process that compiled one graph.

    Args:
        log: everything that it wrote.
        saved: the folder of its graphs.
    """
    kinds: dict[str, str] = {}
    for primitive, kind in _SELECTED.findall(log):
        kind = "view" if kind == "host" else kind  # the host only computes an offset; no data moves
        # A primitive that is aclop for some types counts as aclop for all: the log does not say for which.
        kinds[primitive] = kind if kinds.get(primitive) != "aclop" else "aclop"
    files = saved_graphs(saved)
    if not files:
        if refused := _REFUSED.search(log):
            return Selection(failure=f"refused: {_primitive(refused[1])}", refused=True)
        said = _ERROR.findall(log)
        return Selection(failure=said[-1] if said else "it ended without an error message")
    kinds |= {_primitive(node): "host" for node in _ON_HOST.findall(log)}
    kernels = (kernel for file in files for kernel in _kernels(file, kinds))
    return Selection(tuple(kernels))


def saved_graphs(saved: Path) -> list[Path]:
    """The kernel graphs in a folder; there is one unless the graph has control flow."""
    return sorted(saved.rglob(f"hwopt*{SAVED_AFTER}*.ir"))


def _primitive(node: str) -> str:
    """The primitive of a node, from its name in the graph, e.g. Default/encoder-Encoder/Conv2D-op3."""
    return node.rpartition("/")[2].rpartition("-op")[0]


def _kernels(file: Path, kinds: dict[str, str]) -> Iterator[Kernel]:
    """The calls of a saved graph that are kernels; those without a kind in the log move no data."""
    primitive, types = "", ("", "")
    for line in file.read_text(errors="replace").splitlines():
        if call := _CALL.match(line):
            primitive, types = call[1], ("", "")
        elif primitive in kinds and not types[0] and (found := _TYPES.match(line)):
            types = found[1], found[2]
        elif primitive in kinds and (found := _SCOPE.match(line)):
            inputs, outputs = (tuple(tensors(text)) for text in types)
            yield Kernel(primitive, kinds[primitive], inputs, outputs, found[1])
            primitive = ""


def tensors(text: str) -> Iterator[Tensor]:
    """The tensors in MindSpore's notation of types, those in tuples one by one."""
    for entry in _ENTRY.findall(text):  # one tensor, or a tuple of them
        dtypes = [dtype for dtype, times in _DTYPE.findall(entry) for _ in range(int(times or 1))]
        shapes = (tuple(int(size) for size in shape.split(",") if size.strip()) for shape in _SHAPE.findall(entry))
        yield from (Tensor(dtype, shape) for dtype, shape in zip(dtypes, shapes))
