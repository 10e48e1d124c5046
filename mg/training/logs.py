"""What a run says of itself: a progress bar, log.jsonl, TensorBoard scalars, and a loss curve as PNG."""

import json
import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import scalar
from tqdm import tqdm

from mg.checkpoints import atomic_write, naming

# What the curve may be of, and its unit: the first of these that a run's loss has.
MEASURES = {
    "l1": "mean absolute error, pixels in [-1, 1]",
    "latent": "absolute error of the first stage's latents, summed over a frame",
}


class RunLog:
    """Writes the scalars of every update below `folder`; on resume, drops those at and after `start_step`.

    A scalar that is not finite stands in log.jsonl as null, and is no point in TensorBoard.
    """

    def __init__(self, folder: Path, start_step: int, total_steps: int):
        self.folder = folder
        self.path = folder / "log.jsonl"
        records = read_log(self.path, start_step)
        with atomic_write(self.path) as partial:
            partial.write_text("".join(json.dumps(record) + "\n" for record in records))
        self._points: dict[str, list] = {name: [] for name in MEASURES}
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  # until `close`
        # A kill may take points that were not written yet: they come from log.jsonl again.
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        (folder / "tensorboard").mkdir()
        # Not SummaryWriter, whose thread dies when the disk is full, and then the process waits for it forever.
        self._board = EventsWriter(str(folder / "tensorboard" / "events"))
        for record in records:
            self._draw(record)
        self._bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True)

    def add(self, step: int, scalars: dict[str, float]) -> None:
        """Record update number `step`, counted from 0."""
        finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        record = {"step": step, **finite}
        with naming(self.path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        self._draw(record)
        shown = {"loss": f"{scalars['loss']:.1f}"}
        if "l1" in scalars:
            shown["l1"] = f"{scalars['l1']:.4f}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def save(self) -> None:
        """See all of it to the disk, and draw the curve so far: a checkpoint must not be ahead of the log."""
        os.fsync(self._file.fileno())
        with naming(self.folder / "tensorboard"):
            self._board.flush()
        name = next((name for name in MEASURES if self._points[name]), "l1")
        draw_curve(self._points[name], MEASURES[name], self.folder / "loss.png")

    def close(self) -> None:
        self._bar.close()
        self.save()
        self._file.close()
        self._board.close()

    def _draw(self, record: dict) -> None:
        """Add an update to the curve and to TensorBoard."""
        for name, points in self._points.items():
            if record.get(name) is not None:
                points.append((record["step"], record[name]))
        for name, value in record.items():
            if name != "step" and value is not None:
                event = Event(wall_time=time.time(), step=record["step"], summary=scalar(name, value))
                with naming(self.folder / "tensorboard"):
                    self._board.write_event(event)


def read_log(path: Path, before_step: int) -> list[dict]:
    """The records of log.jsonl up to `before_step`; a last line that a kill cut short is passed over."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record["step"] < before_step:
            records.append(record)
    return records


def draw_curve(points: list[tuple[int, float]], unit: str, path: Path) -> None:
    """A measure over the updates, (update, value) each, with its running mean, as a PNG."""
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
        axes.set_yscale("log")
        axes.legend()
    axes.set_xlabel("update")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=120)
