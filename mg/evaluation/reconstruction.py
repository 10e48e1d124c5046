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
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import mindspore as ms
import numpy as np
from tqdm import tqdm

from mg.checkpoints import atomic_write
from mg.config import to_dict
from mg.data.index import IndexRow, read_index
from mg.data.transforms import center_crop, resize_short_side, to_uint8_frames, to_video_tensor
from mg.data.video import VideoError, is_image, open_video, read_image, write_image, write_video
from mg.evaluation.baseline import area_trilinear_baseline
from mg.evaluation.metrics import SSIM_WINDOW, psnr, ssim
from mg.models import VideoAutoencoder, from_pretrained
from mg.models.tiling import TilingConfig

_logger = logging.getLogger(__name__)

RECONSTRUCTION = "reconstruction"
BASELINE = "baseline"
LABEL_HEIGHT = 20

# What a frame without any error counts as, so that a mean stays a number.
PSNR_CEILING = 100.0


@dataclass
class InferenceConfig:
    """Reconstruct the clips of a CSV with a video autoencoder.

    Args:
        ckpt_path: checkpoint: a file, or a folder that `save_pretrained` wrote.
        csv_path: CSV with a column `video` or `path`.
        video_folder: folder that the paths in the CSV are relative to; by default the CSV's own.
        output_path: folder to write to.
        model: name of the model; by default what the config beside the checkpoint says, else tae.
        model_config: keys to lay over that config, for every checkpoint.
        dtype: fp32 | fp16 | bf16.
        device: auto | ascend | gpu | cpu.
        mode: graph | pynative.
        seed: for sampling.
        sample_posterior: sample the latents; by default their mean is decoded.
        batch_size: clips of equal shape to run at once.
        num_frames: frames of a clip, from the beginning; by default the whole video. Images pass at any setting.
        frame_stride: take every n-th frame.
        image_size: short side after resizing, in pixels; 0 keeps the size of the video.
        crop: crop the middle to a square; otherwise the aspect is kept.
        enable_tile: run in tiles, which bounds the memory.
        tiling: where the tiles lie.
        compare: another checkpoint to show and measure beside, or a list of them.
        baseline: measure and show an area average at the model's compression, brought back by interpolation, too.
        save_videos: write reconstructions, originals and side-by-sides; otherwise metrics only.
        fps: frame rate to write; by default that of the video over `frame_stride`.
        num_workers: threads that read ahead.

    Raises:
        ValueError: a setting out of its range.
    """

    ckpt_path: str
    csv_path: str
    video_folder: str | None = None
    output_path: str = "samples/tae"
    model: str | None = None
    model_config: dict | None = None
    dtype: str = "fp32"
    device: str = "auto"
    mode: str = "graph"
    seed: int = 42
    sample_posterior: bool = False
    batch_size: int = 1
    num_frames: int | None = None
    frame_stride: int = 1
    image_size: int = 256
    crop: bool = True
    enable_tile: bool = False
    tiling: TilingConfig = field(default_factory=TilingConfig)
    compare: list[str] | str = field(default_factory=list)
    baseline: bool = False
    save_videos: bool = True
    fps: float | None = None
    num_workers: int = 2

    def __post_init__(self):
        for name in ("batch_size", "num_frames", "frame_stride", "num_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.image_size and self.image_size < SSIM_WINDOW:
            raise ValueError(f"image_size is {self.image_size}; it must be at least {SSIM_WINDOW}, or 0")
        if self.fps is not None and self.fps <= 0:
            raise ValueError(f"fps is {self.fps}; it must be positive")
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


@dataclass
class Clip:
    """A video as a model takes it, `x` (3, T, H, W) in [-1, 1], and where it came from."""

    result: Result
    x: np.ndarray
    fps: float
    still: bool


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

    with tqdm(total=len(rows), desc="clips", unit="clip") as progress:
        clips = _read_ahead(rows, results, config, progress)
        for batch, size in group_by_shape(clips, config.batch_size):
            x = np.stack([clip.x for clip in batch])  # (B, 3, T, H, W)
            outputs = {name: _reconstruct(model, x, size, config) for name, model in models.items()}
            if config.baseline:
                model = models[RECONSTRUCTION]
                outputs[BASELINE] = area_trilinear_baseline(x, model.temporal_compression, model.spatial_compression)
            for i, clip in enumerate(batch):
                _score_and_save(clip, {name: y[i] for name, y in outputs.items()}, folder, config)
                progress.update()

    _write_metrics(report, folder, config)
    return report


def load_models(config: InferenceConfig) -> dict[str, VideoAutoencoder]:
    """The model under "reconstruction" and the compared ones under their files' names, ready to run."""
    compared = unique([Path(path).stem for path in config.compare], taken=("original", RECONSTRUCTION, BASELINE))
    models = {}
    for label, path in zip([RECONSTRUCTION, *compared], [config.ckpt_path, *config.compare]):
        models[label] = from_pretrained(path, config.model, config.dtype, **(config.model_config or {}))
        if config.enable_tile:
            models[label].enable_tiling(**vars(config.tiling))
    return models


def reconstruct(model: VideoAutoencoder, x: np.ndarray, sample_posterior: bool = False) -> np.ndarray:
    """(B, 3, T, H, W) in [-1, 1] -> the model's reconstruction of the same shape, float32, clipped to that range"""
    t, h, w = x.shape[2:]
    z, mean, _ = model.encode(ms.Tensor(x))
    y = model.decode(z if sample_posterior else mean, num_target_frames=t)
    return np.clip(y.astype(ms.float32).asnumpy()[..., :h, :w], -1, 1)


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


def load_clip(path: Path, config: InferenceConfig) -> tuple[np.ndarray, float]:
    """A video or image as the model takes it.

    Returns:
        x (3, T, H, W), float32 in [-1, 1], and its frame rate.

    Raises:
        VideoError: the file cannot be decoded or has too few frames.
    """
    if is_image(path):
        frames, fps = read_image(path)[None], 1.0  # (T, H, W, C)
    else:
        video = open_video(path)
        indices = range(0, video.num_frames, config.frame_stride)[: config.num_frames]
        if len(indices) < (config.num_frames or 1):
            needed = ((config.num_frames or 1) - 1) * config.frame_stride + 1
            raise VideoError(f"{path}: the video has {video.num_frames} frames; {needed} are needed")
        frames, fps = video.read(list(indices)), video.fps / config.frame_stride
    if config.image_size:
        frames = resize_short_side(frames, config.image_size)
    if config.crop:
        frames = center_crop(frames, min(frames.shape[1:3]))
    return to_video_tensor(frames), config.fps or fps


def group_by_shape(clips: Iterable[Clip], batch_size: int) -> Iterator[tuple[list[Clip], int]]:
    """Batches of clips of one shape, each with the size that it is to be run at.

    A shape keeps the size of its first batch, and a later one that falls short is to be filled up to it, so that a
    compiled model meets one batch shape per clip shape. At most 4 * batch_size clips wait for company.
    """
    waiting: dict[tuple, list[Clip]] = {}
    sizes: dict[tuple, int] = {}

    def take(shape: tuple) -> tuple[list[Clip], int]:
        batch = waiting.pop(shape)
        return batch, sizes.setdefault(shape, len(batch))

    for clip in clips:
        shape = clip.x.shape
        waiting.setdefault(shape, []).append(clip)
        if len(waiting[shape]) == sizes.get(shape, batch_size):
            yield take(shape)
        elif sum(map(len, waiting.values())) >= 4 * batch_size:
            yield take(next(iter(waiting)))  # the shape that has waited longest
    while waiting:
        yield take(next(iter(waiting)))


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


def _read_ahead(rows: list[IndexRow], results: list[Result], config: InferenceConfig, progress: tqdm) -> Iterator[Clip]:
    """Clips in the order of the index, read by threads; what cannot be read is noted in its result."""
    with ThreadPoolExecutor(config.num_workers) as pool:
        pending = deque()
        for i in range(len(rows) + config.num_workers):
            if i < len(rows):
                pending.append((rows[i], results[i], pool.submit(load_clip, rows[i].path, config)))
            if i < config.num_workers:
                continue
            row, result, future = pending.popleft()
            try:
                x, fps = future.result()
            except (ValueError, OSError) as error:
                _fail(result, error)
                progress.update()
                continue
            result.frames, result.height, result.width = x.shape[1:]
            yield Clip(result, x, fps, is_image(row.path))


def _reconstruct(model: VideoAutoencoder, x: np.ndarray, size: int, config: InferenceConfig) -> np.ndarray:
    """`reconstruct` at a batch size of `size`, the last clip repeated to fill it."""
    filled = np.concatenate([x, np.repeat(x[-1:], size - len(x), axis=0)])
    return reconstruct(model, filled, config.sample_posterior)[: len(x)]


def _score_and_save(clip: Clip, outputs: dict[str, np.ndarray], folder: Path, config: InferenceConfig) -> None:
    result = clip.result
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
            write_video(path.with_name(path.name + ".mp4"), frames, clip.fps)


def _fail(result: Result, error: Exception) -> None:
    result.error = " ".join(str(error).split()) or type(error).__name__
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
