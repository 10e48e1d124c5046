"""Flat tensors hold every parameter's values in their order, and give each of them back."""

import numpy as np
import pytest
from mindspore import Parameter, ParameterTuple, Tensor, nn

from mg.training import flat
from mg.training.flat import ROW, flats

SHAPES = [(3, 2), (4,), (1, ROW - 10), (5, 1, 2), (2 * ROW,)]


class Round(nn.Cell):
    """Joins parameters in flat tensors, and gives these, what is taken out of them, and their sums of squares."""

    def __init__(self, layouts, parameters):
        super().__init__(auto_prefix=False)
        self.layouts, self.parameters = nn.CellList(layouts, auto_prefix=False), parameters

    def construct(self):
        joined, parts, sums = (), (), ()
        for layout in self.layouts:
            values = layout.join(self.parameters)
            joined, parts, sums = joined + (values,), parts + layout.split(values), sums + (layout.square_sum(values),)
        return joined, parts, sums


def test_no_flat_tensor_joins_more_than_32():
    """CANN's limit; there may be zeros behind the last one."""
    layouts = flats([Parameter(Tensor(np.zeros(3, np.float32)), name=f"p{i}") for i in range(70)])
    assert [len(layout.parameters) + len(layout.padding) for layout in layouts] == [32, 32, 9]


@pytest.mark.parametrize("largest, rows", [(flat.LARGEST, [4]), (ROW, [1, 1, 2]), (1, [1, 1, 1, 1, 2])])
def test_tensors_come_back_as_they_were(mode, monkeypatch, largest, rows):
    monkeypatch.setattr(flat, "LARGEST", largest)
    rng = np.random.default_rng(0)
    values = {f"p{i}": rng.standard_normal(shape).astype(np.float32) for i, shape in enumerate(SHAPES)}
    parameters = ParameterTuple([Parameter(Tensor(value), name=name) for name, value in values.items()])
    layouts = flats(parameters)
    assert [layout.rows for layout in layouts] == rows
    joined, parts, sums = Round(layouts, parameters)()
    for part, value in zip(parts, values.values(), strict=True):
        np.testing.assert_array_equal(part.asnumpy(), value)
    found = {}
    for layout, tensor, square_sum in zip(layouts, joined, sums, strict=True):
        assert tensor.shape == (layout.rows, ROW)
        for same in (layout.values(), layout.from_arrays(values)):
            np.testing.assert_array_equal(same.asnumpy(), tensor.asnumpy())
        found |= layout.to_arrays(tensor)
        assert float(square_sum.asnumpy()) == pytest.approx(float((tensor.asnumpy().astype(float) ** 2).sum()))
    assert found.keys() == values.keys()
    for name, value in values.items():
        np.testing.assert_array_equal(found[name], value)
