"""Which of several equal computations a layer takes.

By default it is the one with the fewest products: a kernel behind nearest neighbour works on the small grid, a kernel
in time on a single frame is one of a single frame, two 1x1 convolutions in a row are one. The other is `plain`: every
operation as the papers write it, which is what the former are measured and tested against.

For another engine layers compile to operators that say what they compute, `exporting`, not to what is fastest here.
"""

import contextlib
from collections.abc import Iterator

from mindspore import nn

from mg.models.layers.precision import PrecisionCell


def set_plain(network: nn.Cell, plain: bool = True) -> nn.Cell:
    """Let `network` compute as the papers write it, or not. Results are equal to rounding.

    A graph that is compiled already stays as it is: call this before the first use.
    """
    for cell in _layers(network):
        cell.plain = plain
    return network


@contextlib.contextmanager
def exporting(network: nn.Cell) -> Iterator[None]:
    """Within it layers compile for another engine; such a graph may hold operators that the device here cannot run."""
    before = [(cell, cell.on_cpu) for cell in _layers(network)]
    for cell, _ in before:
        cell.exporting, cell.on_cpu = True, False
    try:
        yield
    finally:
        for cell, on_cpu in before:
            cell.exporting, cell.on_cpu = False, on_cpu


def _layers(network: nn.Cell) -> Iterator[PrecisionCell]:
    return (cell for _, cell in network.cells_and_names() if isinstance(cell, PrecisionCell))
