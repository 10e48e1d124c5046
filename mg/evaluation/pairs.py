"""Measure the videos and images of one folder against those of another, paired by name.

    OUTPUT/metrics.csv     one row per name: its measures, or why there are none
    OUTPUT/metrics.json    means, definitions of the measures, what was left out, counts, failures, and the config

Both sides are read the same way: the first frames, short side resized, centre-cropped, in [0, 1]. Measures are averaged
over the frames of a video, then over videos.
"""

import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from tqdm import tqdm

from mg import runtime
from mg.checkpoints import atomic_write
from mg.config import require, to_dict
from mg.data.clips import ClipOptions, load_clip
from mg.data.errors import VideoError, sparing
from mg.data.transforms import center_crop
from mg.data.video import IMAGE_SUFFIXES
from mg.evaluation.measures import Measures, MeasuresConfig
from mg.evaluation.table import Table, error_of
from mg.overlap import read_ahead
from mg.plain_text import one_line, printable, text_table

_logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = {
    ".3gp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm",
    ".wmv", ".y4m",
}  # fmt: skip


@dataclass(kw_only=True)
class EvaluateConfig(MeasuresConfig):
    """Measure the videos and images of a folder against those of the same names in another.

    Args:
        real_video_dir: folder of the originals.
        generated_video_dir: folder of the videos to measure.
        output_path: folder to write to; by default GENERATED_metrics, next to the folder of generated videos.
        num_frames: frames to compare, from the beginning; videos must have at least this many. By default whole videos,
            which must have equal length. Images are accepted at any value.
        frame_stride: take every n-th frame.
        sample_fps: frame rate of the videos, an option of the original. No measure depends on it; it is only recorded.
        image_size: short side after resizing, in pixels; 0 keeps the size of the files.
        crop_size: side of the square cropped from the middle; 0 keeps the whole frame.
        batch_size: pairs to read at the same time, ahead of measuring; it doesn't affect the results.
        device: for LPIPS; auto picks the first available of ascend, gpu and cpu; cuda is an alias of gpu.
        mode: graph compiles LPIPS once per shape, pynative runs op by op.

    Raises:
        ValueError: a setting is out of range.
    """

    aliases: ClassVar[dict[str, str]] = {"sample_rate": "frame_stride", "resolution": "image_size"}

    real_video_dir: str
    generated_video_dir: str
    output_path: str | None = None
    num_frames: int | None = None
    frame_stride: int = 1
    sample_fps: float | None = None
    image_size: int = 0
    crop_size: int = 0
    batch_size: int = 1
    device: Literal["auto", "ascend", "gpu", "cuda", "cpu"] = "auto"
    mode: Literal["auto", "graph", "pynative"] = "auto"

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_frames", "frame_stride", "batch_size"):
            require(getattr(self, name) is None or getattr(self, name) >= 1, self, name, "at least 1")
        for name in ("image_size", "crop_size"):
            require(getattr(self, name) >= 0, self, name, "at least 1, or 0")
        if 0 < self.image_size < self.crop_size:
            raise ValueError(f"crop_size is {self.crop_size}; it must be at most image_size, {self.image_size}")
        require(self.sample_fps is None or self.sample_fps > 0, self, "sample_fps", "above 0")
        self.device = "gpu" if self.device == "cuda" else self.device
        self.output_path = self.output_path or f"{os.path.abspath(self.generated_video_dir)}_metrics"


@dataclass
class Pair:
    """One name: its files (None if missing), and its measures or the error that prevented them."""

    name: str
    real: Path | None
    generated: Path | None
    frames: int = 0
    height: int = 0
    width: int = 0
    measures: dict[str, float] = field(default_factory=dict)
    error: str = ""

    @property
    def status(self) -> str:
        if self.real is None or self.generated is None:
            return "unpaired"
        return "error" if self.error else "ok"


@dataclass
class Folders:
    """The contents of two folders: a row per name, sorted, and per folder the files that are neither videos nor
    images."""

    rows: list[Pair]
    others: dict[Path, list[str]]


@dataclass
class PairsReport:
    """Measured rows. `names` are the measures used, `left_out` the unavailable ones. `unwritten` is set if the metrics
    could not be written; they are here in any case."""

    names: list[str]
    left_out: dict[str, str]
    described: dict[str, str]
    folders: Folders
    unwritten: OSError | None = None

    def rows(self, status: str) -> list[Pair]:
        """The rows with a status: ok, error or unpaired."""
        return [row for row in self.folders.rows if row.status == status]

    def values(self, name: str) -> list[float]:
        """The values of a measure, for the rows that have it."""
        return [row.measures[name] for row in self.rows("ok") if name in row.measures]

    def means(self) -> dict[str, float]:
        """The mean of each measure over the rows that have it; without the measures that no row has."""
        return {name: float(np.mean(self.values(name))) for name in self.names if self.values(name)}


def find_pairs(real: str | Path, generated: str | Path) -> Folders:
    """Pair the videos and images of two folders by their names without suffix. Hidden files are ignored.

    A name that only one folder has, or that one folder has twice, becomes a row with an error.

    Raises:
        ValueError: one of the folders does not exist.
    """
    folders = [Path(real), Path(generated)]
    sides, others = zip(*map(_list_files, folders))
    rows = []
    for name in sorted({*sides[0], *sides[1]}):
        found = [side.get(name, []) for side in sides]
        errors = [one_line(_fault(folder, files)) for folder, files in zip(folders, found) if len(files) != 1]
        real, generated = (files[0] if files else None for files in found)
        rows.append(Pair(name, real, generated, error="; ".join(errors)))
    return Folders(rows, {folder: names for folder, names in zip(folders, others) if names})


def _fault(folder: Path, files: list[Path]) -> str:
    if not files:
        return f"nothing of this name in {folder}"
    return f"{folder} has {' and '.join(file.name for file in files)} of this name"


def _list_files(folder: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """The videos and images of a folder by their names without suffix, and its other files."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    named: dict[str, list[Path]] = {}
    others = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_file() and path.suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
            named.setdefault(path.stem, []).append(path)
        else:
            others.append(path.name)
    return named, others


def evaluate_folders(config: EvaluateConfig) -> PairsReport:
    """Measure every pair and write the metrics under `config.output_path`.

    A pair that cannot be read or compared becomes a row with an error; the others continue. Rows of metrics.csv are
    written as they come.

    Raises:
        ValueError, OSError: before anything is measured, if a folder is missing or cannot be written, or no measure is
            available.
    """
    folders = find_pairs(config.real_video_dir, config.generated_video_dir)
    measures = Measures(config)
    if not measures.names:
        raise ValueError(f"nothing can be measured: {'; '.join(dict.fromkeys(measures.left_out.values()))}")
    folder = Path(config.output_path)
    table = Table(folder / "metrics.csv", _columns(measures.names))
    (folder / "metrics.json").unlink(missing_ok=True)  # from an earlier run; written again at the end
    rows = [row for row in folders.rows if not row.error]
    with runtime.CtrlC() as ctrl_c:
        for row, pair in tqdm(_read_ahead(rows, config), total=len(rows), desc="pairs", unit="pair"):
            with sparing(partial(_fail, row)):
                real, generated = pair.result()
                _check_comparable(real, generated)
                row.frames, row.height, row.width = real.shape[:3]
                row.measures = measures.of(real, generated)
            table.add(_cells(row, measures.names, config))
            ctrl_c.check()
    report = PairsReport(measures.names, measures.left_out, measures.describe(), folders)
    report.unwritten = error_of(lambda: _write_metrics(report, config, table))
    return report


def _fail(row: Pair, error: Exception) -> None:
    row.error = one_line(error)
    _logger.warning("%s: %s", printable(row.name), row.error)


def read_frames(path: Path, config: EvaluateConfig) -> np.ndarray:
    """The frames of a video or image to compare, float32 (T, H, W, 3) in [0, 1].

    Raises:
        VideoError: the file cannot be decoded, or has too few or too small frames.
    """
    options = ClipOptions(
        num_frames=config.num_frames, frame_stride=config.frame_stride, image_size=config.image_size, crop=False
    )
    x, _ = load_clip(path, options)
    frames = (x.transpose(1, 2, 3, 0) + 1) / 2  # (T, H, W, 3)
    if config.crop_size:
        if min(frames.shape[1:3]) < config.crop_size:
            raise VideoError(f"{path}: frames of {_size(frames)} are smaller than crop_size, {config.crop_size}")
        frames = center_crop(frames, config.crop_size)
    return frames


def format_table(report: PairsReport, config: EvaluateConfig) -> str:
    """Every measured pair, the means, the measures' definitions, and what was left out, failed or unpaired, as text."""
    titles = {"flolpips": f"flolpips ({config.flow})"}
    lines = [["video", *(titles.get(name, name) for name in report.names)]]
    entries = [(row.name, row.measures) for row in report.rows("ok")]
    for name, values in [*entries, ("mean", report.means())] if entries else []:
        lines.append([printable(name), *(_figure(key, values) for key in report.names)])
    text = text_table(lines)
    text += [f"{name}: {line}" for name, line in report.described.items()]
    for name, values in ((name, report.values(name)) for name in report.names):
        if len(values) < len(entries):
            text.append(f"{name}: for {len(values)} of {len(entries)} pairs; a single frame has none")
    text += [f"left out: {name}: {reason}" for name, reason in report.left_out.items()]
    text += [f"failed: {printable(row.name)}: {row.error}" for row in report.rows("error")]
    text += [f"unpaired: {printable(row.name)}: {row.error}" for row in report.rows("unpaired")]
    for folder, names in report.folders.others.items():
        shown = ", ".join(map(printable, names[:3])) + ", ..." * (len(names) > 3)
        text.append(f"ignored in {folder}: {len(names)} that are neither videos nor images by suffix ({shown})")
    return "\n".join(text)


def _read_ahead(rows: list[Pair], config: EvaluateConfig) -> Iterator[tuple[Pair, Future]]:
    """Rows in order, each with a future of the frames of its two files."""
    with ThreadPoolExecutor(config.batch_size) as pool:
        yield from read_ahead(lambda row: pool.submit(_read_pair, row, config), rows, config.batch_size)


def _read_pair(row: Pair, config: EvaluateConfig) -> tuple[np.ndarray, np.ndarray]:
    return read_frames(row.real, config), read_frames(row.generated, config)


def _check_comparable(real: np.ndarray, generated: np.ndarray) -> None:
    if real.shape[1:] != generated.shape[1:]:
        raise ValueError(
            f"frames of {_size(real)} and {_size(generated)} cannot be compared; image_size and crop_size bring them "
            "to the same size"
        )
    if len(real) != len(generated):
        raise ValueError(
            f"{len(real)} and {len(generated)} frames cannot be compared; num_frames sets how many to compare"
        )


def _size(frames: np.ndarray) -> str:
    return f"{frames.shape[2]}x{frames.shape[1]}"


def _figure(name: str, values: dict[str, float]) -> str:
    return f"{values[name]:.{2 if name == 'psnr' else 4}f}" if name in values else "-"


def _columns(names: list[str]) -> list[str]:
    flow = ["flow"] if "flolpips" in names else []  # next to the measure that uses it
    return ["name", "real", "generated", "status", "frames", "height", "width", *names, *flow, "error"]


def _cells(row: Pair, names: list[str], config: EvaluateConfig) -> list:
    files = [file.name if file else "" for file in (row.real, row.generated)]
    values = [row.measures.get(name, "") for name in names]
    values += [config.flow if "flolpips" in row.measures else ""] * ("flolpips" in names)
    return [row.name, *files, row.status, row.frames, row.height, row.width, *values, row.error]


def _write_metrics(report: PairsReport, config: EvaluateConfig, table: Table) -> None:
    folder = Path(config.output_path)
    table.write([_cells(row, report.names, config) for row in report.folders.rows])  # in the order of their names
    summary = {
        "names": len(report.folders.rows),
        "measured": len(report.rows("ok")),
        "failed": len(report.rows("error")),
        "unpaired": len(report.rows("unpaired")),
        "mean": report.means(),
        "videos": {name: len(report.values(name)) for name in report.names},
        "measures": report.described,
        "left_out": report.left_out,
        "failures": [{"name": row.name, "error": row.error} for row in report.rows("error")],
        "unpaired_names": [{"name": row.name, "error": row.error} for row in report.rows("unpaired")],
        "not_looked_at": {str(folder): names for folder, names in report.folders.others.items()},
        "config": to_dict(config),
    }
    with atomic_write(folder / "metrics.json") as path:
        path.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
