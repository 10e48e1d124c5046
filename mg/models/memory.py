"""How much memory it takes to run a model on a clip: told before it is run, from what was measured.

A network's memory grows with the pixels that it sees at once and with its width at full resolution. `MEASURED` has the
bytes for a pixel and a channel of that width, on a CPU in fp32, in graph mode, with half as much again as
`mg-benchmark-memory --models ...` finds: wide models take more than the ones that it measures, which are half as wide.
Devices take less than a CPU: they need no copies in other layouts.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from mg.models.autoencoder import VideoAutoencoder
from mg.tiling import TilingConfig

PARTS = ("encode", "decode")


class Footprint(NamedTuple):
    """Of a model: bytes per pixel and channel of each part, and how many channels it has at full resolution, by its
    config."""

    encode: float
    decode: float
    width: Callable[[dict], int]


MEASURED = {
    "tae": Footprint(75, 75, lambda config: config["ch"]),
    "image_vae": Footprint(30, 45, lambda config: config["ch"]),
    "dc_ae": Footprint(60, 60, lambda config: max(config["encoder_width_list"][0], config["decoder_width_list"][0])),
    "hunyuan_vae": Footprint(60, 75, lambda config: config["block_out_channels"][0]),
    "temporal_vae": Footprint(20, 20, lambda config: max(config["spatial_block_out_channels"][0], config["filters"])),
}
OP_BY_OP = 0.9  # times what a compiled graph takes
COMPILED, NOT_COMPILED = 600 * 2**20, 150 * 2**20  # bytes that a part takes whatever its clip, compiled or op by op
CLIP = 12 * 6  # bytes per pixel of the whole clip on the host: three float32 of it, and of what becomes of it
SCORES = 2**30  # bytes that attention has at most at once, of scores, and of what the softmax makes of them

# Tiles to try: heights and widths in pixels, and by what frames are divided.
SIZES = (256, 192, 128, 96, 64)
FRACTIONS = (1, 2, 4, 8)


def bytes_needed(
    model: VideoAutoencoder,
    shape: tuple[int, ...],
    tiling: TilingConfig | None,
    parts: Sequence[str] = PARTS,
    op_by_op: bool = False,
) -> int | None:
    """About how many bytes it takes to run `model` on clips (B, 3, T, H, W), beyond the model itself; None for a model
    of which nothing is known.

    Args:
        tiling: None for whole clips.
        parts: encode, decode; of several the most counts, since they come one after the other.
    """
    footprint = MEASURED.get(model.name)
    if footprint is None:
        return None
    most, fixed = 0.0, len(parts) * (NOT_COMPILED if op_by_op else COMPILED)
    for part in parts:
        batch, _, frames, height, width = tile_shape(model, shape, tiling, part)
        pixels = batch * frames * height * width
        network = getattr(footprint, part) * footprint.width(model.config) * pixels * (OP_BY_OP if op_by_op else 1)
        _, _, t, h, w = model.latent_shape((batch, 3, frames, height, width))
        scores = min(SCORES, 4 * batch * t * (h * w) ** 2)
        most = max(most, network + (3 if op_by_op else 2) * scores)  # scaled ones stay while the softmax is made
    return int(most + fixed) + clip_bytes(shape)


def clip_bytes(shape: tuple[int, ...]) -> int:
    """About how many bytes clips (B, C, T, H, W), and what becomes of them, take on the host."""
    b, _, t, h, w = shape
    return CLIP * b * t * h * w


def tile_shape(
    model: VideoAutoencoder, shape: tuple[int, ...], tiling: TilingConfig | None, part: str
) -> tuple[int, ...]:
    """What the network sees of clips (B, C, T, H, W) at once, in pixels: all of it, padded, or a tile."""
    b, c, t, h, w = shape
    t, h, w = (size + missing for size, missing in zip((t, h, w), model.geometry.missing(shape)))
    if tiling is not None:
        frames = getattr(tiling, f"{part}_tile")
        t = min(t, frames + model.geometry.lead) if frames else t
        h, w = (min(size, tiling.spatial_tile or size) for size in (h, w))
    return b, c, min(t, model.geometry.chunk or t), h, w


def tilings(model: VideoAutoencoder, given: dict) -> list[TilingConfig]:
    """Tilings of `model`, the one to be preferred first: from its own tiles down to an eighth of their frames and to 64
    pixels. What is `given` stays.

    256 pixels with all of the frames, what models are trained on, come before fewer frames; of a model whose frames
    know nothing of each other fewer frames come first, which change nothing.
    """
    default, step = model.default_tiling, model.temporal_compression
    sizes = [default.spatial_tile, *(size for size in SIZES if size < (default.spatial_tile or size + 1))]
    if "spatial_tile" in given:
        sizes = [given["spatial_tile"]]
    times = [_fewer_frames(default, step, factor) for factor in FRACTIONS]
    pairs = [(time, size) for time in times for size in sizes]
    if step == 1:
        pairs = [(time, size) for size in sizes for time in times]
    found: dict[TilingConfig, None] = {}
    for time, size in pairs:
        tiling = replace(default, **{**time, "spatial_tile": size, "spatial_overlap": None, **given})
        try:
            for axes in (tiling.encode_axes, tiling.decode_axes):
                axes(step, model.spatial_compression, model.geometry.lead)
        except ValueError:  # a size that this model cannot have, or not beside what is given
            continue
        found[tiling] = None
    return list(found)


def _fewer_frames(default: TilingConfig, step: int, factor: int) -> dict[str, int]:
    """The tiles along time and what they share, divided by `factor`, in whole latents."""
    fields = ("encode_tile", "encode_overlap", "decode_tile", "decode_overlap")
    return {name: getattr(default, name) // factor // step * step for name in fields}
