"""How much memory a model needs for a clip, estimated from measurements before it runs.

A network's memory grows with the pixels that it sees at once and with its width at full resolution. `MEASURED` has the
bytes per pixel and channel of that width, on a CPU in fp32 and graph mode, at 1.5 times what
`mg-benchmark-memory --models ...` finds: wide models need more than the half as wide ones that it measures. Devices
need less than a CPU, since they make no copies in other layouts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from mg.models.autoencoder import VideoAutoencoder
from mg.tiling import TilingConfig

PARTS = ("encode", "decode")


class Footprint(NamedTuple):
    """A model's bytes per pixel and channel for each part, and its number of channels at full resolution, from its
    config."""

    encode: float
    decode: float
    width: Callable[[Mapping], int]


MEASURED = {
    "tae": Footprint(75, 75, lambda config: config["ch"]),
    "image_vae": Footprint(30, 45, lambda config: config["ch"]),
    "dc_ae": Footprint(60, 60, lambda config: max(config["encoder_width_list"][0], config["decoder_width_list"][0])),
    "hunyuan_vae": Footprint(60, 75, lambda config: config["block_out_channels"][0]),
    "temporal_vae": Footprint(20, 20, lambda config: max(config["spatial_block_out_channels"][0], config["filters"])),
}
OP_BY_OP = 0.9  # relative to a compiled graph
COMPILED, NOT_COMPILED = 700 * 2**20, 150 * 2**20  # bytes that a part needs for any clip, compiled or op by op
CLIP = 12 * 6  # bytes per pixel of the whole clip on the host: three float32 values, for the clip and for its result
SCORES = 2**30  # maximum bytes of attention scores, and of their softmax, at once

# Tiles to try: heights and widths in pixels, and divisors of the frames.
SIZES = (256, 192, 128, 96, 64)
FRACTIONS = (1, 2, 4, 8)


def bytes_needed(
    model: VideoAutoencoder,
    shape: tuple[int, ...],
    tiling: TilingConfig | None,
    parts: Sequence[str] = PARTS,
    op_by_op: bool = False,
) -> int | None:
    """About how many bytes `model` needs to run on clips (B, 3, T, H, W), in addition to the model itself; None for an
    unknown model.

    Args:
        tiling: None for whole clips.
        parts: encode, decode; the maximum counts, since they run one after the other.
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
        most = max(most, network + (3 if op_by_op else 2) * scores)  # scaled scores stay during the softmax
    return int(most + fixed) + clip_bytes(shape)


def clip_bytes(shape: tuple[int, ...]) -> int:
    """About how many bytes clips (B, C, T, H, W) and their results take on the host."""
    b, _, t, h, w = shape
    return CLIP * b * t * h * w


def tile_shape(
    model: VideoAutoencoder, shape: tuple[int, ...], tiling: TilingConfig | None, part: str
) -> tuple[int, ...]:
    """The shape in pixels that the network sees at once of clips (B, C, T, H, W): the padded clip, or a tile."""
    b, c, t, h, w = shape
    t, h, w = (size + missing for size, missing in zip((t, h, w), model.geometry.missing(shape)))
    if tiling is not None:
        frames = getattr(tiling, f"{part}_tile")
        t = min(t, frames + model.geometry.lead) if frames else t
        h, w = (min(size, tiling.spatial_tile or size) for size in (h, w))
    return b, c, min(t, model.geometry.chunk or t), h, w


def tilings(model: VideoAutoencoder, given: dict) -> list[TilingConfig]:
    """Tilings of `model` in order of preference: from its default tiles down to an eighth of their frames and to 64
    pixels. Fields that are `given` are fixed.

    256 pixels with all frames, as in training, come before fewer frames; for a model whose frames are independent,
    fewer frames come first, since they change nothing.
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
        except ValueError:  # a size that doesn't fit this model, or the given fields
            continue
        found[tiling] = None
    return list(found)


def _fewer_frames(default: TilingConfig, step: int, factor: int) -> dict[str, int]:
    """The tiles along time and their overlaps, divided by `factor`, in whole latents."""
    fields = ("encode_tile", "encode_overlap", "decode_tile", "decode_overlap")
    return {name: getattr(default, name) // factor // step * step for name in fields}
