"""Reconstruct the clips of a CSV, measure PSNR, SSIM and the loss, and write originals and reconstructions.

Under the output folder:

    reconstruction/NAME.mp4  original/NAME.mp4  side_by_side/NAME.mp4      (.png if the input is an image)
    spatial/NAME.mp4         on request: the reconstruction by only the spatial half of a two-stage model
    metrics.csv              one row per row of the index, errors included
    metrics.json             means per method, counts, failures, and the config

With `separate_folders`, originals and reconstructions go next to the output folder, under the same file name in each,
for tools that compare two folders: OUTPUT_rec/NAME.mp4, OUTPUT_ori/NAME.mp4 and OUTPUT_spatial/NAME.mp4.

Metrics compare the float reconstruction, clipped to [-1, 1] and mapped to [0, 1] (not rounded to 8 bits), with the
original in [0, 1] as the model saw it, resized and cropped: per frame, then averaged over frames, then over clips.
Losses are those of training, of the reconstruction before clipping, and come from the same pass.
"""

import contextlib
import json
import logging
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from mindspore import Tensor

from mg.checkpoints import atomic_write
from mg.codec import Latents
from mg.config import require, to_dict
from mg.data.clips import Clip
from mg.data.errors import sparing
from mg.data.index import read_index
from mg.data.transforms import to_uint8_frames
from mg.evaluation.baseline import area_trilinear_baseline
from mg.evaluation.metrics import PSNR_CEILING, SSIM_WINDOW, psnr, ssim
from mg.evaluation.table import Table, error_of
from mg.inference.batches import batches, spared
from mg.inference.fitting import Fitting, described
from mg.inference.loading import ClipsConfig, load_model, noise_for
from mg.inference.outputs import output_names, side_by_side, unique, write_frames
from mg.losses.reconstruction import AutoencoderLoss, LossConfig
from mg.models import VideoAutoencoder
from mg.overlap import write_behind
from mg.plain_text import one_line, printable, text_table

_logger = logging.getLogger(__name__)

ORIGINAL = "original"
RECONSTRUCTION = "reconstruction"
SPATIAL = "spatial"
BASELINE = "baseline"
SIDE_BY_SIDE = "side_by_side"

# What `separate_folders` appends to the output folder's name.
SUFFIXES = {ORIGINAL: "_ori", RECONSTRUCTION: "_rec", SPATIAL: "_spatial"}


@dataclass
class InferenceConfig(ClipsConfig):
    """Reconstruct the clips of a CSV with a video autoencoder.

    Args:
        compare: another checkpoint, or a list of them, to measure and show as well, with the same settings.
        baseline: also measure and show an area average at the model's compression, interpolated back.
        spatial: also measure and show the reconstruction by only the spatial half of a two-stage model.
        loss: weights of the loss to measure; null measures none.
        separate_folders: write reconstructions to OUTPUT_rec, originals to OUTPUT_ori and those of the spatial half to
            OUTPUT_spatial instead of folders in OUTPUT; metrics and side-by-sides stay there.
        save_videos: write reconstructions, originals and side-by-sides; otherwise metrics only.
        fps: frame rate to write; by default that of the clip.

    Raises:
        ValueError: a setting is out of range.
    """

    compare: list[str] | str = field(default_factory=list)
    baseline: bool = False
    spatial: bool = False
    loss: LossConfig | None = None
    separate_folders: bool = False
    save_videos: bool = True
    fps: float | None = None

    def __post_init__(self):
        super().__post_init__()
        large_enough = self.image_size == 0 or self.image_size >= SSIM_WINDOW
        require(large_enough, self, "image_size", f"at least {SSIM_WINDOW}, or 0")
        require(self.fps is None or self.fps > 0, self, "fps", "positive")
        if isinstance(self.compare, str):
            self.compare = [self.compare]


@dataclass
class Result:
    """The result for one row of the index: `scores` maps a method to (psnr, ssim), `losses` a loss to its value,
    `tiles` says whether it ran whole or in which tiles, `error` why there are no scores."""

    name: str
    output: str
    frames: int = 0
    height: int = 0
    width: int = 0
    scores: dict[str, tuple[float, float]] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    tiles: str = ""
    error: str = ""


@dataclass
class Report:
    """Results in the order of the index. The first of `methods` is the reconstruction itself; `losses` are the names of
    its losses. `unwritten` is set if the metrics could not be written; they are here in any case."""

    methods: list[str]
    results: list[Result]
    losses: list[str] = field(default_factory=list)
    unwritten: OSError | None = None

    @property
    def succeeded(self) -> list[Result]:
        return [result for result in self.results if not result.error]

    @property
    def failed(self) -> list[Result]:
        return [result for result in self.results if result.error]

    def means(self) -> dict[str, tuple[float, float]]:
        """The mean (psnr, ssim) of each method over the clips that worked; empty if none did."""
        if not self.succeeded:
            return {}
        rows = {method: [result.scores[method] for result in self.succeeded] for method in self.methods}
        means = {method: np.mean(scores, axis=0).tolist() for method, scores in rows.items()}
        return {method: (psnr, ssim) for method, (psnr, ssim) in means.items()}

    def mean_losses(self) -> dict[str, float]:
        """The mean of every loss over the clips that worked; empty if none did."""
        if not self.succeeded:
            return {}
        return {name: float(np.mean([result.losses[name] for result in self.succeeded])) for name in self.losses}


class Losses:
    """The loss of a reconstruction, its unweighted terms, and two partial sums, by their `names`.

    `pixel` is the pixel error plus weighted LPIPS, summed over a frame; `latent`, for two-stage models, is the second
    stage's error on the first one's latents. Both are reported unweighted, whether or not they count in the loss.

    Raises:
        ValueError: loss weights for a second stage that the model doesn't have, or missing LPIPS weights.
    """

    def __init__(self, config: LossConfig, model: VideoAutoencoder):
        self.config, self.loss, self.latent = config, AutoencoderLoss(config), None
        if self.loss.latents and not model.two_stages:
            raise ValueError(f"loss.latent_weight and loss.identity_weight must be 0: {model.name} has only one stage")
        self.names = ["loss", *["pixel"] * self.loss.pixels, *self.loss.terms]
        if model.two_stages:
            nothing: dict[str, Any] = {f"{term}_weight": 0 for term in ("pixel", "kl", "outlier", "identity")}
            self.latent = AutoencoderLoss(replace(config, **nothing, latent_weight=1))
            self.names = list(dict.fromkeys([*self.names, "latent"]))

    def __call__(self, x: np.ndarray, y: np.ndarray, latents: Latents) -> dict[str, float]:
        """The losses for x and y, (B, 3, T, H, W), and the result of the codec's `latents` for x.

        Raises:
            ValueError: a loss is not finite.
        """
        made = {name: None if value is None else Tensor(value) for name, value in latents.items()}
        clip = Tensor(x)
        loss, terms = self.loss(clip, Tensor(y), **made)
        found = {"loss": float(loss.asnumpy()), **dict(zip(self.loss.terms, terms.asnumpy().tolist()))}
        if self.loss.pixels:
            _, c, _, h, w = x.shape
            found["pixel"] = (found[self.config.pixel_error] + self.config.perceptual_weight * found["lpips"]) * (
                c * h * w
            )
        if self.latent:
            found["latent"] = float(self.latent(clip, None, **made)[0].asnumpy())
        if not np.isfinite(list(found.values())).all():
            raise ValueError("the loss is not finite; with dtype fp16, try bf16 or fp32")
        return {name: found[name] for name in self.names}


def reconstruct_csv(config: InferenceConfig) -> Report:
    """Reconstruct every row of `config.csv_path` and write all files under `config.output_path`.

    A row that fails, because its file cannot be read or does not fit into memory, or its outputs cannot be written,
    becomes a result with an error; the others continue. Rows of metrics.csv are written as they come. A thread writes a
    clip's files while the model runs on the next.

    Raises:
        ValueError, OSError: before anything is measured, if the index or a checkpoint cannot be used or the folder
            cannot be written.
    """
    rows = read_index(config.csv_path, config.video_folder)
    models = load_models(config)
    model, compared = models[RECONSTRUCTION], list(models)[1:]
    if config.spatial and not model.two_stages:
        raise ValueError(f"spatial is true, but {model.name} has no spatial half that can run on its own; turn it off")
    losses = Losses(config.loss, model) if config.loss else None
    methods = [RECONSTRUCTION, *[SPATIAL] * config.spatial, *compared, *[BASELINE] * config.baseline]
    results = [Result(row.name, output) for row, output in zip(rows, output_names([row.name for row in rows]))]
    report = Report(methods, results, losses.names if losses else [])
    folder = Path(config.output_path)
    table = Table(folder / "metrics.csv", _columns(report))
    (folder / "metrics.json").unlink(missing_ok=True)  # from an earlier run; written again at the end
    fitting = Fitting(config.enable_tile, config.tiling.given(), config.max_memory)

    def on_error(index: int, error: Exception) -> None:
        _fail(results[index], error)
        table.add(_cells(results[index], report))

    def compute(batch: list[Clip], x: np.ndarray) -> _Made:
        for clip in batch:
            results[clip.index].frames, results[clip.index].height, results[clip.index].width = clip.x.shape[1:]
        names = [rows[clip.index].name for clip in batch]

        def run(model: VideoAutoencoder) -> _Made:
            y, latents = reconstruct(model, x, noise_for(model, x, names, config))
            return _Made(y, latents, {RECONSTRUCTION: y}, described(model.tiling))

        made = fitting.run(model, x.shape, partial(run, model))
        if config.spatial:
            made.videos[SPATIAL] = model.codec.video(made.latents["target"], x.shape)
        for name in compared:
            other = fitting.run(models[name], x.shape, partial(run, models[name]))
            made.videos[name] = other.videos[RECONSTRUCTION]
        made.videos = {name: np.clip(value, -1, 1) for name, value in made.videos.items()}
        if config.baseline:
            factors = model.temporal_compression, model.spatial_compression
            made.videos[BASELINE] = area_trilinear_baseline(x[: len(batch)], *factors)
        return made

    def scored() -> Generator[tuple[Clip, dict[str, np.ndarray]], None, None]:
        for batch, x in batches(rows, config, on_error, model.spatial_compression):
            for clips, made in spared(compute, batch, x, on_error):
                for i, clip in enumerate(clips):
                    with sparing(partial(on_error, clip.index)):
                        result, videos = results[clip.index], {name: value[i] for name, value in made.videos.items()}
                        result.scores = {name: score(clip.x, video) for name, video in videos.items()}
                        if losses:
                            result.losses = losses(clip.x[None], made.y[i : i + 1], _one_of(i, made.latents))
                        result.tiles = made.tiles
                        yield clip, videos

    def write(clips: Iterator[tuple[Clip, dict[str, np.ndarray]]]) -> None:
        for clip, videos in clips:
            with sparing(partial(on_error, clip.index)):
                result = results[clip.index]
                if config.save_videos:
                    _save(clip, result.output, videos, config)
                table.add(_cells(result, report))

    write_behind(write, scored())
    report.unwritten = error_of(lambda: _write_metrics(report, config, table))
    return report


@dataclass
class _Made:
    """The outputs for a batch: the reconstruction, the latents, `videos` by method, (B, 3, T, H, W) each, and how the
    model ran."""

    y: np.ndarray
    latents: Latents
    videos: dict[str, np.ndarray]
    tiles: str


def load_models(config: InferenceConfig) -> dict[str, VideoAutoencoder]:
    """The model as "reconstruction" and the compared ones by their file names, ready to run."""
    compared = unique(
        [printable(Path(path).stem) for path in config.compare], taken=(ORIGINAL, RECONSTRUCTION, SPATIAL, BASELINE)
    )
    paths = [config.model.from_pretrained, *config.compare]
    return {label: load_model(config, path) for label, path in zip([RECONSTRUCTION, *compared], paths)}


def output_folders(config: InferenceConfig) -> dict[str, Path]:
    """Where the files of each kind are written."""
    kinds = [ORIGINAL, RECONSTRUCTION, *[SPATIAL] * config.spatial]
    folder = Path(config.output_path)
    folders = {kind: Path(f"{folder}{SUFFIXES[kind]}") if config.separate_folders else folder / kind for kind in kinds}
    return {**folders, SIDE_BY_SIDE: folder / SIDE_BY_SIDE}


def reconstruct(model: VideoAutoencoder, x: np.ndarray, noise: np.ndarray | None = None) -> tuple[np.ndarray, Latents]:
    """One pass, in tiles if the model has tiling enabled.

    Args:
        x: (B, 3, T, H, W) in [-1, 1].
        noise: decode a sample of the posterior, see `noise_for`; by default its mean.

    Returns:
        The reconstruction, float32, of x's shape, not clipped; and the latents that it is decoded from.
    """
    codec = model.codec
    latents = codec.latents(x, noise)
    return codec.video(latents["code"], x.shape), latents


def score(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """PSNR in dB and SSIM of `y` against `x`, both (3, T, H, W) in [-1, 1], as means over frames.

    A bit-identical frame counts as 100 dB.

    Raises:
        ValueError: `y` is not finite, or frames are smaller than SSIM's window.
    """
    if not np.isfinite(y).all():
        raise ValueError("the reconstruction is not finite; with dtype fp16, try bf16 or fp32")
    a, b = ((video.transpose(1, 2, 3, 0) + 1) / 2 for video in (x, y))  # (T, H, W, C)
    return float(np.minimum(psnr(a, b), PSNR_CEILING).mean()), float(ssim(a, b).mean())


def format_table(report: Report) -> str:
    """PSNR and SSIM of every clip and method and their means, the mean losses, and the failures, as text."""
    lines = [["clip", *(f"{method} {metric}" for method in report.methods for metric in ("PSNR", "SSIM"))]]
    entries = [(printable(result.output), result.scores) for result in report.succeeded]
    for name, scores in [*entries, ("mean", report.means())] if entries else []:
        values = (scores[method] for method in report.methods)
        lines.append([name, *(text for decibels, ratio in values for text in (f"{decibels:.2f}", f"{ratio:.4f}"))])
    text = text_table(lines)
    text += [f"mean {name}: {value:.6g}" for name, value in report.mean_losses().items()]
    text += [f"failed: {printable(result.name)}: {result.error}" for result in report.failed]
    return "\n".join(text)


def _one_of(i: int, latents: Latents) -> Latents:
    """Those of item i of a batch, as a batch of one."""
    arrays = cast(dict[str, np.ndarray | None], latents)
    return cast(Latents, {name: None if value is None else value[i : i + 1] for name, value in arrays.items()})


def _save(clip: Clip, name: str, outputs: dict[str, np.ndarray], config: InferenceConfig) -> None:
    """Write the files of a clip: all or none of them."""
    columns = {kind: to_uint8_frames(video) for kind, video in {ORIGINAL: clip.x, **outputs}.items()}
    written: list[Path] = []
    try:
        for kind, folder in output_folders(config).items():
            frames = side_by_side(columns) if kind == SIDE_BY_SIDE else columns[kind]
            path = folder / f"{name}{'.png' if clip.still else '.mp4'}"
            write_frames(path, frames, config.fps or clip.fps)
            written.append(path)
    except BaseException:
        for path in written:
            with contextlib.suppress(OSError):
                path.unlink()
        raise


def _fail(result: Result, error: Exception) -> None:
    result.error, result.scores, result.losses = one_line(error), {}, {}
    _logger.warning("%s: %s", printable(result.name), result.error)


def _columns(report: Report) -> list[str]:
    suffixes = ["" if method == RECONSTRUCTION else f"_{method}" for method in report.methods]
    scores = [f"{metric}{suffix}" for suffix in suffixes for metric in ("psnr", "ssim")]
    losses = ["loss" if name == "loss" else f"loss_{name}" for name in report.losses]
    return ["name", "output", "status", "frames", "height", "width", *scores, *losses, "tiles", "error"]


def _cells(result: Result, report: Report) -> list:
    values = [value for method in report.methods for value in result.scores.get(method, ("", ""))]
    values += [result.losses.get(name, "") for name in report.losses]
    status = "error" if result.error else "ok"
    size = [result.frames, result.height, result.width]
    return [result.name, result.output, status, *size, *values, result.tiles, result.error]


def _write_metrics(report: Report, config: InferenceConfig, table: Table) -> None:
    folder = Path(config.output_path)
    table.write([_cells(result, report) for result in report.results])  # in the order of the index
    summary = {
        "clips": len(report.results),
        "succeeded": len(report.succeeded),
        "failed": len(report.failed),
        "mean": {method: {"psnr": p, "ssim": s} for method, (p, s) in report.means().items()},
        **({"loss": report.mean_losses()} if report.losses else {}),
        "failures": [{"name": result.name, "error": result.error} for result in report.failed],
        "config": to_dict(config),
    }
    with atomic_write(folder / "metrics.json") as path:
        path.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
