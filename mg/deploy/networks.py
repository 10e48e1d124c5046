"""The networks of a model that an engine runs, each at the shape of one tile."""

from dataclasses import replace

from mindspore import nn

from mg.models import VideoAutoencoder
from mg.tiling import TilingConfig


class _Network(nn.Cell):
    """One of a model's functions as a cell.

    Args:
        model: part of the cell, so that the cell has its parameters.
        function: the name of a method of `model`.
        settings: further arguments of that method.
    """

    def __init__(self, model: nn.Cell, function: str, *settings):
        super().__init__()
        self.model, self.settings = model, settings
        self.function = getattr(model, function)

    def construct(self, x):
        return self.function(x, *self.settings)


def networks_of(model: VideoAutoencoder, frames: int, size: int) -> dict[str, tuple[nn.Cell, tuple[int, ...]]]:
    """The networks that `encode` and `decode` of a tile run, by name, each with its input shape.

    Args:
        frames, size: of a tile, as checked by `tiling_of`.
    """
    rows, channels = size // model.spatial_compression, model.config["in_channels"]
    if model.two_stages:
        c, between = model.temporal_compression, model.config["spatial_latent_channels"]
        images = min(model.config["micro_batch_size"] or frames, frames)  # that the spatial stage sees at once
        latents, half = -(-frames // c), model.temporal_vae
        return {
            "spatial_encoder": (_Network(model, "encode_frames"), (1, channels, images, size, size)),
            "temporal_encoder": (_Network(half, "encode"), (1, between, latents * c, rows, rows)),
            "temporal_decoder": (
                _Network(model.temporal_vae, "decode"),
                (1, model.latent_channels, latents, rows, rows),
            ),
            "spatial_decoder": (_Network(model, "decode_frames"), (1, between, images, rows, rows)),
        }
    shape = (1, channels, frames, size, size)
    return {
        "encoder": (_Network(model, "encode_moments"), shape),
        "decoder": (
            _Network(model, "decode_latents", model.geometry.keeps_images and frames == 1),
            model.latent_shape(shape),
        ),
    }


def tiling_of(
    model: VideoAutoencoder,
    frames: int | None,
    size: int | None,
    encode_overlap: int | None,
    decode_overlap: int | None,
    spatial_overlap: int | None,
) -> tuple[TilingConfig, int, int]:
    """The tiling of an export, and the frames and size of a tile; None defaults to `default_tiling`.

    Overlaps that are None get the same share of a tile as there, in whole latents.

    Raises:
        ValueError: a size does not fit the model; the message names the field.
    """
    default, c, s = model.default_tiling, model.temporal_compression, model.spatial_compression
    lead = model.geometry.lead
    size = default.spatial_tile or 256 if size is None else size
    if size <= 0 or size % s:
        raise ValueError(f"size is {size}; {model.name} needs a multiple of {s}")
    times = {}
    if model.two_stages:
        frames = _chunk_frames(model, frames)
    else:
        frames = default.encode_tile + lead if frames is None else frames
        if frames != 1 or c == 1:
            tile = frames - lead
            if tile <= 0 or tile % c:
                wanted = f"a multiple of {c}, plus {lead}" if lead else f"a multiple of {c}"
                raise ValueError(f"frames is {frames}; {model.name} needs {wanted}, or 1 for images")
            for side, overlap in (("encode", encode_overlap), ("decode", decode_overlap)):
                share = getattr(default, f"{side}_overlap") / getattr(default, f"{side}_tile")
                times[f"{side}_tile"] = tile
                times[f"{side}_overlap"] = int(tile * share) // c * c if overlap is None else overlap
    if not times:
        for name, overlap in (("encode_overlap", encode_overlap), ("decode_overlap", decode_overlap)):
            if overlap:
                raise ValueError(f"{name} is {overlap}; it must be 0, there are no tiles in time here")
        times = {"encode_tile": 0, "encode_overlap": 0, "decode_tile": 0, "decode_overlap": 0}
    tiling = replace(default, spatial_tile=size, spatial_overlap=spatial_overlap, last="shift", **times)
    tiling.encode_axes(c, s, lead)
    return tiling, frames, size


def _chunk_frames(model: VideoAutoencoder, frames: int | None) -> int:
    """Frames of a chunk, or 1 for images."""
    chunk = model.config["micro_frame_size"]
    if chunk is None:
        raise ValueError(f"{model.name} with micro_frame_size null encodes whole clips, not tiles of one length")
    if frames not in (None, 1, chunk):
        raise ValueError(f"frames is {frames}; {model.name} needs its micro_frame_size, {chunk}, or 1 for images")
    return chunk if frames is None else frames
