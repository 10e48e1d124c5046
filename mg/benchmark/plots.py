"""SVG plots for an HTML page: points over a logarithmic axis, and lines, with a colour and a shape for each label."""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

# Okabe and Ito's colour-blind-safe colours, and shapes for when the colours repeat.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b5b95")
SHAPES = ("circle", "square", "diamond")

WIDTH, HEIGHT = 460, 280
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 30, 42


class Point(NamedTuple):
    """A point of a plot and its tooltip."""

    x: float
    y: float
    text: str


def legend(labels: Sequence[str]) -> str:
    return "".join(f"<span>{chip(number)}{escape(label)}</span>" for number, label in enumerate(labels))


def chip(number: int) -> str:
    """The marker shown next to a label's name, by the label's number."""
    return f'<svg class="chip" viewBox="-6 -6 12 12" aria-hidden="true">{_mark(0, 0, number, 4.5)}</svg>'


def rate_plot(title: str, x_title: str, points: Sequence[tuple[int, Point]], at_least: float) -> str:
    """One point per (label number, point), with x, a compression ratio, on a logarithmic axis.

    Args:
        at_least: minimum extent of the y axis.
    """
    x_range = _widened([math.log(point.x) for _, point in points], at_least=0.7)
    y_range = _widened([point.y for _, point in points], at_least)
    to_x, to_y = _scale(x_range, LEFT, WIDTH - RIGHT), _scale(y_range, HEIGHT - BOTTOM, TOP)
    x_ticks = [(to_x(math.log(tick)), f"{tick:g}:1") for tick in _log_ticks(*map(math.exp, x_range))]
    marks = [_mark(to_x(math.log(point.x)), to_y(point.y), number, 6, point.text) for number, point in points]
    return _plot(title, x_title, x_ticks, y_range, to_y, "".join(marks))


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
        radius: of the points; 0 draws none.
        x_texts: show tick labels on the x axis.
    """
    y_range = _widened([point.y for line in lines for point in line], at_least)
    to_x, to_y = _scale(x_range, LEFT, WIDTH - RIGHT), _scale(y_range, HEIGHT - BOTTOM, TOP)
    drawn = []
    for number, line in enumerate(lines):
        path = " ".join(f"{to_x(point.x):.1f},{to_y(point.y):.1f}" for point in line)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{COLORS[number % len(COLORS)]}"/>')
        for point in line if radius else ():
            drawn.append(_mark(to_x(point.x), to_y(point.y), number, radius, point.text))
    x_ticks = [(to_x(tick), f"{tick:g}") for tick in _ticks(*x_range)] if x_texts else []
    return _plot(title, x_title, x_ticks, y_range, to_y, "".join(drawn))


def _mark(x: float, y: float, number: int, radius: float = 4.5, title: str = "") -> str:
    color, shape = COLORS[number % len(COLORS)], SHAPES[number // len(COLORS) % len(SHAPES)]
    inner = f"<title>{escape(title)}</title>" if title else ""
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{color}">{inner}</circle>'
    turn = f' transform="rotate(45 {x:.1f} {y:.1f})"' if shape == "diamond" else ""
    corner = f'x="{x - radius:.1f}" y="{y - radius:.1f}" width="{2 * radius}" height="{2 * radius}"'
    return f'<rect {corner} fill="{color}"{turn}>{inner}</rect>'


def _plot(
    title: str,
    x_title: str,
    x_ticks: list[tuple[float, str]],
    y_range: tuple[float, float],
    to_y: Callable[[float], float],
    content: str,
) -> str:
    parts = [f'<text class="title" x="{LEFT}" y="16">{escape(title)}</text>']
    ticks = _ticks(*y_range)
    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9)) if len(ticks) > 1 else 3
    for tick in ticks:
        y = to_y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{tick:.{digits}f}</text>')
    for x, text in x_ticks:
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{text}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="tick" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_title)}</text>')
    head = f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
    return f"{head}{''.join(parts)}{content}</svg>"


def _widened(values: Sequence[float], at_least: float) -> tuple[float, float]:
    """The range of the values plus a tenth on either side, at least `at_least` wide, and below 0 only if a value is."""
    low, high = min(values), max(values)
    around = max((high - low) * 0.1, (at_least - (high - low)) / 2)
    return low - around if low < 0 else max(0, low - around), high + around


def _scale(values: tuple[float, float], start: float, stop: float) -> Callable[[float], float]:
    low, high = values
    return lambda value: start + (value - low) / (high - low) * (stop - start)


def _ticks(low: float, high: float) -> list[float]:
    """Three to eight round numbers within a range."""
    step = 10 ** math.floor(math.log10((high - low) / 3))
    step *= next(factor for factor in (5, 2, 1) if (high - low) / (step * factor) >= 3)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of two within a range, at most 8 of them."""
    powers = [2.0**i for i in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
    return powers[:: -(-len(powers) // 8)] if powers else []
