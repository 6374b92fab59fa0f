"""Draws what ``bench/lifecycle.py`` wrote, as SVG.

    python bench/plot_lifecycle.py bench/results/lifecycle-CPU.json docs/lifecycle.svg

Left: requests per second by number of registered adapters, each round a dot, and what S-LoRA kept
from 5 to 2,000 adapters of the same ranks. Right: medians of the time to the first token.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from scale.bars import slora_share

WIDTH, HEIGHT = 860, 340
_TOP, _BOTTOM = 56, 272
_INK, _MUTED, _BAR = "#222", "#777", "#3b6ea5"


def _text(x: float, y: float, text: str, *, anchor: str = "middle", color: str = _INK) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}">{escape(text)}</text>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, *, dash: str = "") -> str:
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{_MUTED}"{dashed}/>'


def _axis(left: float, right: float, top_value: float) -> list[str]:
    """Ticks at round values from 0 up."""
    step = 10.0 ** math.floor(math.log10(top_value))
    step = next(step * part for part in (0.2, 0.5, 1, 2) if top_value / (step * part) <= 6)
    parts = []
    for number in range(int(top_value / step) + 1):
        y = _height(number * step, top_value)
        parts += [_line(left, y, right, y, dash="" if number == 0 else "1 4")]
        parts += [_text(left - 6, y + 4, f"{number * step:g}", anchor="end", color=_MUTED)]
    return parts


def _height(value: float, top_value: float) -> float:
    return _BOTTOM - (_BOTTOM - _TOP) * value / top_value


def _throughput(rows: Sequence[Mapping[str, Any]], slora: float | None) -> list[str]:
    left, right = 60.0, 430.0
    top = 1.15 * max(rate for row in rows for rate in (*row["rounds"], row["requests_per_second"]))
    logs = [math.log10(row["registered"]) for row in rows]
    span = (logs[-1] - logs[0]) or 1.0
    xs = [left + 30 + (right - left - 60) * (value - logs[0]) / span for value in logs]
    parts = [_text((left + right) / 2, 32, "requests/s, more asked for than can be served")]
    parts += _axis(left, right, top)
    if slora is not None:
        bar = _height(slora * rows[0]["requests_per_second"], top)
        note = f"{slora:.1%}: S-LoRA from 5 to 2,000"
        parts += [_line(left, bar, right, bar, dash="6 3")]
        parts += [_text(right, bar + 14, note, anchor="end", color=_MUTED)]
    points = [
        (x, _height(row["requests_per_second"], top)) for x, row in zip(xs, rows, strict=True)
    ]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    parts += [f'<path d="M{path}" fill="none" stroke="{_BAR}" stroke-width="2"/>']
    for (x, y), row in zip(points, rows, strict=True):
        parts += [
            f'<circle cx="{x:.1f}" cy="{_height(rate, top):.1f}" r="2.5" fill="{_MUTED}"/>'
            for rate in row["rounds"]
        ]
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{_BAR}"/>']
        parts += [_text(x, _BOTTOM + 18, _count(row["registered"]))]
    parts += [_text((left + right) / 2, _BOTTOM + 38, "registered adapters", color=_MUTED)]
    return parts


def _count(number: int) -> str:
    """Short, for 1,000 and 2,000 stand close on a logarithmic axis."""
    return f"{number // 1000}k" if number and number % 1000 == 0 else f"{number:,}"


def _first_tokens(result: Mapping[str, Any]) -> list[str]:
    beside, cold = result["interference"], result["cold"]
    values = {
        "resident, beside\nwarm requests": beside["ttft_beside_warm_ms"],
        "resident, beside\ncold loads": beside["ttft_beside_cold_ms"],
        "what a cold\nr=16 adds": cold["penalty_ms"],
    }
    left, right = 520.0, 840.0
    known = {label: value for label, value in values.items() if value is not None}
    parts = [_text((left + right) / 2, 32, "time to the first token, median, ms")]
    if not known:
        return parts
    top = 1.2 * max(known.values())
    parts += _axis(left, right, top)
    width = (right - left) / len(known)
    for number, (label, value) in enumerate(known.items()):
        x, y = left + width * (number + 0.5), _height(value, top)
        parts += [
            f'<rect x="{x - 26:.1f}" y="{y:.1f}" width="52" height="{_BOTTOM - y:.1f}"'
            f' fill="{_BAR}"/>',
            _text(x, y - 5, f"{value:.0f}"),
        ]
        parts += [_text(x, _BOTTOM + 18 + 16 * i, line) for i, line in enumerate(label.split("\n"))]
    return parts


def _ranks(ranks: Sequence[int]) -> str:
    return f"{min(ranks)}-{max(ranks)}" if len(ranks) > 1 else f"{ranks[0]}"


def draw(result: Mapping[str, Any]) -> str:
    """The SVG document."""
    machine, scenario = result["machine"], result["scenario"]
    ranks = _ranks(scenario["ranks"])
    source = (
        f"{scenario['model']}, LoRA r={ranks} on {scenario['targets']} projections;"
        f" {machine['cores']} cores of {machine['cpu']}; {result['date'][:10]}"
    )
    body = [
        *_throughput(result["throughput"], slora_share(scenario)),
        *_first_tokens(result),
        _text(WIDTH / 2, HEIGHT - 8, source, color=_MUTED),
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
            ' font-family="sans-serif" font-size="12">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
            *body,
            "</svg>\n",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("result", type=Path, help="JSON document of bench/lifecycle.py")
    parser.add_argument("svg", type=Path, help="file to write")
    args = parser.parse_args(argv)
    args.svg.write_text(draw(json.loads(args.result.read_text())), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
