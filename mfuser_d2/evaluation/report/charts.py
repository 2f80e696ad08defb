"""Charts of the report as inline SVG: lines over iterations and the confusion matrix."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

_WIDTH, _HEIGHT = 720, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 14, 34
_MAX_POINTS = 400
_DASHES = ("", "7 3", "2 3", "9 3 2 3")
NUM_LINE_COLORS = 8


@dataclass(frozen=True)
class Series:
    """One line of a chart: `points` are (x, y), ascending in x."""

    name: str
    points: Sequence[tuple[float, float]]


def line_chart(series: Sequence[Series], *, title: str, unit: str = "") -> str:
    """Draw lines over a common x axis, with a legend; the page's script adds a reading under the pointer.

    Returns:
        A <figure>, or an empty string where no series has a point.
    """
    series = [Series(line.name, _thin(line.points)) for line in series if line.points]
    if not series:
        return ""
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points]
    x_ticks, y_ticks = nice_ticks(min(xs), max(xs)), nice_ticks(min(ys), max(ys))
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)
    y_low, y_high = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = (y - y_low) / (y_high - y_low)
        return (
            round(_LEFT + across * (_WIDTH - _LEFT - _RIGHT), 1),
            round(_HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM), 1),
        )

    parts = [_axes(x_ticks, y_ticks, place, (x_low, x_high), (y_low, y_high))]
    placed = [[place(x, y) for x, y in line.points] for line in series]
    parts += [_line(points, index) for index, points in enumerate(placed)]
    reading = [
        {"name": line.name, "points": [[x, y, *at] for (x, y), at in zip(line.points, points, strict=True)]}
        for line, points in zip(series, placed, strict=True)
    ]
    parts.append(f'<line class="cursor" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" visibility="hidden"/>')
    legend = "".join(
        f'<li><svg viewBox="0 0 26 8" aria-hidden="true">{_line([(0, 4), (26, 4)], index)}</svg>'
        f"{escape(line.name)}</li>"
        for index, line in enumerate(series)
    )
    return (
        f'<figure class="chart" data-chart="{escape(json.dumps(reading, separators=(",", ":")))}">'
        f"<figcaption>{escape(title)}{f' <small>({escape(unit)})</small>' if unit else ''}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" tabindex="0" aria-label="{escape(title)}">'
        f'{"".join(parts)}</svg><ul class="legend">{legend}</ul><output>&nbsp;</output></figure>'
    )


def _axes(x_ticks, y_ticks, place, x_range, y_range) -> str:
    parts = []
    for tick in y_ticks:
        if y_range[0] <= tick <= y_range[1]:
            y = place(x_range[0], tick)[1]
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
            parts.append(f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{_number(tick)}</text>')
    for tick in x_ticks:
        if x_range[0] <= tick <= x_range[1]:
            x = place(tick, y_range[0])[0]
            parts.append(f'<text x="{x}" y="{_HEIGHT - 12}" text-anchor="middle">{_number(tick)}</text>')
    return "".join(parts)


def _line(points: Sequence[tuple[float, float]], index: int) -> str:
    color = f"var(--line-{index % NUM_LINE_COLORS})"
    if len(points) == 1:
        (x, y) = points[0]
        return f'<circle cx="{x}" cy="{y}" r="4" fill="{color}"/>'
    dash = _DASHES[(index // NUM_LINE_COLORS) % len(_DASHES)]
    path = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline class="line" points="{path}" stroke="{color}" stroke-dasharray="{dash}"/>'


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Give about `count` round numbers that cover low..high."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _number(value: float) -> str:
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:g}"


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Keep at most `_MAX_POINTS` of a long series, the last one among them."""
    step = math.ceil(len(points) / _MAX_POINTS)
    kept = list(points[::step])
    if kept[-1] != points[-1]:
        kept.append(points[-1])
    return kept


def confusion_chart(counts: np.ndarray, class_names: Sequence[str], *, title: str) -> str:
    """Draw confusion counts, row = true class, in percent of each row; a row without pixels is hatched grey."""
    totals = counts.sum(axis=1, keepdims=True)
    percent = np.divide(100.0 * counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)
    cell, margin = 24, 8 + round(6.6 * max(len(name) for name in class_names))
    extent = cell * len(class_names)
    parts = []
    for row, name in enumerate(class_names):
        y = margin + row * cell
        parts.append(f'<text x="{margin - 6}" y="{y + 16}" text-anchor="end">{escape(name)}</text>')
        if totals[row, 0] == 0:
            parts.append(f'<rect class="absent" x="{margin}" y="{y}" width="{extent}" height="{cell - 1}"/>')
            continue
        parts += [
            _confusion_cell(float(percent[row, column]), margin + column * cell, y, cell, f"{name} → {other}")
            for column, other in enumerate(class_names)
        ]
    for column, name in enumerate(class_names):
        x = margin + column * cell + 16
        parts.append(f'<text transform="translate({x},{margin - 6}) rotate(-90)">{escape(name)}</text>')
    size = margin + extent + 2
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(title)}"><svg class="confusion" '
        f'viewBox="0 0 {size} {size}" style="--size:{size}px" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg></div>"
    )


def _confusion_cell(percent: float, x: int, y: int, cell: int, label: str) -> str:
    drawn = (
        f'<rect x="{x}" y="{y}" width="{cell - 1}" height="{cell - 1}" style="--share:{percent / 100:.3f}">'
        f"<title>{escape(label)}: {percent:.1f} %</title></rect>"
    )
    if percent >= 0.95:
        shade = " on-dark" if percent > 55 else ""
        at = f'x="{x + cell / 2 - 0.5}" y="{y + 15.5}"'
        drawn += f'<text class="share{shade}" {at} text-anchor="middle">{percent:.0f}</text>'
    return drawn
