"""Plots for an HTML page, SVG by matplotlib: points over a logarithmic axis, and lines, with a colour and a shape for
each label, and tooltips."""

import io
import math
import re
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

# Okabe and Ito's colour-blind-safe colours, and shapes for when the colours repeat.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b5b95")
SHAPES = {  # matplotlib's name -> the same in a legend
    "o": '<circle r="4.5" fill="{}"/>',
    "s": '<rect x="-4.5" y="-4.5" width="9" height="9" fill="{}"/>',
    "D": '<rect x="-4" y="-4" width="8" height="8" transform="rotate(45)" fill="{}"/>',
}
WIDTH, HEIGHT, TITLE = 460, 280, 24  # of a plot, and of the title above it

STYLE = {  # of matplotlib
    "svg.fonttype": "none", "font.size": 12, "axes.linewidth": 0, "xtick.major.size": 0, "ytick.major.size": 0,
    "axes.grid": True, "grid.color": "gray", "grid.alpha": 0.3, "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
}  # fmt: skip


class Point(NamedTuple):
    """A point of a plot and its tooltip."""

    x: float
    y: float
    text: str


def legend(labels: Sequence[str]) -> str:
    return "".join(f"<span>{chip(number)}{escape(label)}</span>" for number, label in enumerate(labels))


def chip(number: int) -> str:
    """The marker shown next to a label's name, by the label's number."""
    color, shape = _look(number)
    return f'<svg class="chip" viewBox="-6 -6 12 12" aria-hidden="true">{SHAPES[shape].format(color)}</svg>'


def rate_plot(title: str, x_title: str, points: Sequence[tuple[int, Point]], at_least: float) -> str:
    """One point per (label number, point), with x, a compression ratio, on a logarithmic axis.

    Args:
        at_least: minimum extent of the y axis.
    """
    low, high = _widened([math.log(point.x) for _, point in points], at_least=0.7)
    lines = [(number, [point]) for number, point in points]
    return _plot(title, x_title, lines, at_least, (math.exp(low), math.exp(high)), 6, "ratios")


def line_plot(
    title: str,
    x_title: str,
    lines: Sequence[Sequence[Point]],
    at_least: float,
    x_range: tuple[float, float],
    radius: float = 3.5,
    x_texts: bool = False,
) -> str:
    """A line for each label, in order; a line without points is not drawn.

    Args:
        at_least: minimum extent of the y axis.
        x_range: range of the x axis.
        radius: of the points.
        x_texts: show tick labels on the x axis.
    """
    drawn = [(number, line) for number, line in enumerate(lines) if line]
    return _plot(title, x_title, drawn, at_least, x_range, radius, "numbers" if x_texts else "none")


def _plot(
    title: str,
    x_title: str,
    lines: Sequence[tuple[int, Sequence[Point]]],
    at_least: float,
    x_range: tuple[float, float],
    radius: float,
    x_ticks: str,
) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    with rc_context({**STYLE, "svg.hashsalt": title}):  # ids that differ between plots, not between runs
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
        figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - TITLE / HEIGHT))
        axes = figure.subplots()
        axes.set(
            xlabel=x_title, xlim=x_range, ylim=_widened([point.y for _, line in lines for point in line], at_least)
        )
        axes.grid(clip_on=False)
        axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
        if x_ticks == "ratios":
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(2, numticks=8))
            axes.xaxis.set(major_formatter="{x:g}:1", minor_locator=NullLocator())
        elif x_ticks == "none":
            axes.set_xticks([])
        for number, line in lines:
            color, shape = _look(number)
            xs, ys, _ = zip(*line)
            axes.plot(xs, ys, color=color, marker=shape, markersize=2 * radius, linewidth=1, clip_on=False)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    body = file.getvalue().partition("</defs>")[2]  # what is before it holds URLs, and a style for the whole page
    body = re.sub(r"<!--.*?-->| id=\"[a-z]+[\w.]*_\d+\"", "", body)  # the same ids in each plot; nothing refers to them
    texts = (escape(point.text) for _, line in lines for point in line)
    body = re.sub(r"(<use [^>]*)/>", lambda mark: f"{mark[1]}><title>{next(texts)}</title></use>", body)
    head = f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
    return f'{head}<text class="title" x="8" y="16">{escape(title)}</text>{body}'


def _look(number: int) -> tuple[str, str]:
    """A label's colour and shape, by its number."""
    return COLORS[number % len(COLORS)], list(SHAPES)[number // len(COLORS) % len(SHAPES)]


def _widened(values: Sequence[float], at_least: float) -> tuple[float, float]:
    """The range of the values plus a tenth on either side, at least `at_least` wide, and below 0 only if a value is."""
    low, high = min(values), max(values)
    around = max((high - low) * 0.1, (at_least - (high - low)) / 2)
    return low - around if low < 0 else max(0, low - around), high + around
