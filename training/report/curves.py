"""Curves of a run as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT = 720, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 12, 30
_TICKS = 5


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a plot.

    Attributes:
        name: Shown in the legend; also the CSS class of the line.
        points: ``(x, y)``, x ascending, all finite.
        has_dots: Whether each point is marked.
    """

    name: str
    points: Sequence[tuple[float, float]]
    has_dots: bool = False


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """An exponential moving average over about a tenth of the points, unbiased at the start."""
    keep = 1 - 1 / max(1.0, len(points) / 10)
    average, weight, out = 0.0, 0.0, []
    for x, y in points:
        average, weight = keep * average + (1 - keep) * y, keep * weight + (1 - keep)
        out.append((x, average / weight))
    return out


def curves_svg(curves: Sequence[Curve], x_label: str) -> str:
    """A plot from 0, or the least value if that is less, to the greatest; "" without points."""
    points = [point for curve in curves for point in curve.points]
    if not points:
        return ""
    ticks = _ticks(min(0.0, *(y for _, y in points)), max(y for _, y in points))
    last = max(1.0, *(x for x, _ in points))
    low, high = ticks[0], ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (_WIDTH - _LEFT - _RIGHT) * x / last
        down = _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (y - low) / (high - low)
        return round(across, 1), round(down, 1)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">']
    for tick in ticks:
        y = place(0, tick)[1]
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{tick:.4g}</text>'
        )
    for curve in curves:
        placed = [place(x, y) for x, y in curve.points]
        line = " ".join(f"{x},{y}" for x, y in placed)
        parts.append(f'<polyline class="{curve.name}" points="{line}"/>')
        if curve.has_dots:
            parts += [f'<circle class="{curve.name}" cx="{x}" cy="{y}" r="3"/>' for x, y in placed]
    parts.append(
        f'<text x="{_LEFT}" y="{_HEIGHT - 8}">0</text><text x="{_WIDTH - _RIGHT}" '
        f'y="{_HEIGHT - 8}" text-anchor="end">{last:g} {x_label}</text></svg>'
    )
    return "".join(parts)


def _ticks(low: float, high: float) -> list[float]:
    """Round values, at most ``_TICKS + 1``, that span both bounds."""
    span = (high - low) or abs(high) or 1.0
    rough = span / _TICKS
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10, 20) if unit * factor >= rough)
    first = math.floor(low / step)
    last = max(math.ceil(high / step), first + 1)
    return [index * step for index in range(first, last + 1)]
