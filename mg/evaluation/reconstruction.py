"""Reconstruct the clips of a CSV, measure PSNR and SSIM, and write what is seen beside what was given.

Under the output folder:

    reconstruction/NAME.mp4  original/NAME.mp4  side_by_side/NAME.mp4      (.png where the input is an image)
    metrics.csv              one row per line of the index, errors included
    metrics.json             means per method, counts, failures, and the configuration

Metrics compare the float reconstruction, clipped to [-1, 1] and brought to [0, 1] (not rounded to 8 bits), with the
original in [0, 1] as the model was given it, resized and cropped: per frame, then the mean over frames, then over
clips.
"""

import csv
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import mindspore as ms
import numpy as np

from mg.checkpoints import atomic_write
from mg.config import require, to_dict
from mg.data.index import read_index
from mg.data.transforms import to_uint8_frames
from mg.data.video import write_image, write_video
from mg.evaluation.baseline import area_trilinear_baseline
from mg.evaluation.clips import Clip, ClipsConfig, batches, load_model, one_line
from mg.evaluation.metrics import SSIM_WINDOW, psnr, ssim
from mg.models import VideoAutoencoder

_logger = logging.getLogger(__name__)

RECONSTRUCTION = "reconstruction"
BASELINE = "baseline"
LABEL_HEIGHT = 20

# What a frame without any error counts as, so that a mean stays a number.
PSNR_CEILING = 100.0


@dataclass
class InferenceConfig(ClipsConfig):
    """Reconstruct the clips of a CSV with a video autoencoder.

    Args:
        compare: another checkpoint to show and measure beside, or a list of them, under the same settings.
        baseline: measure and show an area average at the model's compression, brought back by interpolation, too.
        save_videos: write reconstructions, originals and side-by-sides; otherwise metrics only.
        fps: frame rate to write; by default that of the frames taken.

    Raises:
        ValueError: a setting out of its range.
    """

    compare: list[str] | str = field(default_factory=list)
    baseline: bool = False
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
    """One line of the index: `scores` maps a method to (psnr, ssim); `error` says why there are none."""

    name: str
    output: str
    frames: int = 0
    height: int = 0
    width: int = 0
    scores: dict[str, tuple[float, float]] = field(default_factory=dict)
    error: str = ""


@dataclass
class Report:
    """Results in the order of the index. The first of `methods` is the reconstruction itself."""

    methods: list[str]
    results: list[Result]

    @property
    def succeeded(self) -> list[Result]:
        return [result for result in self.results if not result.error]

    @property
    def failed(self) -> list[Result]:
        return [result for result in self.results if result.error]

    def means(self) -> dict[str, tuple[float, float]]:
        """Per method the mean (psnr, ssim) over the clips that worked; empty where none did."""
        if not self.succeeded:
            return {}
        rows = {method: [result.scores[method] for result in self.succeeded] for method in self.methods}
        return {method: tuple(float(value) for value in np.mean(scores, axis=0)) for method, scores in rows.items()}


def reconstruct_csv(config: InferenceConfig) -> Report:
    """Reconstruct every line of `config.csv_path` and write all files under `config.output_path`.

    A line that cannot be read becomes a result with an error; the others go on.

    Raises:
        ValueError, OSError: an index or a checkpoint that cannot be used, before anything is written.
    """
    rows = read_index(config.csv_path, config.video_folder)
    models = load_models(config)
    methods = list(models) + [BASELINE] * config.baseline
    results = [Result(row.name, output) for row, output in zip(rows, output_names([row.name for row in rows]))]
    report = Report(methods, results)
    folder = Path(config.output_path)
    folder.mkdir(parents=True, exist_ok=True)

    for batch, x in batches(rows, config, lambda index, error: _fail(results[index], error)):
        outputs = {name: reconstruct(model, x, config.sample_posterior) for name, model in models.items()}
        if config.baseline:
            factors = models[RECONSTRUCTION].temporal_compression, models[RECONSTRUCTION].spatial_compression
            outputs[BASELINE] = area_trilinear_baseline(x[: len(batch)], *factors)
        for i, clip in enumerate(batch):
            _score_and_save(clip, results[clip.index], {name: y[i] for name, y in outputs.items()}, folder, config)

    _write_metrics(report, folder, config)
    return report


def load_models(config: InferenceConfig) -> dict[str, VideoAutoencoder]:
    """The model under "reconstruction" and the compared ones under their files' names, ready to run."""
    compared = unique([Path(path).stem for path in config.compare], taken=("original", RECONSTRUCTION, BASELINE))
    paths = [config.model.from_pretrained, *config.compare]
    return {label: load_model(config, path) for label, path in zip([RECONSTRUCTION, *compared], paths)}


def reconstruct(model: VideoAutoencoder, x: np.ndarray, sample_posterior: bool = False) -> np.ndarray:
    """(B, 3, T, H, W) in [-1, 1] -> the model's reconstruction of the same shape, float32, clipped to that range"""
    t, h, w = x.shape[2:]
    if sample_posterior and model.has_posterior:
        y = model.decode(model.encode(ms.Tensor(x)).z, num_target_frames=t)[..., :h, :w]
    else:
        y = model(ms.Tensor(x))
    return np.clip(y.astype(ms.float32).asnumpy(), -1, 1)


def score(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """PSNR in dB and SSIM of `y` against `x`, both (3, T, H, W) in [-1, 1], as means over frames.

    A frame that is equal to the last bit counts 100 dB.

    Raises:
        ValueError: `y` is not finite, or frames are smaller than SSIM's window.
    """
    if not np.isfinite(y).all():
        raise ValueError("the reconstruction is not finite; with dtype fp16, try bf16 or fp32")
    a, b = ((video.transpose(1, 2, 3, 0) + 1) / 2 for video in (x, y))  # (T, H, W, C)
    return float(np.minimum(psnr(a, b), PSNR_CEILING).mean()), float(ssim(a, b).mean())


def output_names(names: list[str]) -> list[str]:
    """File names without suffix for the paths of an index: folders become part of the name, equal ones get a number."""
    flat = [Path(name).with_suffix("").as_posix().strip("/").replace("/", "_") for name in names]
    return unique(flat)


def unique(names: list[str], taken: Iterable[str] = ()) -> list[str]:
    """`names` with _2, _3, ... behind those that stood before, or are `taken`; case does not count."""
    seen = {name.lower() for name in taken}
    result = []
    for name in names:
        chosen, number = name, 1
        while chosen.lower() in seen:
            number += 1
            chosen = f"{name}_{number}"
        seen.add(chosen.lower())
        result.append(chosen)
    return result


def side_by_side(columns: dict[str, np.ndarray]) -> np.ndarray:
    """Videos (T, H, W, 3) of one shape, uint8 -> one video with a labelled column for each"""
    return np.concatenate([_label(frames, name) for name, frames in columns.items()], axis=2)


def format_table(report: Report) -> str:
    """PSNR and SSIM of every clip and method and their means, and what failed, as aligned text."""
    lines = [["clip", *(f"{method} {metric}" for method in report.methods for metric in ("PSNR", "SSIM"))]]
    entries = [(result.output, result.scores) for result in report.succeeded]
    for name, scores in [*entries, ("mean", report.means())] if entries else []:
        values = (scores[method] for method in report.methods)
        lines.append([name, *(text for decibels, ratio in values for text in (f"{decibels:.2f}", f"{ratio:.4f}"))])
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    text += [f"failed: {result.name}: {result.error}" for result in report.failed]
    return "\n".join(text)


def _score_and_save(
    clip: Clip, result: Result, outputs: dict[str, np.ndarray], folder: Path, config: InferenceConfig
) -> None:
    result.frames, result.height, result.width = clip.x.shape[1:]
    try:
        result.scores = {method: score(clip.x, y) for method, y in outputs.items()}
    except ValueError as error:
        return _fail(result, error)
    if not config.save_videos:
        return None
    original, *others = (to_uint8_frames(video) for video in (clip.x, *outputs.values()))
    columns = dict(zip(("original", *outputs), (original, *others)))
    for kind, frames in [
        ("original", original),
        (RECONSTRUCTION, columns[RECONSTRUCTION]),
        ("side_by_side", side_by_side(columns)),
    ]:
        path = folder / kind / result.output
        path.parent.mkdir(exist_ok=True)
        if clip.still:
            write_image(path.with_name(path.name + ".png"), frames[0])
        else:
            write_video(path.with_name(path.name + ".mp4"), frames, config.fps or clip.fps)


def _fail(result: Result, error: Exception) -> None:
    result.error = one_line(error)
    _logger.warning("%s: %s", result.name, result.error)


def _label(frames: np.ndarray, text: str) -> np.ndarray:
    """A strip with `text` above every frame, shrunk where the frame is narrow."""
    width = frames.shape[2]
    font, scale = cv2.FONT_HERSHEY_SIMPLEX, 0.45
    needed = cv2.getTextSize(text, font, scale, 1)[0][0] + 8
    strip = np.full((LABEL_HEIGHT, width, 3), 24, np.uint8)
    scale *= min(1, width / needed)
    cv2.putText(strip, text, (4, LABEL_HEIGHT - 6), font, scale, (255,) * 3, 1, cv2.LINE_AA)
    return np.concatenate([np.broadcast_to(strip, (len(frames), *strip.shape)), frames], axis=1)


def _write_metrics(report: Report, folder: Path, config: InferenceConfig) -> None:
    with atomic_write(folder / "metrics.csv") as path, open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        suffixes = {method: "" if method == RECONSTRUCTION else f"_{method}" for method in report.methods}
        scores = [f"{metric}{suffix}" for suffix in suffixes.values() for metric in ("psnr", "ssim")]
        writer.writerow(["name", "output", "status", "frames", "height", "width", *scores, "error"])
        for result in report.results:
            values = [value for method in report.methods for value in result.scores.get(method, ("", ""))]
            status = "error" if result.error else "ok"
            size = [result.frames, result.height, result.width]
            writer.writerow([result.name, result.output, status, *size, *values, result.error])
    summary = {
        "clips": len(report.results),
        "succeeded": len(report.succeeded),
        "failed": len(report.failed),
        "mean": {method: {"psnr": p, "ssim": s} for method, (p, s) in report.means().items()},
        "failures": [{"name": result.name, "error": result.error} for result in report.failed],
        "config": to_dict(config),
    }
    with atomic_write(folder / "metrics.json") as path:
        path.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
