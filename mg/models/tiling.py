"""`mg.tiling` for a model's tensors: the device sees one tile at a time, the host joins in float32."""

from collections.abc import Callable, Iterator, Sequence

import mindspore as ms
import numpy as np

from mg.tiling import Axis, stretches, tiled


def tiled_tensor(fn: Callable[[ms.Tensor], ms.Tensor], x: ms.Tensor, axes: Sequence[Axis]) -> ms.Tensor:
    """`mg.tiling.tiled` of a tensor. The result has the dtype of what `fn` returns."""
    on_host = _OnHost(fn, x.dtype)
    joined = tiled(on_host, x.astype(ms.float32).asnumpy(), axes)
    return ms.Tensor(joined, dtype=on_host.result_dtype)


def tensor_stretches(
    fn: Callable[[ms.Tensor], ms.Tensor],
    read: Callable[[int, int], np.ndarray],
    length: int,
    axes: Sequence[Axis],
) -> Iterator[ms.Tensor]:
    """`mg.tiling.stretches` as tensors; what is read is float32. They join to what `tiled_tensor` gives."""
    on_host = _OnHost(fn, ms.float32)
    for stretch in stretches(on_host, read, length, axes):
        yield ms.Tensor(np.ascontiguousarray(stretch), dtype=on_host.result_dtype)


class _OnHost:
    """A function of tensors as one of float32 arrays; it notes the dtype of what it gave."""

    def __init__(self, fn: Callable[[ms.Tensor], ms.Tensor], dtype):
        self.fn, self.dtype, self.result_dtype = fn, dtype, None

    def __call__(self, tile: np.ndarray) -> np.ndarray:
        result = self.fn(ms.Tensor(tile, dtype=self.dtype))
        self.result_dtype = result.dtype
        return result.astype(ms.float32).asnumpy()
