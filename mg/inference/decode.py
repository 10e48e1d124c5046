"""Decode a folder of latents to videos with the model that encoded them.

Each video is read, decoded and written in pieces along time, in the tiles used for encoding, so that memory does not
depend on its length; threads read the next piece and write the previous one while the model runs. Frames are cropped to
the encoded size. Running the command again makes what is missing.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from tqdm import tqdm

from mg import runtime
from mg.checkpoints.atomic import remove_leftovers
from mg.checkpoints.digest import sha256
from mg.config import require
from mg.data.errors import DataError, sparing
from mg.data.transforms import to_uint8_frames
from mg.inference.fitting import Fitting
from mg.inference.loading import TileFields
from mg.inference.outputs import output_names, write_frames
from mg.latents import Latents, open_latents
from mg.models import VideoAutoencoder, from_pretrained
from mg.overlap import write_behind
from mg.plain_text import one_line, printable

_logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class DecodeConfig:
    """Decode a folder of latents to videos, and still images to images.

    Args:
        latents_path: the folder that mg-encode-latents wrote.
        from_pretrained: the checkpoint; by default its path when the latents were made.
        any_checkpoint: accept a checkpoint whose hash differs from that of the encoding.
        output_path: folder to write to; existing files are kept.
        names: the videos to decode, as named in the CSV; by default all.
        dtype: precision of convolutions and matrix products; by default that of the encoding.
        enable_tile: run in tiles, by default those of the encoding; auto does so if frames don't fit into memory whole
            or if encoding always used tiles.
        tiling: tile sizes and overlaps; the others are those of the encoding.
        max_memory: GB that a video may use; by default what is free when videos of its size first come.
        device: auto picks the first available of ascend, gpu and cpu.
        mode: graph compiles once per shape, pynative runs op by op.

    Raises:
        ValueError: a setting is out of range.
    """

    aliases: ClassVar[dict[str, str]] = {
        "save_dir": "output_path",
        "save-dir": "output_path",
        "ckpt_path": "from_pretrained",
        "ckpt-path": "from_pretrained",
    }

    latents_path: str
    from_pretrained: str | None = None
    any_checkpoint: bool = False
    output_path: str = "samples/decoded"
    names: list[str] = field(default_factory=list)
    dtype: Literal["fp32", "fp16", "bf16"] | None = None
    enable_tile: bool | Literal["auto"] = "auto"
    tiling: TileFields = field(default_factory=TileFields)
    max_memory: float | None = None
    device: Literal["auto", "ascend", "gpu", "cpu"] = "auto"
    mode: Literal["auto", "graph", "pynative"] = "auto"

    def __post_init__(self):
        require(self.max_memory is None or self.max_memory > 0, self, "max_memory", "above 0")


@dataclass
class DecodeReport:
    """What a rank did: how many videos it decoded, how many were there already, and which failed and why."""

    decoded: int = 0
    there: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)


def decode_folder(config: DecodeConfig, rank: int = 0, world_size: int = 1) -> DecodeReport:
    """Decode this rank's share of `config.latents_path` into `config.output_path`: NAME.mp4, or .png for an image.

    A video that cannot be read, decoded or written is reported as failed; the others continue. What a killed run left
    half written is removed.

    Raises:
        ValueError, OSError: latents, a name or a checkpoint cannot be used, or the folder cannot be written.
    """
    latents = open_latents(config.latents_path)
    files = dict(zip(latents, output_names(list(latents))))
    wanted = list(dict.fromkeys(config.names)) or list(latents)
    for name in wanted:
        latents[name]  # an unknown one is an error before anything is decoded
    model, given = _load_model(config, latents.settings)
    fitting = Fitting(config.enable_tile, given, config.max_memory)
    report = DecodeReport()
    mine = {name: f"{files[name]}{'.png' if latents[name].still else '.mp4'}" for name in wanted[rank::world_size]}
    remove_leftovers(Path(config.output_path), mine.values())
    with runtime.CtrlC() as ctrl_c:
        for name, file in tqdm(mine.items(), desc="videos", unit="video"):
            clip, path = latents[name], Path(config.output_path) / file
            if path.exists():
                report.there += 1
                continue
            with sparing(partial(_fail, report, name)):
                fitting.settle(model, (1, 3, clip.frames, clip.height, clip.width), ("decode",), streams=True)
                _decode(model, clip, path, ctrl_c)
                report.decoded += 1
            ctrl_c.check()
    return report


def _fail(report: DecodeReport, name: str, error: Exception) -> None:
    report.failed.append((name, one_line(error)))
    _logger.warning("%s: %s", printable(name), one_line(error))


def _decode(model: VideoAutoencoder, clip: Latents, path: Path, ctrl_c: runtime.CtrlC) -> None:
    def read(start: int, stop: int) -> np.ndarray:
        return clip.read(None, start, stop)[None]

    stream = model.decode_stream(read, clip.shape[1], clip.frames, read_ahead=True)

    def write(pieces: Iterator[np.ndarray]) -> None:
        write_frames(path, to_frames(pieces, clip.height, clip.width), clip.fps or 1.0)

    write_behind(write, ctrl_c.checked(stream))


def to_frames(pieces: Iterator[np.ndarray], height: int, width: int) -> Iterator[np.ndarray]:
    """A decoder's pieces (1, 3, T', h, w) -> uint8 frames (T', H, W, 3), cropped to their size.

    Raises:
        ValueError: frames are not finite.
    """
    for piece in pieces:
        pixels = piece[0, :, :, :height, :width]
        if not np.isfinite(pixels).all():
            raise ValueError("the frames are not finite; with dtype fp16, try bf16 or fp32")
        yield to_uint8_frames(pixels)


def _load_model(config: DecodeConfig, settings: dict) -> tuple[VideoAutoencoder, dict]:
    """The model of the encoding, with its weights unless others are given, and its tiling; and the fields that tiles
    should have if `Fitting` needs them."""
    try:
        made = settings["model"]
        name, dtype, model_config = made["name"], made["dtype"], dict(made["config"])
        tiling = dict(made["tiling"] or {})
        checkpoint, wanted = Path(config.from_pretrained or made["checkpoint"]), made["sha256"]
    except (KeyError, TypeError) as error:
        raise DataError(f"{config.latents_path}: its latents.json does not describe a model ({error})") from None
    if not checkpoint.exists():
        raise DataError(f"{checkpoint}: no such checkpoint; give --ckpt_path")
    if not config.any_checkpoint and sha256(checkpoint) != wanted:
        raise DataError(
            f"{checkpoint}: is not the checkpoint that made the latents of {config.latents_path}, whose SHA-256 is "
            f"{wanted}; give that one as --ckpt_path, or --any_checkpoint"
        )
    model = from_pretrained(checkpoint, name, config.dtype or dtype, **model_config)
    encoded_whole = not tiling or tiling.pop("auto", False)
    tiles = {**tiling, **config.tiling.given()}
    if config.enable_tile:
        model.enable_tiling(**tiles)
    if not config.enable_tile or (config.enable_tile == "auto" and encoded_whole):
        model.disable_tiling()
    return model, tiles
