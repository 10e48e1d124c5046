"""Forms of the layers: the paper's, and equal ones that suit a device better.

    set_form(model, "paper")

`mg.models.layers` has each layer in its paper's form. Here is a table of others for a CPU, for Ascend and for export;
a model takes the one of its device when it is built. All have the same parameters and give the same, to rounding.

    paper            as the papers write it, MindSpore's Conv3D for every convolution; runs on CPUs, for comparison
    cpu              frames first and 2-D convolutions of few products; for CPUs, and GPUs through MindSpore's plugin
    ascend           the paper's operations in aclnn operators
    ascend_folded    the same, but on the small grid behind nearest neighbour: fewer products, more operators
    export           for other engines: operators that say what they compute
"""

import contextlib
from collections.abc import Iterator

from mindspore import nn

from mg import runtime
from mg.models.layers.forms import ascend, cpu, export

FORMS: dict[str, dict[type[nn.Cell], type[nn.Cell]]] = {
    "paper": {},
    "cpu": cpu.LAYERS,
    "ascend": ascend.LAYERS,
    "ascend_folded": {**ascend.LAYERS, **ascend.FOLDED},
    "export": export.LAYERS,
}
_OF_DEVICE = {"cpu": "cpu", "gpu": "cpu", "ascend": "ascend"}
_OF_DEVICE_IN_STANDARD_LAYOUT = {"cpu": "paper", "gpu": "paper", "ascend": "ascend"}
_PAPER = {form: paper for table in FORMS.values() for paper, form in table.items()}


def set_form(network: nn.Cell, form: str | None = None, standard_layout: bool = False) -> nn.Cell:
    """Let the layers of `network` compute in one of `FORMS`, by default that of the device in use.

    A graph that is compiled already stays as it is: call this before the first use.

    Args:
        standard_layout: by default, one whose layers work on (B, C, T, H, W); for networks without `Enter` and `Leave`.

    Raises:
        ValueError: an unknown form.
    """
    if form is None:
        form = (_OF_DEVICE_IN_STANDARD_LAYOUT if standard_layout else _OF_DEVICE)[runtime.device()]
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(FORMS)}")
    for _, cell in list(network.cells_and_names()):
        paper = _PAPER.get(type(cell), type(cell))
        _put(cell, FORMS[form].get(paper, paper))
    return network


@contextlib.contextmanager
def in_form(network: nn.Cell, form: str) -> Iterator[None]:
    """`set_form` for a `with` block; behind it every layer has the form that it had."""
    before = [(cell, type(cell)) for _, cell in network.cells_and_names()]
    try:
        set_form(network, form)
        yield
    finally:
        for cell, kind in before:
            _put(cell, kind)


def _put(cell: nn.Cell, kind: type[nn.Cell]) -> None:
    """Make `cell` one of another class, which has the same parameters; `prepare` gives it what else it needs."""
    if type(cell) is not kind:
        object.__setattr__(cell, "__class__", kind)
        if hasattr(cell, "prepare"):
            cell.prepare()
