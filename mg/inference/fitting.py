"""Decide whether clips run whole or in tiles by the available memory, before a shape first runs.

A kernel that runs out of memory kills the process silently, and the remaining clips are lost. So a clip that doesn't
fit, as far as `mg.models.memory` can tell, is not tried.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import TypeVar

from mg import runtime
from mg.memory import resident
from mg.models import VideoAutoencoder
from mg.models.memory import PARTS, bytes_needed, clip_bytes, tile_shape, tilings
from mg.plain_text import one_line
from mg.tiling import TilingConfig

T = TypeVar("T")

_logger = logging.getLogger(__name__)

GB = 10**9
SHARE = 0.9  # of free memory, to leave some for others


class DoesNotFit(ValueError):
    """There is not enough memory for a clip; the message says how much it needs and what would help."""


class Fitting:
    """Runs clips through models, each whole or in tiles.

    Args:
        enable_tile: auto: whole if that fits, otherwise in the largest tiles that do; false: whole, true: in tiles, and
            a clip that doesn't fit is an error. A model that already has tiling enabled keeps it.
        given: fields of `TilingConfig` that tiles should have.
        max_memory: GB that a clip may use; by default what is free when its shape first comes.
    """

    _at_start: int | None = None  # bytes that the process had before any clip

    def __init__(self, enable_tile: bool | str = "auto", given: dict | None = None, max_memory: float | None = None):
        self._auto, self._given, self._max = enable_tile == "auto", given or {}, max_memory
        self._own: dict[int, TilingConfig | None] = {}  # the tiling that each model came with
        self._settled: dict[tuple, TilingConfig | None] = {}
        self._compiled: dict[int, set[tuple]] = {}  # what each model has compiled graphs for
        if Fitting._at_start is None:
            Fitting._at_start = resident() or 0

    def run(
        self, model: VideoAutoencoder, shape: tuple[int, ...], call: Callable[[], T], parts: Sequence[str] = PARTS
    ) -> T:
        """The result of `call`, which must run `model` on clips of a shape (B, 3, T, H, W) and wait until it is done.

        Raises:
            DoesNotFit: there is no memory for the clips; they were not tried.
        """
        self.settle(model, shape, parts)
        try:
            return call()
        except (RuntimeError, MemoryError) as error:
            if not self._auto or shape[0] > 1 or model.tiling is not None or not _is_of_memory(error):
                raise
            _logger.warning("%s: clips of %s do not run whole: %s", model.name, _sizes(shape), one_line(error)[:200])
        self._choose(model, shape, parts, _halving(model, shape, parts, tilings(model, self._given)))
        try:
            return call()
        except Exception:  # then memory was not the cause
            self._settled[id(model), shape, parts] = None
            raise

    def settle(
        self, model: VideoAutoencoder, shape: tuple[int, ...], parts: Sequence[str] = PARTS, streams: bool = False
    ) -> str:
        """Set up `model` to run clips of a shape (B, 3, T, H, W) whole or in tiles, whichever fits.

        Args:
            parts: encode, decode: what will run.
            streams: the clip is processed in pieces along time, never whole.

        Returns:
            The text of `described`.

        Raises:
            DoesNotFit: there is no memory for it either way.
        """
        own = self._own.setdefault(id(model), model.tiling)
        if (id(model), shape, parts) not in self._settled:
            first = own
            if streams and own is None:
                first = replace(model.default_tiling, **{"spatial_tile": 0, "spatial_overlap": None, **self._given})
            self._choose(model, shape, parts, [first], may_tile=self._auto and own is None)
        tiling = self._settled[id(model), shape, parts]
        _apply(model, tiling)
        return described(tiling)

    def _choose(
        self,
        model: VideoAutoencoder,
        shape: tuple[int, ...],
        parts: Sequence[str],
        choices: list[TilingConfig | None],
        may_tile: bool = False,
    ) -> None:
        """Pick the first of `choices` that fits; if none does and `may_tile`, fall back to tiles."""
        free = self._free()
        needs = self._needs(model, shape, parts, choices)
        if shape[0] > 1 and not _fits(needs[0], free):  # they may one by one
            raise DoesNotFit(f"{shape[0]} clips of {_sizes(shape)} at once do not fit into {_gb(free)} of memory")
        if may_tile and not _fits(needs[0], free):
            choices = [*choices, *tilings(model, self._given)]
            needs = self._needs(model, shape, parts, choices)
        if not any(_fits(need, free) for need in needs) and self._compiled.pop(id(model), None):
            runtime.forget_graphs(model)
            self._settled = {key: tiling for key, tiling in self._settled.items() if key[0] != id(model)}
            free, needs = self._free(), self._needs(model, shape, parts, choices)
        number = next((number for number, need in enumerate(needs) if _fits(need, free)), None)
        if number is None:
            raise DoesNotFit(self._explain(shape, choices, needs, free))
        self._settled[id(model), shape, parts] = choices[number]
        if runtime.is_graph_mode():
            self._compiled.setdefault(id(model), set()).update(_graphs(model, shape, parts, choices[number]))
        _apply(model, choices[number])
        takes = "" if needs[number] is None else f", about {_gb(needs[number])} of memory"
        if number:
            takes += f"; {described(choices[0])} it would be {_gb(needs[0])}, and {_gb(free)} are free"
        _logger.info("%s: clips of %s run %s%s", model.name, _sizes(shape), described(choices[number]), takes)

    def _needs(
        self, model: VideoAutoencoder, shape: tuple[int, ...], parts: Sequence[str], choices: list[TilingConfig | None]
    ) -> list[int | None]:
        """Bytes that each of `choices` needs; if its graphs have run, which keep their memory, only the clip's."""
        compiled, op_by_op = self._compiled.get(id(model), set()), not runtime.is_graph_mode()
        return [
            clip_bytes(shape)
            if _graphs(model, shape, parts, tiling) <= compiled
            else bytes_needed(model, shape, tiling, parts, op_by_op)
            for tiling in choices
        ]

    def _free(self) -> float | None:
        """Bytes that a clip may use. Memory that earlier clips used op by op stays with this process and is reused;
        that of a compiled graph stays with the graph."""
        if self._max is not None:
            return self._max * GB
        free = runtime.free_memory()
        if free is None or runtime.device() != "cpu":
            return free
        again = 0 if runtime.is_graph_mode() else max(0, (resident() or 0) - (self._at_start or 0))
        return SHARE * (free + again)

    def _explain(
        self, shape: tuple[int, ...], choices: list[TilingConfig | None], needs: list[int | None], free: float | None
    ) -> str:
        said = f"a clip of {_sizes(shape)} takes about {_gb(needs[0])} of memory {described(choices[0])}"
        if len(choices) > 1:
            least = min(range(len(choices)), key=lambda number: needs[number])
            said += f" and {_gb(needs[least])} {described(choices[least])}, the least possible"
        if choices[-1] is None:
            helps = "--enable_tile auto runs it in tiles"
        elif len(choices) > 1 and not self._given:
            helps = "take fewer or smaller frames (--num_frames, --image_size)"
        else:
            helps = "give smaller tiles (--tiling.spatial_tile, --tiling.encode_tile, --tiling.decode_tile)"
        return f"{said}; {_gb(free)} are free: {helps}, or set --max_memory GB if it may use more"


def _fits(need: int | None, free: float | None) -> bool:
    return need is None or free is None or need <= free


def _graphs(
    model: VideoAutoencoder, shape: tuple[int, ...], parts: Sequence[str], tiling: TilingConfig | None
) -> set[tuple]:
    """What graphs are compiled for: parts and the shapes they process at once."""
    return {(part, tile_shape(model, shape, tiling, part)) for part in parts}


def _halving(
    model: VideoAutoencoder, shape: tuple[int, ...], parts: Sequence[str], choices: list[TilingConfig]
) -> list[TilingConfig | None]:
    """The choices whose tiles have at most half the pixels of a clip; if there are none, the last one."""

    def pixels(tiling: TilingConfig | None) -> int:
        return max(prod(tile_shape(model, shape, tiling, part)) for part in parts)

    return [tiling for tiling in choices if 2 * pixels(tiling) <= pixels(None)] or choices[-1:]


def described(tiling: TilingConfig | None) -> str:
    """How clips run: whole, or in tiles of frames x height x width of the video."""
    if tiling is None:
        return "whole"
    frames = max(tiling.encode_tile, tiling.decode_tile)
    sizes = [str(size) for size in (frames, tiling.spatial_tile, tiling.spatial_tile) if size]
    return f"in tiles of {'x'.join(sizes)}{' frames' if len(sizes) == 1 else ' pixels' if len(sizes) == 2 else ''}"


def _apply(model: VideoAutoencoder, tiling: TilingConfig | None) -> None:
    if tiling is None:
        model.disable_tiling()
    elif model.tiling != tiling:
        model.enable_tiling(**vars(tiling))


def _is_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "memory" in str(error).lower()


def _sizes(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape[2:]))


def _gb(amount: float) -> str:
    return f"{amount / GB:.1f} GB"
