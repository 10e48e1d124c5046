"""Batches of clips of one shape, and what becomes of the others when a batch or one of its clips fails."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from mg import runtime
from mg.data.clips import GRID, Clip, read_clips
from mg.data.errors import sparing
from mg.data.index import IndexRow
from mg.inference.loading import ClipsConfig

T = TypeVar("T")


def batches(
    rows: list[IndexRow], config: ClipsConfig, on_error: Callable[[int, Exception], None], grid: int = GRID
) -> Iterator[tuple[list[Clip], np.ndarray]]:
    """The clips of an index in batches of one shape, with a progress bar.

    Args:
        on_error: called with the number of a row that cannot be read; the others continue.
        grid: bucket sizes are multiples of this.

    Yields:
        The clips of a batch and x (B, 3, T, H, W), in which the last clip may be repeated: see `group_by_shape`.
    """
    with tqdm(total=len(rows), desc="clips", unit="clip") as progress, runtime.CtrlC() as ctrl_c:

        def failed(index: int, error: Exception) -> None:
            on_error(index, error)
            progress.update()

        for batch, size in group_by_shape(read_clips(rows, config, failed, grid), config.batch_size):
            yield batch, np.stack([clip.x for clip in batch] + [batch[-1].x] * (size - len(batch)))
            progress.update(len(batch))
            ctrl_c.check()


def group_by_shape(clips: Iterable[Clip], batch_size: int) -> Iterator[tuple[list[Clip], int]]:
    """Batches of clips of one shape, each with the size it should be run at: `batch_size`, or that of the clips.

    A shape keeps the size of its first batch, and a smaller one later should be padded to it, so that a compiled model
    sees one batch shape per clip shape. At most 4 times the largest batch size are held back.
    """
    waiting: dict[tuple, list[Clip]] = {}
    sizes: dict[tuple, int] = {}
    largest = batch_size

    def take(kind: tuple) -> tuple[list[Clip], int]:
        batch = waiting.pop(kind)
        return batch, sizes.setdefault(kind, len(batch))

    for clip in clips:
        wanted = clip.batch_size or batch_size
        largest, kind = max(largest, wanted), (clip.x.shape, wanted)
        waiting.setdefault(kind, []).append(clip)
        if len(waiting[kind]) == sizes.get(kind, wanted):
            yield take(kind)
        elif sum(map(len, waiting.values())) >= 4 * largest:
            yield take(next(iter(waiting)))  # the shape that has waited longest
    while waiting:
        yield take(next(iter(waiting)))


def spared(
    compute: Callable[[list[Clip], np.ndarray], T],
    batch: list[Clip],
    x: np.ndarray,
    on_error: Callable[[int, Exception], None],
) -> Iterator[tuple[list[Clip], T]]:
    """The result of `compute` for a batch; if that fails, say out of memory, of each clip separately, so that one clip
    doesn't fail the others.

    Args:
        compute: function of the clips and their x (B, 3, T, H, W), which may be padded after them.
        on_error: called with the row number of a clip that fails on its own, too.
    """
    failed: list[Exception] = []
    with sparing(failed.append):
        made = compute(batch, x)
    if not failed:
        yield batch, made
    elif len(batch) == 1 == len(x):
        on_error(batch[0].index, failed[0])
    else:
        for clip in batch:
            yield from spared(compute, [clip], clip.x[None], on_error)
