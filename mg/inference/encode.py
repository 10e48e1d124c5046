"""Encode the videos and images of a CSV into a folder of latents to train a diffusion model on; see mg.latents.

Each video is read, encoded and written in pieces along time, in the model's own tiles, so that memory does not depend
on its length; threads read the next piece and write the previous one while the model runs. Videos are distributed over
ranks by their position in the CSV. Running the command again resumes a stopped run, on any number of ranks.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from mg import runtime
from mg.checkpoints.digest import sha256
from mg.codec import Encoded
from mg.config import require
from mg.data.clips import OpenClip, open_clips
from mg.data.errors import NoRoom, sparing
from mg.data.index import IndexRow, read_index
from mg.data.shards import EncodeReport, settle
from mg.inference.fitting import DoesNotFit, Fitting
from mg.inference.loading import ClipsConfig, load_model
from mg.latents import SETTINGS_FILE, LatentsRow, ShardWriter, read_rows, record
from mg.models import VideoAutoencoder
from mg.overlap import write_behind
from mg.plain_text import one_line, printable
from mg.sampling import clip_seed

_logger = logging.getLogger(__name__)


@dataclass
class EncodeConfig(ClipsConfig):
    """Encode the videos and images of a CSV into a folder of latents.

    Args:
        output_path: folder to write to; running the same command again resumes there.
        num_frames: frames of a clip, from the beginning; by default the whole video, whatever its length.
        batch_size: must be 1: videos are encoded one by one, in tiles along time.
        posterior: store both mean and log-variance, so that readers can sample the posterior.
        latents_dtype: precision of the stored latents.
        shard_size: MB per shard; a larger video gets its own.
        retry_failed: retry videos that could not be encoded before.

    Raises:
        ValueError: a setting is out of range.
    """

    output_path: str = "outputs/latents"
    posterior: bool = False
    latents_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    shard_size: int = 256
    retry_failed: bool = False

    def __post_init__(self):
        super().__post_init__()
        require(self.batch_size == 1, self, "batch_size", "1: videos are encoded one by one")
        require(self.shard_size >= 1, self, "shard_size", "at least 1")
        both = "false if posterior is true, which stores the whole posterior"
        require(not (self.posterior and self.sample_posterior), self, "sample_posterior", both)


def encode_csv(config: EncodeConfig, rank: int = 0, world_size: int = 1) -> EncodeReport:
    """Encode this rank's videos of `config.csv_path` into `config.output_path`; row i belongs to rank i % world_size.

    A video that cannot be read or encoded becomes a row with an error; the others continue. One that failed for lack of
    memory or disk space is retried by the next run. One that the CSV names twice is encoded once.

    Raises:
        ValueError, OSError: the index or checkpoint cannot be used, or the folder cannot be written or was made with
            other settings.
    """
    index = read_index(config.csv_path, config.video_folder)
    unique = {row.name: row for row in reversed(index)}  # the first of a name
    rows = [unique[name] for name in dict.fromkeys(row.name for row in index)]
    if len(rows) < len(index):
        _logger.warning("%s: names %d videos more than once", config.csv_path, len(index) - len(rows))
    model = load_model(config)
    if config.posterior and not model.geometry.has_posterior:
        raise ValueError(f"posterior is true, but {model.name} has none: its latents are deterministic; turn it off")
    folder = Path(config.output_path)
    settle(folder, SETTINGS_FILE, _settings(config, model), "model", LatentsRow)
    mine = rows[rank::world_size]
    report = EncodeReport(len(rows), len(mine))
    before = read_rows(folder)
    todo = [unique[name] for name in report.to_do([row.name for row in mine], before, config.retry_failed)]
    recaptioned = [
        replace(before[row.name], caption=row.caption)
        for row in mine
        if row.name in before and before[row.name].caption != row.caption
    ]
    order = {row.name: i for i, row in enumerate(rows)}
    if recaptioned:
        _logger.info("%d videos have a new caption", len(recaptioned))
        record(folder, recaptioned, order)
    size = config.shard_size * 2**20
    fitting = Fitting(config.enable_tile, config.tiling.given(), config.max_memory)
    with (
        ShardWriter(folder, order, config.latents_dtype, size, rank, world_size) as shards,
        tqdm(total=len(todo), desc="videos", unit="video") as progress,
        runtime.CtrlC() as ctrl_c,
    ):

        def on_error(number: int, error: Exception) -> None:
            row = todo[number]
            again = isinstance(error, OSError | MemoryError | NoRoom | DoesNotFit)
            shards.fail(LatentsRow(row.name, row.caption), one_line(error), again)
            report.failed.append((row.name, one_line(error)))
            _logger.warning("%s: %s", printable(row.name), one_line(error))
            progress.update()

        for number, clip in open_clips(todo, config, model.codec.stream_tile or 1, on_error, model.spatial_compression):
            with sparing(partial(on_error, number)):
                tiles = fitting.settle(model, (1, 3, clip.num_frames, *clip.size), ("encode",), streams=True)
                _encode(model, todo[number], clip, config, shards, tiles, ctrl_c)
                report.encoded += 1
                progress.update()
            ctrl_c.check()
    report.lose(shards.lost)
    return report


def _encode(
    model: VideoAutoencoder,
    row: IndexRow,
    clip: OpenClip,
    config: EncodeConfig,
    shards: ShardWriter,
    tiles: str,
    ctrl_c: runtime.CtrlC,
) -> None:
    height, width = clip.size
    length = model.latent_shape((1, 3, clip.num_frames, height, width))[2]
    described = LatentsRow(row.name, row.caption, frames=clip.num_frames, height=height, width=width, fps=clip.fps)
    described.still, described.tiles = clip.still, tiles
    seed = clip_seed(config.seed, row.name) if config.sample_posterior else None
    stream = model.encode_stream(lambda a, b: clip.read(a, b)[None], clip.num_frames, seed, read_ahead=True)
    write_behind(lambda pieces: shards.store(described, length, _to_store(pieces, config)), ctrl_c.checked(stream))


def _to_store(pieces: Iterator[Encoded], config: EncodeConfig) -> Iterator[dict[str, np.ndarray]]:
    """The tensors to store for a clip, (z, t', h, w), in pieces along time.

    Raises:
        ValueError: latents are not finite.
    """
    for z, mean, logvar in pieces:
        stretch = {"mean": mean[0], "logvar": logvar[0]} if config.posterior else {"z": z[0]}
        if not all(np.isfinite(values).all() for values in stretch.values()):
            raise ValueError("the latents are not finite; with dtype fp16, try bf16 or fp32")
        yield stretch


def _settings(config: EncodeConfig, model: VideoAutoencoder) -> dict:
    """The settings shared by all latents of a folder."""
    checkpoint = Path(config.model.from_pretrained)
    factors = model.scaling_for(0.0, 1.0, [], [])
    return {
        "model": {
            "name": model.name,
            "checkpoint": str(checkpoint),
            "sha256": sha256(checkpoint),
            "dtype": config.model.dtype,
            "config": dict(model.config),
            "tiling": _tiling(model, config),
        },
        "scaling": {
            "convention": model.scaling,
            "factors": {key: model.config[key] for key in factors if key in model.config},
            "applied": model.applies_scaling,
        },
        "latents": {
            "stored": ["mean", "logvar"] if config.posterior else ["z"],
            "z": f"samples of the posterior, seed {config.seed}" if config.sample_posterior else "the posterior's mean",
            "dtype": config.latents_dtype,
        },
        "clips": {
            "folder": str(Path(config.video_folder or Path(config.csv_path).parent).resolve()),
            **config.describe(),
        },
    }


def _tiling(model: VideoAutoencoder, config: EncodeConfig) -> dict | None:
    """The tiling of all videos; with `auto`, of those that don't fit whole."""
    if config.enable_tile == "auto" and model.tiling is None:
        return {"auto": True, **config.tiling.given()}
    return vars(model.tiling) if model.tiling else None
