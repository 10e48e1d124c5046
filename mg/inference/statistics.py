"""Mean and standard deviation of a model's latents over the clips of a CSV, and the scaling factors they imply.

A diffusion model is trained on latents of about unit variance; an autoencoder's can have any. Factors in the model's
config normalize them, by a different convention for each kind of model:

    Video DC-AE                scaling_factor = std              encode divides by it, decode multiplies; no shift
    TAE, image VAE (SD's)      scaling_factor = 1 / std,         left to the caller: z = (z - shift_factor) *
                               shift_factor = mean               scaling_factor, undone before decoding
    Open-Sora 1.2 VAE          shift = mean, scale = std,        encode returns (z - shift) / scale, decode undoes it
                               one of each per channel

Reconstructions do not depend on them. The standard deviation (of each channel or of all latents) is taken over all
positions, dividing by the count. Everything is summed in float64, clip by clip (Chan, Golub and LeVeque 1979), so that
the shapes and the order of the clips don't matter.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mg.checkpoints import atomic_write
from mg.config import to_dict
from mg.data.clips import Clip
from mg.data.index import IndexRow, read_index
from mg.evaluation.table import error_of
from mg.inference.batches import batches, spared
from mg.inference.fitting import Fitting
from mg.inference.loading import ClipsConfig, load_model, noise_for
from mg.models import VideoAutoencoder
from mg.models.registry import merge_config
from mg.plain_text import one_line, printable

_logger = logging.getLogger(__name__)

STATISTICS_FILE = "latent_statistics.json"


@dataclass
class StatisticsConfig(ClipsConfig):
    """Measure the latents of a video autoencoder over the clips of a CSV.

    Args:
        output_path: folder for latent_statistics.json and the model with the new factors in its config, for
            `from_pretrained`.
    """

    output_path: str = "outputs/latent_statistics"


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations from the mean, in float64: (C,) per channel, or () for all values."""

    count: int
    mean: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, z: np.ndarray) -> "Moments":
        """The moments of each channel of z (B, C, t, h, w)."""
        values = np.moveaxis(z, 1, 0).reshape(z.shape[1], -1).astype(np.float64)  # (C, B*t*h*w)
        mean = values.mean(1)
        return cls(values.shape[1], mean, np.square(values - mean[:, None]).sum(1))

    def __add__(self, other: "Moments") -> "Moments":
        """The moments of both sets of values combined."""
        count = self.count + other.count
        apart = other.mean - self.mean
        squares = self.squares + other.squares + apart**2 * (self.count * other.count / count)
        return Moments(count, self.mean + apart * (other.count / count), squares)

    def over_channels(self) -> "Moments":
        """The moments of all channels combined."""
        mean = self.mean.mean()
        squares = self.squares.sum() + self.count * np.square(self.mean - mean).sum()
        return Moments(self.count * self.mean.size, mean, squares)

    @property
    def std(self) -> np.ndarray:
        return np.sqrt(self.squares / self.count)


@dataclass
class Statistics:
    """What was measured: moments of the unscaled latents per channel (None if no clip worked), which clips failed and
    why, and why the files could not be written, if so."""

    channels: Moments | None
    clips: int
    failures: list[tuple[str, str]]
    unwritten: OSError | None = None


def measure_csv(config: StatisticsConfig) -> tuple[Statistics, dict]:
    """Measure the clips of `config.csv_path`, and write the model with its new factors to `config.output_path`.

    Returns:
        The statistics and the config keys that follow from them. If no clip worked, {}, and nothing is written.

    Raises:
        ValueError, OSError: the index or the checkpoint cannot be used, or all latents are equal.
    """
    source, folder = Path(config.model.from_pretrained).resolve(), Path(config.output_path)
    if folder.resolve() in (source, source.parent):
        raise ValueError(f"output_path is {folder}, where the checkpoint is; choose another folder")
    rows = read_index(config.csv_path, config.video_folder)
    model = load_model(config)
    lacking = [key for key in model.scaling_for(0.0, 1.0, [], []) if key not in model.config]
    if lacking:
        raise ValueError(f"the config of {model.name} has no {' and no '.join(lacking)}, which statistics set")
    statistics = measure(model, rows, config)
    if statistics.channels is None:
        return statistics, {}
    factors = scaling(model, statistics.channels)
    replaced = {key: model.config[key] for key in factors}
    model.config = merge_config(model.config, factors, model.name)
    overall = statistics.channels.over_channels()
    described = {
        "model": model.name,
        "checkpoint": config.model.from_pretrained,
        "clips": statistics.clips,
        "failed": len(statistics.failures),
        "mean": float(overall.mean),
        "std": float(overall.std),
        **factors,
        "meaning": model.scaling,
        "replaced": replaced,
        "values_per_channel": statistics.channels.count,
        "channel_mean": statistics.channels.mean.tolist(),
        "channel_std": statistics.channels.std.tolist(),
        "failures": [{"name": name, "error": error} for name, error in statistics.failures],
        "config": to_dict(config),
    }

    def write() -> None:
        model.save_pretrained(folder)
        with atomic_write(folder / STATISTICS_FILE) as path:
            path.write_text(json.dumps(described, indent=2, allow_nan=False) + "\n", encoding="utf-8")

    statistics.unwritten = error_of(write)
    return statistics, factors


def measure(model: VideoAutoencoder, rows: list[IndexRow], config: ClipsConfig) -> Statistics:
    """Statistics of the unscaled latents over the clips of an index; clips that fail are named and left out."""
    statistics = Statistics(None, 0, [])

    def on_error(index: int, error: Exception) -> None:
        statistics.failures.append((rows[index].name, one_line(error)))
        _logger.warning("%s: %s", printable(rows[index].name), one_line(error))

    fitting = Fitting(config.enable_tile, config.tiling.given(), config.max_memory)

    def unscaled(batch: list[Clip], x: np.ndarray) -> np.ndarray:
        noise = noise_for(model, x, [rows[clip.index].name for clip in batch], config)

        def run() -> np.ndarray:
            return model.unscaled(model.codec.encode(x, noise).z)  # (B, C, t, h, w)

        return fitting.run(model, x.shape, run, ("encode",))

    for batch, x in batches(rows, config, on_error, model.spatial_compression):
        for clips, found in spared(unscaled, batch, x, on_error):
            for clip, latents in zip(clips, found):
                if not np.isfinite(latents).all():
                    on_error(clip.index, ValueError("the latents are not finite; with dtype fp16, try bf16 or fp32"))
                    continue
                moments = Moments.of(latents[None])
                statistics.channels = moments if statistics.channels is None else statistics.channels + moments
                statistics.clips += 1
    return statistics


def scaling(model: VideoAutoencoder, channels: Moments) -> dict:
    """The keys of the model's config that scale latents with these statistics to unit variance.

    A constant channel, which cannot be scaled to unit variance, is treated as if it had it.

    Raises:
        ValueError: all latents are equal.
    """
    overall = channels.over_channels()
    mean, std = float(overall.mean), float(overall.std)
    if not std > 0:
        raise ValueError(f"all latents are {mean}: no factor scales them to unit variance")
    return model.scaling_for(
        mean, std, channels.mean.tolist(), [deviation or 1.0 for deviation in channels.std.tolist()]
    )
