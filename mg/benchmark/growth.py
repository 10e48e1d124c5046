"""How the cost of a model, and of its peer, grows with frames, frame area and batch size."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

from mg.benchmark.plots import COLORS, STYLE
from mg.benchmark.speed import SpeedConfig, describe, measure, no_peers, row_of, set_up, size_of
from mg.checkpoints import atomic_write

AXES = {"frames": "frames", "area": "pixels of a frame", "batch": "clips at once"}


def measure_growth(config: SpeedConfig) -> dict:
    """Measure models at sizes `growth` times their first one, rewrite `growth.json` after each size, so that a killed
    run keeps its results so far, and write a plot for each model.

    Only the first engine and precision are measured; peers take turns with the models as in `measure_speed`.

    Returns:
        As `mg.benchmark.speed.measure_speed`, but a record also has an "axis", frames | area | batch, its "factor",
        and the "first" size. The first size, shared by all axes, is measured once.

    Raises:
        ValueError: the device is not available.
    """
    device = set_up(config.device, config.mode)
    found, folder = describe(config), Path(config.output_path)
    no_peer = no_peers(config, device)
    if config.peer and no_peer:
        found["skipped"].append(f"no peers: {no_peer}")
    for first in config.jobs(device):
        points: dict[tuple[int, ...], list[dict]] = {}  # of the curves, by the shape to measure
        for axis, factor in product(sorted(AXES), sorted({1, *config.growth})):
            point = {"axis": axis, "factor": factor, "first": size_of(first.shape)}
            points.setdefault(grown(first.shape, axis, factor), []).append(point)
        for shape, there in points.items():
            with row_of(found, f"{first.model} {shape[0]} x {size_of(shape)} {first.part}", folder / "growth.json"):
                record = measure(replace(first, shape=shape), config, no_peer, False)
                found["records"] += [record | point for point in there]
    for model in {record["model"]: None for record in found["records"]}:
        with atomic_write(folder / f"growth_{model}.svg") as path:
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
    """Plot seconds per call, operations and peak memory by frames, area and batch, as an SVG: the model's in solid
    lines, its peer's in dashed ones; figures that were not measured have no row. Axes are logarithmic, but for memory;
    dotted lines show growth in proportion to the first point."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = {name: value for name, value in ROWS.items() if any(value(each, each) is not None for each in records)}
    with rc_context({**STYLE, "svg.hashsalt": "growth"}):
        figure = Figure(figsize=(11, 3 * len(rows) + 0.5), layout="constrained")
        panels = figure.subplots(len(rows), len(AXES), sharey="row", squeeze=False)
        for column, (axis, label) in enumerate(AXES.items()):
            for (name, value), panel in zip(rows.items(), panels[:, column]):
                for curve in _curves(records, axis, value):
                    panel.plot(curve.xs, curve.ys, curve.style, color=curve.color, label=curve.label, markersize=5)
                    if name != MEMORY:
                        proportional = [curve.ys[0] * x / curve.xs[0] for x in curve.xs]
                        panel.plot(curve.xs, proportional, ":", color=curve.color, linewidth=0.8)
                panel.set_xscale("log", base=2)
                panel.set_xticks(sorted({_extent(each, axis) for each in records if each["axis"] == axis}))
                panel.xaxis.set_major_formatter(_plain)
                if name != MEMORY:
                    panel.set_yscale("log", base=2)
                panel.yaxis.set_major_formatter(_plain)
                if column == 0:
                    panel.set_ylabel(name)
            panels[-1][column].set_xlabel(label)
        for name, row in zip(rows, panels):
            if name == MEMORY:
                row[0].set_ylim(0, 1.05 * row[0].get_ylim()[1])  # of the whole row, once its curves are drawn
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="small")
        figure.suptitle(f"{records[0]['model']} from {' and from '.join(_firsts(records))}")
        figure.savefig(path, format="svg", metadata={"Date": None})


class Curve(NamedTuple):
    """A line of a panel, for a part of the model or of its peer."""

    label: str
    color: str
    style: str
    xs: Sequence[int]
    ys: Sequence[float]


def _curves(records: list[dict], axis: str, value: "Value") -> Iterator[Curve]:
    """The curves of a panel that have points."""
    kinds = list(dict.fromkeys((record["part"], record["first"]) for record in records))
    several = len(_firsts(records)) > 1
    for number, (part, first) in enumerate(kinds):
        of_kind = [each for each in records if (each["part"], each["first"], each["axis"]) == (part, first, axis)]
        own = [(each["model"], each, each) for each in of_kind]
        peers = [(each["peer"]["name"], each, each["peer"]) for each in of_kind if each["peer"]]
        for measured, style in ((own, "o-"), (peers, "s--")):
            points = [(_extent(record, axis), value(record, figures)) for _, record, figures in measured]
            points = [(x, y) for x, y in points if y is not None]
            if points:
                xs, ys = zip(*points)
                label = f"{measured[0][0]}: {part}" + (f" from {first}" if several else "")
                yield Curve(label, COLORS[number % len(COLORS)], style, xs, ys)


def _firsts(records: list[dict]) -> list[str]:
    """The sizes that the curves start at."""
    return list(dict.fromkeys(record["first"] for record in records))


def _plain(value: float, _=None) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _extent(record: dict, axis: str) -> int:
    frames, height, width = map(int, record["size"].split("x"))
    return {"frames": frames, "area": height * width, "batch": record["batch"]}[axis]


# A record, and the figures of its model or peer -> what is plotted; None if it was not measured.
Value = Callable[[dict, dict], float | None]


def _memory(record: dict, figures: dict) -> float | None:
    return figures["peak_rss_mb" if record["device"] == "cpu" else "peak_device_mb"]


def _operations(record: dict, figures: dict) -> float | None:
    operations = figures["operations_per_frame"]
    return operations and operations * record["batch"] * _extent(record, "frames") / 1e9


MEMORY = "peak memory, MB"
ROWS: dict[str, Value] = {
    "seconds": lambda _, figures: figures["seconds"],
    "GFLOP": _operations,
    MEMORY: _memory,
}
