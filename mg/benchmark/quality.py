"""Reconstruct the same clips with several models, and measure quality, speed and memory.

Under the output folder:

    results.csv     one row per video and model, written once it is measured, so that a killed run can be resumed
    summary.json    means, counts, failures, compression, speed and memory per model, and how all this was measured
    report.html     the same to look at, with the worst, median and best clip, in a single file
    settings.json   what the rows depend on: resuming with other settings is refused
    clips/          original/, and reconstruction/ and error_map/ by model: the pictures for the report

Models run one after the other, one clip at a time. A clip that cannot be read or reconstructed becomes a row with an
error, a model that cannot be built a line in the summary; the others continue.
"""

import hashlib
import json
import logging
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np
from tqdm import tqdm

from mg import runtime
from mg.benchmark.contestants import DCT, Baseline, Contestant, Timed, as_option, read_models
from mg.benchmark.report import ERROR_MAP, ERROR_MAP_RANGE, ORIGINAL, RECONSTRUCTION, clip_file, write_report
from mg.benchmark.results import OK, ResultRow, Results, read_rows, write_settings
from mg.benchmark.summary import summarize
from mg.checkpoints import atomic_write
from mg.config import PATH_ALIASES, require
from mg.data.clips import Clip, ClipOptions, read_clips
from mg.data.errors import sparing
from mg.data.index import IndexRow, read_index
from mg.data.transforms import to_uint8_frames
from mg.evaluation.measures import Measures, MeasuresConfig
from mg.evaluation.metrics import SSIM_WINDOW
from mg.evaluation.table import error_of
from mg.inference.outputs import output_names, write_frames
from mg.inference.reconstruction import InferenceConfig
from mg.plain_text import name_bytes, one_line, printable
from mg.settings import check_settings

_logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class BenchmarkConfig(MeasuresConfig, ClipOptions):
    """Reconstruct the same clips with several models, and measure quality, speed and memory.

    Args:
        csv_path: CSV with a column `video` or `path`.
        models: one or more inference configs, metrics.json files of mg-reconstruct runs, and checkpoints.
            FILE.yaml=CHECKPOINT gives a config other weights, or those that it does not name. Only the model and its
            tiles are taken from a file; clips are set by the options here.
        baseline: baselines to measure as well: area averages over cells of frames x pixels, such as 8x8, interpolated
            back; and dct, a cosine transform of 8x8x8 blocks that keeps 16 values of each.
        output_path: folder to write to.
        resume: continue from the rows in the folder; otherwise they are discarded.
        retry_failed: retry the clips whose rows have an error.

    Raises:
        ValueError: a setting is out of range.
    """

    aliases: ClassVar[dict[str, str]] = PATH_ALIASES

    csv_path: str
    models: list[str]
    baseline: list[str] = field(default_factory=list)
    output_path: str = "outputs/benchmark"
    resume: bool = True
    retry_failed: bool = False

    def __post_init__(self):
        MeasuresConfig.__post_init__(self)
        ClipOptions.__post_init__(self)
        require(bool(self.models), self, "models", "one or more inference configs or checkpoints")
        large_enough = self.image_size == 0 or self.image_size >= SSIM_WINDOW
        require(large_enough, self, "image_size", f"at least {SSIM_WINDOW}, or 0")
        for text in self.baseline:
            sizes = text.split("x")
            right = text == DCT or (len(sizes) == 2 and all(size.isdecimal() and int(size) for size in sizes))
            require(right, self, "baseline", f"one or more cells, frames x pixels, such as 8x8, or {DCT}")


@dataclass
class Benchmark:
    """The result of a run: `rows` of all models and videos, by model and in the order of the index, and the `summary`.
    `unwritten` is set if a file could not be written."""

    rows: list[ResultRow]
    summary: dict
    report: Path
    unwritten: OSError | None = None

    @property
    def complete(self) -> bool:
        """Whether every model reconstructed every clip."""
        return all(model["succeeded"] == self.summary["videos"] for model in self.summary["models"].values())


def run_benchmark(config: BenchmarkConfig) -> Benchmark:
    """Measure all models on all clips that have no rows in `config.output_path` yet; write summary and report.

    Raises:
        ValueError, OSError: before anything is measured, if the index, a model's file or old results cannot be used.
    """
    index = read_index(config.csv_path, config.video_folder)
    outputs = output_names([row.name for row in index])
    contestants = read_models(config.models, config.baseline)
    measures = Measures(config)
    folder = Path(config.output_path)
    path = folder / "results.csv"
    settings = _settings(config, index, contestants, measures)
    there = read_rows(path) if config.resume else []
    rows = {(row.model, row.output): row for row in there if row.ok or not config.retry_failed}
    if there:
        check_settings(folder / "settings.json", settings)
    write_settings(folder / "settings.json", settings)
    results = Results(path, rows.values())  # drops a truncated last row

    broken = {}
    for contestant in contestants:
        todo = [i for i, output in enumerate(outputs) if (contestant.label, output) not in rows]
        if not todo:
            continue
        runtime.release_memory()
        try:
            model = (
                Baseline(contestant.baseline)
                if contestant.config is None
                else Timed(contestant.config, config.max_memory)
            )
        except Exception as error:  # of any kind: the other models continue
            broken[contestant.label] = one_line(error)
            _logger.warning("%s: %s", contestant.label, one_line(error))
            continue
        blank = [ResultRow(index[i].name, outputs[i], contestant.label) for i in todo]
        for row in _measure(model, [index[i] for i in todo], blank, config, measures, folder / "clips"):
            results.add(row)
            rows[row.model, row.output] = row
        del model

    ordered = [rows[key] for key in ((c.label, output) for c in contestants for output in outputs) if key in rows]
    summary = summarize(ordered, settings, measures, broken)

    def write() -> None:
        results.save()
        with atomic_write(folder / "summary.json") as path:
            path.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        write_report(folder / "report.html", summary, ordered, folder / "clips")

    return Benchmark(ordered, summary, folder / "report.html", error_of(write))


def report_command(config: InferenceConfig) -> str:
    """The command that makes a report for the models and clips of a run of `mg-reconstruct`."""
    run = f"{Path(config.output_path) / 'metrics.json'}"
    words = ["--csv_path", config.csv_path, "--models", run, *(f"{run}={checkpoint}" for checkpoint in config.compare)]
    for option in fields(ClipOptions):
        value = getattr(config, option.name)
        if value != option.default:
            words += [f"--{option.name}", as_option(value)]
    words += ["--output_path", str(Path(config.output_path) / "benchmark")]
    return shlex.join(["mg-benchmark", *words])


def _settings(
    config: BenchmarkConfig, index: list[IndexRow], contestants: list[Contestant], measures: Measures
) -> dict:
    """What rows depend on; rows with other settings must not be mixed."""
    names = "\n".join(row.name for row in index)
    return {
        "videos": {
            "count": len(index),
            "names": hashlib.sha256(name_bytes(names)).hexdigest(),
            "folder": str(Path(config.video_folder or Path(config.csv_path).parent).resolve()),
        },
        "clips": config.describe(),
        "measures": measures.describe(),
        "device": runtime.device(),
        "mode": "graph" if runtime.is_graph_mode() else "pynative",
        "models": {contestant.label: contestant.settings for contestant in contestants},
    }


def _measure(
    model: Timed | Baseline,
    index: list[IndexRow],
    rows: list[ResultRow],
    config: BenchmarkConfig,
    measures: Measures,
    folder: Path,
) -> Iterator[ResultRow]:
    """Fill the `rows`, one for each row of the index, and yield them as they are done."""
    done = []
    with tqdm(total=len(rows), desc=rows[0].model, unit="clip") as progress, runtime.CtrlC() as ctrl_c:

        def on_error(number: int, error: Exception) -> None:
            rows[number].error = one_line(error)
            _logger.warning("%s: %s: %s", rows[number].model, printable(rows[number].name), rows[number].error)
            done.append(rows[number])

        def take() -> Iterator[ResultRow]:
            yield from done
            progress.update(len(done))
            done.clear()

        for clip in read_clips(index, config, on_error):
            yield from take()
            with sparing(partial(on_error, clip.index)):
                _fill(rows[clip.index], model, clip, measures, folder)
                ctrl_c.hold()
                done.append(rows[clip.index])
            yield from take()
            ctrl_c.check()
        yield from take()


def _fill(row: ResultRow, model, clip: Clip, measures: Measures, folder: Path) -> None:
    row.frames, row.height, row.width = clip.x.shape[1:]
    row.fps = clip.fps or 1.0
    found = model(clip.x)
    y = np.clip(found.y, -1, 1)
    real, generated = ((video.transpose(1, 2, 3, 0) + 1) / 2 for video in (clip.x, y))  # (T, H, W, 3)
    figures = measures.of(real, generated)
    write_frames(clip_file(folder, row, ORIGINAL), to_uint8_frames(clip.x), row.fps)
    write_frames(clip_file(folder, row, RECONSTRUCTION), to_uint8_frames(y), row.fps)
    write_frames(clip_file(folder, row, ERROR_MAP), error_map(real, generated), row.fps)
    for name, value in {**figures, **found.took}.items():
        setattr(row, name, value)
    row.flow = measures.config.flow if "flolpips" in figures else ""
    row.latents = "x".join(map(str, found.latents))
    row.cell = "x".join(map(str, (*model.cell, model.cell[1])))
    row.status = OK


def error_map(real: np.ndarray, generated: np.ndarray) -> np.ndarray:
    """The absolute difference, averaged over channels, colour-mapped from black at 0 up to `ERROR_MAP_RANGE`.

    Args:
        real, generated: floats (T, H, W, 3) in [0, 1].

    Returns:
        uint8 (T, H, W, 3).
    """
    levels = np.abs(real - generated).mean(-1) * (255 / ERROR_MAP_RANGE)  # (T, H, W)
    levels = np.rint(np.clip(levels, 0, 255)).astype(np.uint8)
    return np.stack([cv2.cvtColor(cv2.applyColorMap(x, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB) for x in levels])
