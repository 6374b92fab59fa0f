"""The figures of an evaluation as one SVG: a panel per metric, a bar per mix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

from turret.clients.evaluation.answer_metrics import Estimate
from turret.clients.evaluation.evaluate import MixReport

_BAR, _GAP, _LABELS, _PANEL, _VALUES = 18, 8, 190, 420, 60
_TITLE, _FOOT = 34, 22
_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#222}.m{font-weight:600}.n{fill:#666;font-size:11px}"
    ".b{fill:#4c78a8}.o{fill:#9aa5b1}.w{stroke:#222;stroke-width:1.2}.a{stroke:#bbb}"
)


def eval_svg(reports: Sequence[MixReport], title: str) -> str:
    """Return a self-contained SVG document, whose whiskers are the 95 % intervals.

    Bars of perplexity have a log scale that begins at 1; those of other metrics run from 0 to 1.
    """
    metrics = list(reports[0].metrics)
    panel = _TITLE + len(reports) * (_BAR + _GAP) + 12
    width, height = _LABELS + _PANEL + _VALUES, 30 + panel * len(metrics) + _FOOT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img"><style>{_STYLE}</style>'
        f'<rect width="{width}" height="{height}" fill="#fff"/>'
        f'<text x="8" y="20" class="m">{escape(title)}</text>'
    ]
    for index, metric in enumerate(metrics):
        parts += _panel(reports, metric, 30 + index * panel)
    note = f"{reports[0].extent}; whiskers: 95 % intervals"
    parts.append(f'<text x="8" y="{height - 8}" class="n">{note}</text></svg>')
    return "\n".join(parts) + "\n"


def _panel(reports: Sequence[MixReport], metric: str, top: int) -> list[str]:
    is_log = metric == "perplexity"
    figures = [report.metrics[metric] for report in reports]
    highest = max(each.value if each.high is None else each.high for each in figures)
    full = (math.log(highest) if math.isfinite(highest) else 700.0) if is_log else 1.0

    def x(value: float) -> float:
        share = math.log(max(value, 1.0)) / (full or 1.0) if is_log else value
        return round(_LABELS + _PANEL * min(share, 1.0), 1)

    name = metric.replace("_", " ") + (" (lower is better, log scale)" if is_log else "")
    bottom = top + _TITLE + len(reports) * (_BAR + _GAP)
    parts = [
        f'<text x="8" y="{top + 22}" class="m">{name}</text>',
        f'<line class="a" x1="{_LABELS}" x2="{_LABELS}" y1="{top + _TITLE - 4}" y2="{bottom}"/>',
    ]
    for row, report in enumerate(reports):
        y = top + _TITLE + row * (_BAR + _GAP)
        parts += _bar(report, report.metrics[metric], y, x, is_log)
    return parts


def _bar(report: MixReport, figure: Estimate, y: int, x, is_log: bool) -> list[str]:
    name = report.mix if len(report.mix) <= 26 else report.mix[:25] + "…"
    middle, end = y + _BAR / 2, x(figure.value)
    value = f"{figure.value:.3g}" if is_log else f"{figure.value:.0%}"
    has_bounds = figure.low is not None and figure.high is not None
    low, high = (x(figure.low), x(figure.high)) if has_bounds else (end, end)
    whisker = f'<line class="w" x1="{low}" x2="{high}" y1="{middle}" y2="{middle}"/>'
    return [
        f'<text x="{_LABELS - 8}" y="{y + 13}" text-anchor="end">{escape(name)}'
        f"<title>{escape(report.mix)}</title></text>",
        f'<rect class="{"o" if report.mix == "base" else "b"}" x="{_LABELS}" y="{y}" '
        f'width="{end - _LABELS:.1f}" height="{_BAR}" rx="2"/>',
        *([whisker] if has_bounds else []),
        f'<text x="{max(end, high) + 6:.1f}" y="{y + 13}">{value}</text>',
    ]
