"""Which of several equal computations a layer takes.

By default it is the one with the fewest products: a kernel behind nearest neighbour works on the small grid, a kernel in
time on a single frame is one of a single frame, two 1x1 convolutions in a row are one. The other is `plain`: every
operation as the papers write it, which is what the former are measured and tested against.
"""

from mindspore import nn

from mg.models.layers.precision import PrecisionCell


def set_plain(network: nn.Cell, plain: bool = True) -> nn.Cell:
    """Let `network` compute as the papers write it, or not. Results are equal to rounding.

    A graph that is compiled already stays as it is: call this before the first use.
    """
    for _, cell in network.cells_and_names():
        if isinstance(cell, PrecisionCell):
            cell.plain = plain
    return network
