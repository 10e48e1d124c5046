"""The form that layers take in a graph that other engines will run."""

import contextlib
from collections.abc import Iterator

from mindspore import nn


@contextlib.contextmanager
def exporting(network: nn.Cell) -> Iterator[None]:
    """Within it, layers compile to operators that say what they compute, not to what is fastest on this device.

    It sets the attribute `exporting` of every cell that has one. A graph compiled within may hold operators that the
    device in use cannot run.
    """
    cells = [cell for _, cell in network.cells_and_names() if hasattr(cell, "exporting")]
    for cell in cells:
        cell.exporting = True
    try:
        yield
    finally:
        for cell in cells:
            cell.exporting = False
