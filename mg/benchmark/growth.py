"""How the cost of a model grows with frames, frame area and batch size."""

import logging
import math
from dataclasses import replace
from pathlib import Path

from mg.benchmark.speed import SpeedConfig, describe, measure, set_up, size_of, write
from mg.benchmark.speed_worker import WorkerError
from mg.checkpoints import atomic_write

_logger = logging.getLogger(__name__)

AXES = {"frames": "frames", "area": "pixels of a frame", "batch": "clips at once"}


def measure_growth(config: SpeedConfig) -> dict:
    """Measure models at sizes `growth` times their first one, rewrite `growth.json` after each size, so that a killed
    run keeps its results so far, and write a plot for each model.

    Only the first engine and precision are measured, and no peer.

    Returns:
        As `mg.benchmark.speed.measure_speed`, but a record also has an "axis", frames | area | batch, its "factor",
        and the "first" size. The first size, shared by all axes, is measured once.

    Raises:
        ValueError: the device is not available.
    """
    device = set_up(config)
    found, folder = describe(config), Path(config.output_path)
    for first in config.jobs(device):
        shapes = {(axis, factor): grown(first.shape, axis, factor) for axis in AXES for factor in {1, *config.growth}}
        measured = {}
        for (axis, factor), shape in sorted(shapes.items()):
            if shape not in measured:
                label = f"{first.model} {shape[0]} x {size_of(shape)} {first.part}"
                _logger.info("%s", label)
                try:
                    measured[shape] = measure(replace(first, shape=shape), config, "not measured with growth", False)
                except WorkerError as error:
                    _logger.warning("%s: %s", label, error)
                    found["failed"].append(f"{label}: {error}")
                    measured[shape] = None
            if measured[shape] is not None:
                place = {"axis": axis, "factor": factor, "first": size_of(first.shape)}
                found["records"].append(measured[shape] | place)
            write(found, folder / "growth.json")
    for model in {record["model"]: None for record in found["records"]}:
        with atomic_write(folder / f"growth_{model}.png") as path:
            plot([record for record in found["records"] if record["model"] == model], path)
    return found


def grown(shape: tuple[int, ...], axis: str, factor: int) -> tuple[int, ...]:
    """(B, C, T, H, W) with `factor` times the frames, clips or area, as close to square as the factor allows."""
    b, c, t, h, w = shape
    if axis == "frames":
        return b, c, t * factor, h, w
    if axis == "batch":
        return b * factor, c, t, h, w
    down = next(side for side in range(math.isqrt(factor), 0, -1) if factor % side == 0)
    return b, c, t, h * down, w * (factor // down)


def plot(records: list[dict], path: Path) -> None:
    """Plot seconds per call, operations and the process's peak memory by frames, area and batch, as a PNG; figures that
    were not measured have no row. All axes are logarithmic; dotted lines show proportional growth."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = {"seconds": "seconds", "operations": "GFLOP", "peak_rss_mb": "peak memory, MB"}
    rows = {key: name for key, name in rows.items() if any(_value(record, key) is not None for record in records)}
    figure = Figure(figsize=(11, 3 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), len(AXES), sharey="row", squeeze=False)
    curves = list(dict.fromkeys((record["part"], record["first"]) for record in records))
    for column, (axis, label) in enumerate(AXES.items()):
        for row, (key, name) in enumerate(rows.items()):
            panel = axes[row][column]
            for number, (part, first) in enumerate(curves):
                points = [
                    (_extent(record, axis), value)
                    for record in records
                    if (record["part"], record["first"], record["axis"]) == (part, first, axis)
                    and (value := _value(record, key)) is not None
                ]
                if not points:
                    continue
                xs, ys = zip(*points)
                panel.plot(xs, ys, "o-", color=f"C{number}", label=f"{part}, from {first}")
                if key != "peak_rss_mb":
                    panel.plot(xs, [ys[0] * x / xs[0] for x in xs], ":", color=f"C{number}", linewidth=0.8)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log", base=2)
            panel.grid(alpha=0.3)
            panel.xaxis.set_major_formatter(_plain)
            panel.yaxis.set_major_formatter(_plain)
            if column == 0:
                panel.set_ylabel(name)
            if row == len(rows) - 1:
                panel.set_xlabel(label)
    axes[0][0].legend()
    figure.suptitle(records[0]["model"])
    figure.savefig(path, format="png", dpi=100)


def _plain(value: float, _=None) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _extent(record: dict, axis: str) -> int:
    frames, height, width = map(int, record["size"].split("x"))
    return {"frames": frames, "area": height * width, "batch": record["batch"]}[axis]


def _value(record: dict, key: str) -> float | None:
    if key != "operations":
        return record[key]
    frames = record["batch"] * _extent(record, "frames")
    return record["operations_per_frame"] and record["operations_per_frame"] * frames / 1e9
