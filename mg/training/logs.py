"""A run's logs: a progress bar, log.jsonl, validation.jsonl, speed.jsonl, TensorBoard scalars, and a loss curve (PNG).

What a run computes is a function of its config and goes to log.jsonl and validation.jsonl; timings are not, and are
kept separately.
"""

import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import scalar
from tqdm import tqdm

from mg.checkpoints import atomic_write, naming
from mg.plain_text import split_lines

_logger = logging.getLogger(__name__)

VALIDATION_FILE = "validation.jsonl"

# What the curve shows, and its unit: the first of these that a run's loss has.
CURVES = {
    "l1": "mean absolute error, pixels in [-1, 1]",
    "l2": "mean squared error, pixels in [-1, 1]",
    "latent": "absolute error of the first stage's latents, summed over a frame",
    "loss": "loss",
}


class Tracker(Protocol):
    """A service that records a run in addition to these files, e.g. mg.training.wandb_run. Its methods never raise."""

    def begin(self) -> None: ...
    def add(self, step: int, scalars: dict[str, float]) -> None: ...
    def add_image(self, step: int, name: str, path: Path) -> None: ...
    def close(self, failed: bool) -> None: ...


class RunLog:
    """Writes the scalars of every update to `folder`; on resume, drops those from `start_step` on.

    A non-finite scalar is null in a log and omitted from TensorBoard. validation.jsonl exists only once something has
    been validated. As a context manager it closes itself at the end, and tells the trackers whether the run failed.
    """

    def __init__(self, folder: Path, start_step: int, total_steps: int, trackers: Sequence[Tracker] = ()):
        self.folder = folder
        self._log = _JsonLines(folder / "log.jsonl", start_step)
        self._speed_log = _JsonLines(folder / "speed.jsonl", start_step)
        self._start_step = start_step
        self._validation_log: _JsonLines | None = None
        self._points: dict[str, list] = {name: [] for name in CURVES}
        self._validation_points: list[tuple[int, float]] = []
        # A kill may lose points that were not written yet: they are restored from log.jsonl.
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        (folder / "tensorboard").mkdir()
        # Not SummaryWriter: when the disk is full its thread dies, and the process waits for it forever.
        self._board = EventsWriter(str(folder / "tensorboard" / "events"))
        for record in self._log.kept:
            self._draw(record)
        for record in self._speed_log.kept:
            self._draw(_under("speed", record))
        if (folder / VALIDATION_FILE).exists():
            self._opened_validation_log()
        self._trackers = trackers
        for tracker in trackers:
            tracker.begin()
        self._bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind, *exception) -> None:
        self.close(failed=kind is not None)

    def add(self, step: int, scalars: dict[str, float], speed: dict[str, float] | None = None) -> None:
        """Record update number `step`, counted from 0; `speed` is what SpeedMeter.scalars returns."""
        record, measured = {"step": step, **_finite(scalars)}, {"step": step, **(speed or {})}
        self._log.add(record)
        self._draw(record)
        if speed:
            self._speed_log.add(measured)
            self._draw(_under("speed", measured))
        for tracker in self._trackers:
            points = {**record, **_under("speed", measured)}
            tracker.add(step, {name: x for name, x in points.items() if name != "step" and x is not None})
        shown = {"loss": f"{scalars['loss']:{'.1f' if scalars['loss'] >= 10 else '.4f'}}"}
        shown |= {name: f"{scalars[name]:.4f}" for name in ("l1", "l2") if name in scalars}
        if "frames_per_second" in measured:
            shown |= {"frames/s": f"{measured['frames_per_second']:.3g}", "data_wait": f"{measured['data_wait']:.0%}"}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def validate(self, step: int, scalars: dict[str, float]) -> None:
        """Record what was measured after `step` updates, including the `loss`."""
        record = {"step": step, **_finite(scalars)}
        self._opened_validation_log().add(record)
        self._draw_validation(record)
        points = _under("validation", record)
        for tracker in self._trackers:
            tracker.add(step, {name: x for name, x in points.items() if name != "step" and x is not None})
        self.say(f"update {step}: validation loss {scalars['loss']:.4f}")

    def add_image(self, step: int, name: str, path: Path) -> None:
        """Send the trackers a picture that was drawn at update number `step`."""
        for tracker in self._trackers:
            tracker.add_image(step, name, path)

    def say(self, line: str, level: int = logging.INFO) -> None:
        """Log a line, above the bar."""
        with self._bar.external_write_mode(file=sys.stderr):
            _logger.log(level, line)

    def save(self) -> None:
        """Flush everything to disk and draw the curve so far: a checkpoint must not be ahead of the log."""
        for log in self._logs():
            log.save()
        with naming(self.folder / "tensorboard"):
            self._board.flush()
        name = next((name for name in CURVES if self._points[name]), "l1")
        draw_curve(self._points[name], CURVES[name], self.folder / "loss.png", self._validation_points)

    def close(self, failed: bool = False) -> None:
        self._bar.close()
        try:
            self.save()
            for log in self._logs():
                log.close()
            self._board.close()
        finally:  # last: it may wait for uploads
            for tracker in self._trackers:
                tracker.close(failed)

    def _logs(self) -> list["_JsonLines"]:
        return [log for log in (self._log, self._speed_log, self._validation_log) if log is not None]

    def _opened_validation_log(self) -> "_JsonLines":
        if self._validation_log is None:
            self._validation_log = _JsonLines(self.folder / VALIDATION_FILE, self._start_step)
            for record in self._validation_log.kept:
                self._draw_validation(record)
        return self._validation_log

    def _draw_validation(self, record: dict) -> None:
        if record["loss"] is not None:
            self._validation_points.append((record["step"], record["loss"]))
        self._show(_under("validation", record))

    def _draw(self, record: dict) -> None:
        """Add an update to the curve and to TensorBoard."""
        for name, points in self._points.items():
            if record.get(name) is not None:
                points.append((record["step"], record[name]))
        self._show(record)

    def _show(self, record: dict) -> None:
        """Add a record to TensorBoard."""
        for name, value in record.items():
            if name != "step" and value is not None:
                event = Event(wall_time=time.time(), step=record["step"], summary=scalar(name, value))
                with naming(self.folder / "tensorboard"):
                    self._board.write_event(event)


class _JsonLines:
    """A file with one record per update or measurement; only those before `start_step` are kept."""

    def __init__(self, path: Path, start_step: int):
        self.path = path
        self.kept = read_log(path, start_step)
        with atomic_write(path) as partial:
            partial.write_text("".join(json.dumps(record) + "\n" for record in self.kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  # until `close`

    def add(self, record: dict) -> None:
        with naming(self.path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def save(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _finite(scalars: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in scalars.items()}


def _under(group: str, record: dict) -> dict:
    """A record with names of its own group, so that TensorBoard and others show it apart from the losses."""
    return {name if name == "step" else f"{group}/{name}": value for name, value in record.items()}


def read_log(path: Path, before_step: int) -> list[dict]:
    """The records of a log before `before_step`; a last line that a kill cut short is skipped."""
    records = []
    for line in split_lines(path.read_text(encoding="utf-8")) if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record["step"] < before_step:
            records.append(record)
    return records


def draw_curve(
    points: list[tuple[int, float]], unit: str, path: Path, validation: Sequence[tuple[int, float]] = ()
) -> None:
    """Plot a measure over the updates with its running mean, and the validation loss, as a PNG; points are
    (update, value)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    if points:
        steps, values = np.array(points).T
        window = max(1, len(values) // 20)
        sums = np.concatenate(([0.0], np.cumsum(values)))
        ends = np.arange(1, len(values) + 1)
        starts = np.maximum(ends - window, 0)
        axes.plot(steps, values, color="0.75", linewidth=0.8, label="every update")
        axes.plot(steps, (sums[ends] - sums[starts]) / (ends - starts), color="tab:blue", label=f"mean of {window}")
    if validation:
        axes.plot(*np.array(validation).T, color="tab:orange", marker=".", label="validation")
    if points or validation:
        axes.set_yscale("log")
        axes.legend()
    axes.set_xlabel("update")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=120)
