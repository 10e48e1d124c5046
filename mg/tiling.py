"""Tiling in space and time: where tiles are and how they blend. It knows nothing of models, only axes that shrink or
grow.

Each axis is planned separately and the axes are nested, the first outermost, so a video is cut in time first and each
piece then in space. Every tile runs alone and the host joins the results: the device only ever holds one tile, however
large the frame or long the video. This module only needs numpy; `mg.codec` applies it to models.

Where tiles overlap, the later one fades in along a LINEAR ramp, 0, 1/n, ... (n-1)/n over n samples, as in the Movie Gen
paper (section 3.1.1), Open-Sora's Video DC-AE and HunyuanVideo. Axes are blended one after the other, which gives a
bilinear ramp at corners. (The latter two blend in place, so there the tile to the left of a corner counts twice.)
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from mg.overlap import read_pieces

LAST_TILES = ("shift", "short")


def plan(length: int, tile: int, overlap: int = 0, last: str = "shift", align: int = 1) -> list[tuple[int, int]]:
    """Tiles as (start, stop) that cover [0, length) in order; each adds something that the previous ones lack.

    Tiles start at multiples of `tile - overlap`, and the last one ends at `length`. With last="short" it keeps its
    place and is cut short. With last="shift" it moves back until it is full, so that a compiled graph sees only one
    shape, and overlaps more; its start stays a multiple of `align`, so it may lack up to `align - 1` samples. Tiles
    without overlap never move, since that would make them overlap. A length of at most `tile` is one tile.
    """
    starts = [0]
    while starts[-1] + tile < length:
        starts.append(starts[-1] + tile - overlap)
    if last == "shift" and overlap and len(starts) > 1:
        starts[-1] = -(-(length - tile) // align) * align
    return [(start, min(start + tile, length)) for start in starts]


@dataclass(frozen=True)
class Axis:
    """How one axis is tiled, in samples of the tensor being cut, and how a model changes its length.

    Args:
        dim: position of the axis in the tensor, e.g. 2 for T of (B, C, T, H, W).
        tile: size of a tile.
        overlap: samples that neighbouring tiles share; 0 for none.
        last: shift | short, see `plan`.
        down: `down` samples become one, rounded up (an encoder).
        up: each sample becomes `up` (a decoder).
        lead: 1 if a model is causal and maps k * down + 1 samples to k + 1 (or k + 1 to k * up + 1): a tile then
            includes one extra sample at its start, whose result is dropped in every tile but the first.

    Raises:
        ValueError: a tile or overlap that isn't a multiple of `down`, or an overlap as large as the tile.
    """

    dim: int
    tile: int
    overlap: int = 0
    last: str = "shift"
    down: int = 1
    up: int = 1
    lead: int = 0

    def __post_init__(self):
        _check_sizes("tile", self.tile, "overlap", self.overlap, self.down)
        if self.last not in LAST_TILES:
            raise ValueError(f"last is {self.last!r}; it must be one of {', '.join(LAST_TILES)}")

    def plan(self, length: int) -> list[tuple[int, int]]:
        return plan(length, self.tile, self.overlap, self.last, self.down)

    def scaled(self, length: int) -> int:
        """The model's output length for `length` samples, not counting the lead on either side."""
        return -(-length // self.down) * self.up


def tiled(fn: Callable[[np.ndarray], np.ndarray], x: np.ndarray, axes: Sequence[Axis]) -> np.ndarray:
    """Run `fn` over every tile of `x` and join the results to the shape that `fn(x)` would have.

    Args:
        fn: takes a contiguous tile, returns an array with as many dimensions; untiled axes may change in any way.
        x: the array to cut.
        axes: outermost first.

    Raises:
        ValueError: `fn` returned a length that doesn't match the axis.
    """
    if not axes:
        return fn(np.ascontiguousarray(x))
    axis = axes[0]
    length = x.shape[axis.dim]
    wanted = axis.scaled(length - axis.lead) + axis.lead
    joined, end = None, 0  # `end`: how far the output is filled
    for stretch in stretches(fn, lambda start, stop: _along(x, axis.dim, start, stop), length, axes):
        size = stretch.shape[axis.dim]
        if size == wanted:
            return stretch
        if joined is None:
            shape = list(stretch.shape)
            shape[axis.dim] = wanted
            joined = np.empty(shape, stretch.dtype)
        _along(joined, axis.dim, end, end + size)[:] = stretch
        end += size
    return joined


def stretches(
    fn: Callable[[np.ndarray], np.ndarray],
    read: Callable[[int, int], np.ndarray],
    length: int,
    axes: Sequence[Axis],
    ahead: bool = False,
) -> Iterator[np.ndarray]:
    """`tiled` for an array that need not be in memory: read in pieces, and returned in pieces that join to its result.

    What precedes the next tile's start is final and is yielded as soon as this tile has run. Only one tile, plus its
    overlap with the next, is held at a time; with `ahead`, also the samples of the next one.

    Args:
        fn: as for `tiled`.
        read: returns samples [start, stop) along the first of `axes`; called once per tile, in order.
        length: samples along that axis.
        axes: one or more, outermost first.
        ahead: read the next tile's samples in a thread while `fn` runs.

    Yields:
        Pieces along the first axis, in order.

    Raises:
        ValueError: `fn` returned a length that doesn't match the axis.
    """
    axis, inner = axes[0], axes[1:]
    tiles = axis.plan(length - axis.lead)
    open_end = None  # end of the previous tile, over which this one fades in
    with closing(read_pieces(read, [(start, stop + axis.lead) for start, stop in tiles], ahead)) as samples:
        for (start, stop), following in zip(tiles, [*tiles[1:], None]):
            part = tiled(fn, next(samples), inner)
            expected = axis.scaled(stop - start) + axis.lead
            if part.shape[axis.dim] != expected:
                raise ValueError(
                    f"a tile of {stop - start + axis.lead} samples along dimension {axis.dim} came back with "
                    f"{part.shape[axis.dim]}; {expected} are right for down={axis.down}, up={axis.up}, lead={axis.lead}"
                )
            ready = expected if following is None else axis.scaled(following[0] - start) + axis.lead
            if start:
                part, ready = _along(part, axis.dim, axis.lead, None), ready - axis.lead
            if open_end is not None and open_end.shape[axis.dim]:
                part = _fade(open_end, part, axis.dim)
            yield _along(part, axis.dim, 0, ready)
            open_end = _along(part, axis.dim, ready, None)


def chunk_bounds(length: int, size: int | None) -> list[tuple[int, int]]:
    """(start, stop) of chunks of `size` without overlap, the last one possibly shorter; None makes one chunk."""
    size = size or length
    return [(start, min(start + size, length)) for start in range(0, length, size)]


@dataclass(frozen=True)
class TilingConfig:
    """Tiles of a video autoencoder, in VIDEO frames and pixels for encoding and decoding; defaults are Movie Gen's.

    Args:
        encode_tile: frames per tile when encoding; 0 encodes all frames at once, whatever the overlap.
        encode_overlap: frames that neighbouring tiles share when encoding.
        decode_tile: frames that a tile decodes to; 0 decodes all frames at once, whatever the overlap.
        decode_overlap: frames that neighbouring tiles share when decoding.
        spatial_tile: height and width of a tile in pixels; 0 leaves frames whole.
        spatial_overlap: pixels that neighbouring tiles share; by default a quarter of the tile, in whole latents.
        last: shift | short: the last tile moves back until it is full, or is cut short (DC-AE, HunyuanVideo).
    """

    encode_tile: int = 32
    encode_overlap: int = 0
    decode_tile: int = 32
    decode_overlap: int = 16
    spatial_tile: int = 0
    spatial_overlap: int | None = None
    last: str = "shift"

    @classmethod
    def from_tile_sizes(
        cls,
        temporal: int,
        spatial: int,
        use_spatial_tiling: bool = True,
        use_temporal_tiling: bool = True,
        spatial_tile_size: int = 256,
        temporal_tile_size: int = 32,
        tile_overlap_factor: float = 0.25,
    ) -> "TilingConfig":
        """Tiles from the options of Open-Sora's configs, for a model that compresses by `temporal` and `spatial`.

        Args:
            use_spatial_tiling: cut frames into tiles.
            use_temporal_tiling: cut the video into tiles along time.
            spatial_tile_size: height and width of a tile in pixels.
            temporal_tile_size: frames of a tile.
            tile_overlap_factor: fraction of a tile that overlaps the next one, rounded down to whole latents.

        Raises:
            ValueError: a size in use that isn't a multiple of the compression, or a factor outside [0, 1).
        """
        if not 0 <= tile_overlap_factor < 1:
            raise ValueError(f"tile_overlap_factor is {tile_overlap_factor}; it must be at least 0 and below 1")
        rows = spatial_tile_size if use_spatial_tiling else 0
        frames = temporal_tile_size if use_temporal_tiling else 0
        if use_spatial_tiling:
            _check_multiple("spatial_tile_size", rows, spatial)
        if use_temporal_tiling:
            _check_multiple("temporal_tile_size", frames, temporal)
        shared_rows = int(rows // spatial * tile_overlap_factor) * spatial
        shared_frames = int(frames // temporal * tile_overlap_factor) * temporal
        return cls(frames, shared_frames, frames, shared_frames, rows, shared_rows, last="short")

    def encode_axes(self, temporal: int, spatial: int, lead: int = 0) -> list[Axis]:
        """Axes of a video (B, C, T, H, W) to encode, for a model that compresses by `temporal` and `spatial`.

        Raises:
            ValueError: a size that does not fit that compression; the message names the field.
        """
        shared = self._checked_spatial_overlap(temporal, spatial)
        axes = []
        if self.encode_tile:
            axes += [Axis(2, self.encode_tile, self.encode_overlap, self.last, down=temporal, lead=lead)]
        if self.spatial_tile:
            axes += [Axis(d, self.spatial_tile, shared, self.last, down=spatial) for d in (3, 4)]
        return axes

    def decode_axes(self, temporal: int, spatial: int, lead: int = 0) -> list[Axis]:
        """Axes of latents (B, z, t, h, w) to decode; raises as `encode_axes` does."""
        shared = self._checked_spatial_overlap(temporal, spatial)
        axes = []
        if self.decode_tile:
            tile, overlap = self.decode_tile // temporal, self.decode_overlap // temporal
            axes += [Axis(2, tile, overlap, self.last, up=temporal, lead=lead)]
        if self.spatial_tile:
            tile, overlap = self.spatial_tile // spatial, shared // spatial
            axes += [Axis(d, tile, overlap, self.last, up=spatial) for d in (3, 4)]
        return axes

    def _checked_spatial_overlap(self, temporal: int, spatial: int) -> int:
        shared = self.spatial_overlap
        if shared is None:
            shared = self.spatial_tile // 4 // spatial * spatial
        if self.encode_tile:
            _check_sizes("encode_tile", self.encode_tile, "encode_overlap", self.encode_overlap, temporal)
        if self.decode_tile:
            _check_sizes("decode_tile", self.decode_tile, "decode_overlap", self.decode_overlap, temporal)
        if self.spatial_tile:
            _check_sizes("spatial_tile", self.spatial_tile, "spatial_overlap", shared, spatial)
        elif shared:
            raise ValueError(f"spatial_overlap is {shared}, spatial_tile 0: whole frames share nothing")
        return shared


def _check_multiple(name: str, size: int, multiple: int) -> None:
    if size <= 0 or size % multiple:
        raise ValueError(f"{name} is {size}; it must be a positive multiple of {multiple}")


def _check_sizes(tile_name: str, tile: int, overlap_name: str, overlap: int, multiple: int) -> None:
    _check_multiple(tile_name, tile, multiple)
    if not 0 <= overlap < tile or overlap % multiple:
        raise ValueError(
            f"{overlap_name} is {overlap}; it must be a multiple of {multiple} from 0 to {tile - multiple}, "
            f"since {tile_name} is {tile}"
        )


def _along(x: np.ndarray, dim: int, start: int, stop: int | None) -> np.ndarray:
    return x[(slice(None),) * dim + (slice(start, stop),)]


def _fade(standing: np.ndarray, part: np.ndarray, dim: int) -> np.ndarray:
    """Fade `part` in over the end of the previous part, with which it overlaps."""
    shared = standing.shape[dim]
    ramp = (np.arange(shared, dtype=np.float32) / shared).reshape(-1, *[1] * (part.ndim - 1 - dim))
    fading = _along(part, dim, 0, shared)
    # In this form equal values stay equal to the last bit.
    faded = (standing + ramp * (fading - standing)).astype(part.dtype)
    return np.concatenate([faded, _along(part, dim, shared, None)], axis=dim)
