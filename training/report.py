"""The report of a run: a self-contained HTML page, with its curves as inline SVG.

The page has no scripts and needs no network access.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from turret.server.adapters.adapter import TENSORS_FILE
from turret.training.run import RunFolder, read_metrics
from turret.words import about_bytes, counted

_WIDTH, _HEIGHT = 720, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 12, 30
_TICKS = 5


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a plot.

    Attributes:
        name: The name in the legend, and the CSS class of the line.
        points: The points ``(x, y)``, finite and with ascending x.
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


def curves_svg(curves: Sequence[Curve]) -> str:
    """A plot from 0 (or a negative minimum) to the maximum; "" without points."""
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
        f'y="{_HEIGHT - 8}" text-anchor="end">{last:g} steps</text></svg>'
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


_STYLE = """
:root{--ink:#1d2329;--soft:#68727d;--line:#dfe3e8;--back:#fff;--card:#f6f8fa;--a:#2f6db3;--b:#d1622b}
@media(prefers-color-scheme:dark){:root{--ink:#e4e8ec;--soft:#98a2ad;--line:#333b44;--back:#14181c;
--card:#1d2329;--a:#6aa5e8;--b:#f0925f}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--back);max-width:780px;
margin:2rem auto;padding:0 1rem}h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:.6rem}
dl div{background:var(--card);border-radius:6px;padding:.5rem .8rem}
dt{color:var(--soft);font-size:13px}dd{margin:0;font-size:1.1rem}table{border-collapse:collapse;width:100%}
th,td{text-align:left;vertical-align:top;border-bottom:1px solid var(--line);padding:.4rem .6rem}
td,pre,.turn,.answers dd{overflow-wrap:break-word;white-space:pre-wrap}
.sample{border:1px solid var(--line);border-radius:8px;padding:.8rem;margin:.8rem 0}
.turn{background:var(--card);border-radius:8px;padding:.4rem .8rem;margin:0 0 .6rem;max-width:85%;
width:fit-content;box-sizing:border-box}.turn.system{background:none;padding:0;color:var(--soft)}
.role{color:var(--soft);font-size:12px;display:block}.answers{margin:0 0 0 15%}
.answers dd{font-size:15px}.answers .adapter{border-left:3px solid var(--a)}.cut{color:var(--soft)}
@media(max-width:600px){.answers{margin-left:0}}pre{background:var(--card);padding:.8rem;
border-radius:6px;font-size:13px}svg text{font-size:12px;fill:var(--soft)}.grid{stroke:var(--line)}
polyline{fill:none;stroke-width:2;stroke:var(--soft)}.training{stroke:var(--a)}
.each-batch{stroke:var(--a);stroke-width:1;opacity:.35}.validation{stroke:var(--b);fill:none}
circle.validation{fill:var(--b)}.key{color:var(--soft);font-size:13px}.key b{font-weight:600}
"""

# Figures of a validation; all but the loss exist for classification only.
_FIGURES = {
    "loss": "validation loss",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "micro_f1": "micro F1",
}

_CUT = "… marks an answer that was cut at the maximum number of tokens"


def write_report(folder: RunFolder) -> Path:
    """Write ``report.html`` of a run, finished or not, from the files in its directory.

    Raises:
        RunError: ``run.json`` is missing or broken.
        OSError: Another file cannot be read, or the page cannot be written.
    """
    folder.report.write_text(render_report(folder), encoding="utf-8")
    return folder.report


def render_report(folder: RunFolder) -> str:
    """The page; errors as in :func:`write_report`."""
    facts = folder.read_facts()
    rows = list(read_metrics(folder.metrics))
    steps = [row for row in rows if row["kind"] == "step"]
    validations = [row for row in rows if row["kind"] == "validation"]
    title = f"{facts['config']['method']['name']} on {facts['base']['name']}"
    state = "" if folder.is_finished else "<p><b>This run is not finished.</b></p>"
    return (
        "<!doctype html>\n"
        f'<html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
        f"<h1>{escape(title)}</h1>{state}"
        f"<dl>{_tiles(folder, facts, rows, steps, validations)}</dl>"
        f"{_loss(facts, steps, validations)}{_rate(steps)}{_samples(folder, facts)}"
        f"<h2>Config</h2><pre>{escape(folder.config.read_text(encoding='utf-8'))}</pre>"
        f"<h2>Made of</h2>{_made_of(facts)}</html>\n"
    )


def _tiles(
    folder: RunFolder,
    facts: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    steps: Sequence[Mapping[str, Any]],
    validations: Sequence[Mapping[str, Any]],
) -> str:
    tiles = {"steps": f"{len(steps)} of {facts['config']['run']['steps']}"}
    if validations:
        first, last = validations[0], validations[-1]
        for key, name in _FIGURES.items():
            if key in first and key in last:
                tiles[name] = f"{first[key]:.3f} → {last[key]:.3f}"
    if rows:
        last = rows[-1]
        tiles["time"] = _duration(facts.get("waited_seconds", last["seconds"]))
        tiles["training time"] = _duration(last["seconds"])
        tiles["tokens"] = f"{last['tokens']:,}"
        tiles["peak memory"] = about_bytes(max(row["memory_bytes"] for row in rows))
    tiles["trained parameters"] = f"{facts['num_parameters']:,}"
    weights = folder.adapter / TENSORS_FILE
    if weights.exists():
        tiles["adapter"] = about_bytes(weights.stat().st_size)
    return "".join(f"<div><dt>{k}</dt><dd>{escape(v)}</dd></div>" for k, v in tiles.items())


def _loss(
    facts: Mapping[str, Any],
    steps: Sequence[Mapping[str, Any]],
    validations: Sequence[Mapping[str, Any]],
) -> str:
    batches = [(row["step"], row["loss"]) for row in steps]
    curves = [
        Curve("each-batch", batches),
        Curve("training", smoothed(batches)),
        Curve("validation", [(row["step"], row["loss"]) for row in validations], has_dots=True),
    ]
    unit = "example" if _is_classification(facts) else "learned token"
    key = f"nats per {unit}; thin: each batch, thick: their moving average, dots: validation"
    return f'<h2>Loss</h2>{curves_svg(curves)}<p class="key">{key}</p>'


def _is_classification(facts: Mapping[str, Any]) -> bool:
    # Runs of earlier versions have no such key.
    return facts["config"]["data"].get("task") == "classification"


def _rate(steps: Sequence[Mapping[str, Any]]) -> str:
    curve = Curve("rate", [(row["step"], row["learning_rate"]) for row in steps])
    return f"<h2>Learning rate</h2>{curves_svg([curve])}"


def _samples(folder: RunFolder, facts: Mapping[str, Any]) -> str:
    if not folder.samples.exists():
        return ""
    rows = [json.loads(line) for line in folder.samples.read_text(encoding="utf-8").splitlines()]
    if not rows:
        return ""
    answers = {"reference": "right answer", "before": "base model", "after": "adapter"}
    if _is_classification(facts):
        # The base model alone predicts no labels.
        del answers["before"]
    is_cut = any(row.get("cut") for row in rows)
    note = f'<p class="key">{_CUT}</p>' if is_cut else ""
    return f"<h2>Samples</h2>{''.join(_sample(row, answers) for row in rows)}{note}"


def _sample(row: Mapping[str, Any], answers: Mapping[str, str]) -> str:
    """One sample: the chat turn by turn, or the text, and the answers that follow."""
    asked = "".join(
        f'<div class="turn {escape(role)}"><span class="role">{escape(role)}</span>'
        f"{escape(content)}</div>"
        for role, content in row.get("turns") or []
    )
    said = "".join(
        f'<div class="{name.replace(" ", "-")}"><dt>{name}</dt><dd>{_answer(row, key)}</dd></div>'
        for key, name in answers.items()
    )
    prompt = asked or f'<div class="turn">{escape(row["prompt"])}</div>'
    return f'<div class="sample">{prompt}<dl class="answers">{said}</dl></div>'


def _answer(row: Mapping[str, Any], key: str) -> str:
    # Runs of earlier versions do not have this key.
    cut = '<span class="cut">…</span>' if key in row.get("cut", ()) else ""
    return f"{escape(row[key])}{cut}"


def _made_of(facts: Mapping[str, Any]) -> str:
    cells = {
        "base": f"{facts['base']['name']}, {facts['base']['digest']}",
        "data": f"{counted(facts['data']['num_examples'], 'example')}, "
        f"{counted(facts['data']['num_tokens'], 'token')}, "
        f"{facts['data']['digest']}",
        "seed": str(facts["seed"]),
        "versions": ", ".join(f"{k} {v}" for k, v in facts["versions"].items()),
    }
    rows = "".join(f"<tr><th>{k}</th><td>{escape(v)}</td></tr>" for k, v in cells.items())
    return f"<table>{rows}</table>"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
