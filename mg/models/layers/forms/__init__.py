"""Forms of the layers: the paper's, and equivalent ones that suit a device better.

    set_form(model, "paper")

`mg.models.layers` has each layer in its paper's form. This table has others for CPUs, Ascend and export; a model gets
its device's form when it is built. All have the same parameters and compute the same, to rounding.

    paper            as the papers write it, MindSpore's Conv3D for every convolution; runs on CPUs, for comparison
    cpu              frames first and 2-D convolutions with fewer products; for CPUs, and GPUs (MindSpore's plugin)
    ascend           the paper's operations in aclnn operators
    ascend_folded    the same, but upsampling on the grid before nearest neighbour: fewer products, more operators
    export           for other engines: standard operators
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
    """Make the layers of `network` compute in one of `FORMS`, by default that of the current device.

    A graph that is already compiled does not change: call this before the first use.

    Args:
        standard_layout: pick a default form that works on (B, C, T, H, W); for networks without `Enter` and `Leave`.

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
    """`set_form` for a `with` block; afterwards every layer has its previous form again."""
    before = [(cell, type(cell)) for _, cell in network.cells_and_names()]
    try:
        set_form(network, form)
        yield
    finally:
        for cell, kind in before:
            _put(cell, kind)


def _put(cell: nn.Cell, kind: type[nn.Cell]) -> None:
    """Change `cell` to another class with the same parameters; `prepare` sets up anything else it needs."""
    if type(cell) is not kind:
        object.__setattr__(cell, "__class__", kind)
        if hasattr(cell, "prepare"):
            cell.prepare()
