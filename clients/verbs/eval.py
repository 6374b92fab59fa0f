"""``turret eval``: evaluate the base model, adapters and mixes on a test set, as served."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from turret.clients.client import TurretClient
from turret.clients.errors import UnavailableError
from turret.clients.evaluate import (
    CLASS_METRICS,
    LABEL_SET_METRICS,
    METRICS,
    Estimate,
    EvalOptions,
    MixReport,
    NamedMix,
    evaluate,
    mix_name,
)
from turret.clients.fields import ArgumentValueError
from turret.clients.rows import EvalExample, RowError, read_eval_set
from turret.clients.verbs import command
from turret.clients.verbs.tables import print_cells
from turret.clients.words import say

_DESCRIPTION = """\
Evaluate the base model, adapters and mixes on a test set, with a running server. Each line of the
file is {"messages": [...]}, whose last message is the right answer, or
{"prompt": ..., "completion": ...}; with --classify also {"prompt": ..., "labels": [...]}, with all
right labels.
"""


def _eval(args: argparse.Namespace, client: TurretClient) -> None:
    # The base model has no classification head.
    has_base = not (args.no_base or args.classify)
    mixes: list[NamedMix] = [*([()] if has_base else []), *args.mixes]
    if not mixes:
        flag = "classify" if args.classify else "no_base"
        raise ArgumentValueError(flag, say("NEEDS_FIELD", other="--mix"))
    names = Counter(map(mix_name, mixes))
    if twice := [name for name, count in names.items() if count > 1]:
        raise ArgumentValueError("mixes", say("DUPLICATE", value=twice[0]))
    examples, options = read_test_set(args)
    for path in filter(None, (args.plot, args.answers)):
        if path.exists() and path.samefile(args.data):
            raise ValueError(say("IS_TEST_SET", path=path))
        # Report a file that cannot be written before the first call.
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ValueError(say("PATH_NOT_WRITABLE", path=path))
    reports = judge(args, client, examples, mixes, options)
    if args.json:
        command.print_json([_figures(report) for report in reports])
    else:
        print_reports(reports)
        if reports[0].labels:
            _print_labels(reports)
    # Print the results before writing files, in case a file cannot be written.
    if args.plot is not None:
        args.plot.write_text(eval_svg(reports, args.data.name), encoding="utf-8")
    if args.answers is not None:
        args.answers.write_text(_answers(reports, examples), encoding="utf-8")


def read_test_set(args: argparse.Namespace) -> tuple[list[EvalExample], EvalOptions]:
    """The test set, and the options of the evaluation that the flags set.

    Raises:
        OSError: The file cannot be read.
        ValueError: A line is invalid, or the flags do not fit each other or the file.
    """
    examples = read_eval_set(args.data, is_raw=args.raw, limit=args.limit)
    first = examples[0]
    if first.labels is not None and not args.classify:
        raise RowError(args.data, first.line, "labels", say("LABELS_NEED_CLASSIFY"))
    metrics = _metrics(args.metrics, args.labels, args.classify)
    options = EvalOptions(
        metrics=metrics if first.labels is None else LABEL_SET_METRICS,
        labels=args.labels,
        max_tokens=args.max_tokens,
        concurrency=args.concurrency,
    )
    if "label_accuracy" in options.metrics:
        _check_labels(args.data, examples, options.labels)
    return examples, options


def judge(
    args: argparse.Namespace,
    client: TurretClient,
    examples: Sequence[EvalExample],
    mixes: Sequence[NamedMix],
    options: EvalOptions,
) -> list[MixReport]:
    """Run :func:`evaluate` with a progress bar. If it is interrupted, report how far it got.

    Raises:
        UnfinishedAnswerError: The server answered some calls and then became unreachable.
    """
    columns = (TextColumn("judging"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        total = len(examples) * len(mixes)
        task = progress.add_task("judging", total=total)
        # None until the server has answered the first call.
        done: int | None = None

        def extent() -> str:
            return f"after {done or 0} of {total} answers; nothing was written"

        def note(now: int, total: int) -> None:
            nonlocal done
            done = now
            args.stopped = f"stopped {extent()}"
            progress.update(task, completed=done, total=total)

        args.stopped = f"stopped {extent()}"
        try:
            reports = evaluate(client, examples, mixes, options, on_progress=note)
        except UnavailableError as error:
            if done is None:
                raise
            raise command.UnfinishedAnswerError(say("EVALUATION_CUT", done=extent())) from error
    args.stopped = ""
    return reports


def _metrics(asked: Sequence[str] | None, labels: Sequence[str], classify: bool) -> tuple[str, ...]:
    if classify:
        if asked is not None or labels:
            raise ArgumentValueError(
                "classify", say("CONFLICTS_WITH", other="--metric and --labels")
            )
        return CLASS_METRICS
    if asked is None:
        return METRICS if labels else METRICS[:-1]
    if "label_accuracy" in asked and not labels:
        raise ArgumentValueError("metrics", say("NEEDS_FIELD", other="--labels"))
    return tuple(metric for metric in METRICS if metric in asked)


def _check_labels(path: Path, examples: Sequence[EvalExample], labels: Sequence[str]) -> None:
    for example in examples:
        if example.reference not in labels:
            problem = say("ANSWER_NOT_A_LABEL", value=example.reference)
            raise RowError(path, example.line, "completion", problem)


def print_reports(reports: Sequence[MixReport]) -> None:
    """Print a row for each mix, and what the brackets mean."""
    rows = [
        (report.mix, *(_cell(metric, figure) for metric, figure in report.metrics.items()))
        for report in reports
    ]
    headings = [metric.replace("_", " ") for metric in reports[0].metrics]
    print_cells({"mix": "text", **dict.fromkeys(headings, "number")}, rows)
    # Print no caption: a narrow table would break it.
    figures = (figure for report in reports for figure in report.metrics.values())
    unknown = "; [?] if too few or too alike" if any(f.low is None for f in figures) else ""
    print(f"{reports[0].extent}; 95% confidence intervals in brackets{unknown}")


def _figures(report: MixReport) -> dict[str, object]:
    figures: dict[str, object] = {"mix": report.mix, "examples": report.examples}
    figures["metrics"] = report.metrics
    if report.labels:
        figures["labels"] = report.labels
    return figures


def _print_labels(reports: Sequence[MixReport]) -> None:
    """Print F1 of each label; empty where a mix did not find the label and no example has it."""
    rows = []
    for label in sorted({label for report in reports for label in report.labels}):
        figures = (report.labels.get(label) for report in reports)
        rows.append((label, *("" if each is None else f"{each.f1:.1%}" for each in figures)))
    mixes = {report.mix: "number" for report in reports}
    print_cells({"label": "text", **mixes}, rows, caption="F1 of each label")


def _cell(metric: str, figure: Estimate) -> str:
    is_ratio = metric != "perplexity"
    value = f"{figure.value:.1%}" if is_ratio else _plain(figure.value, 4)
    if figure.low is None or figure.high is None:
        return f"{value} [?]"
    low, high = (f"{x:.0%}" if is_ratio else _plain(x, 3) for x in (figure.low, figure.high))
    return f"{value} [{low}, {high}]"


def _plain(number: float, digits: int) -> str:
    """A number with ``digits`` significant digits; only very large ones get an exponent."""
    return f"{number:,.0f}" if 10**digits <= number < 1e9 else f"{number:.{digits}g}"


def _answers(reports: Sequence[MixReport], examples: Sequence[EvalExample]) -> str:
    rows = []
    for index, example in enumerate(examples):
        for report in reports:
            judged = report.judged[index]
            row = {
                "line": example.line,
                "mix": report.mix,
                "prompt": example.prompt,
                "reference": example.reference if judged.labels is None else judged.labels[1],
                "answer": judged.answer if judged.labels is None else judged.labels[0],
                "logprob": judged.logprob,
                "tokens": judged.tokens,
                **judged.scores,
            }
            rows.append(json.dumps(row, ensure_ascii=False))
    return "\n".join(rows) + "\n"


# The figures as one SVG: a panel for each metric, a bar for each mix.

_BAR, _GAP, _LABELS, _PANEL, _VALUES = 18, 8, 190, 420, 60
_TITLE, _FOOT = 34, 22
_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#222}.m{font-weight:600}.n{fill:#666;font-size:11px}"
    ".b{fill:#4c78a8}.o{fill:#9aa5b1}.w{stroke:#222;stroke-width:1.2}.a{stroke:#bbb}"
)


def eval_svg(reports: Sequence[MixReport], title: str) -> str:
    """Return a self-contained SVG document, whose whiskers are the 95% intervals.

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
    note = f"{reports[0].extent}; whiskers: 95% intervals"
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


# Flags.


def _mix(text: str) -> NamedMix:
    return tuple(command.adapter_weight(member.strip()) for member in text.split("+"))


def _labels(text: str) -> tuple[str, ...]:
    labels = tuple(label.strip() for label in text.split(","))
    if not all(labels) or len(set(labels)) < len(labels):
        raise argparse.ArgumentTypeError(say("LABELS_NOT_DISTINCT"))
    return labels


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(say("NOT_POSITIVE", value=text))
    return int(text)


_COUNT = {"type": _positive, "metavar": "N"}
FLAGS: command.Flags = {
    "data": command.flag("the test set, in JSON Lines", type=Path, metavar="FILE"),
    "-m --mix": command.flag(
        "an adapter or a mix to evaluate; repeatable",
        dest="mixes",
        action="append",
        type=_mix,
        default=[],
        metavar="NAME[=WEIGHT][+NAME...]",
    ),
    "--no-base": command.flag("leave the base model out", action="store_true"),
    "--metric": command.flag(
        "metric to compute; repeatable (default: all that apply)",
        dest="metrics",
        action="append",
        choices=METRICS,
    ),
    "--classify": command.flag(
        "evaluate adapters that classify: accuracy and macro F1 if the completion is the"
        " right label; for lines with labels, also micro F1 and the figures of each label",
        action="store_true",
    ),
    "--labels": command.flag(
        "compute label accuracy: the first of these labels in an answer must be the right one",
        type=_labels,
        default=(),
        metavar="A,B,...",
    ),
    "--raw": command.flag('send "prompt" as it is, not as a user\'s message', action="store_true"),
    "--limit": command.flag("use only the first N lines", **_COUNT),
    "--max-tokens": command.flag(
        "maximum tokens of an answer (default: %(default)s)", **_COUNT, default=128
    ),
    "--concurrency": command.flag(
        "number of concurrent calls (default: %(default)s)", **_COUNT, default=16
    ),
    "--plot": command.flag("write the figures as an SVG image", type=Path, metavar="FILE.svg"),
    "--answers": command.flag(
        "write every answer and its scores, in JSON Lines", type=Path, metavar="FILE"
    ),
}


def add_eval(subparsers: command.Subparsers, text: str) -> None:
    """Add the verb; ``text`` is its line in the help."""
    flags = {**command.shared("--json"), **FLAGS}
    command.add_verb_parser(subparsers, "eval", text, _eval, flags, description=_DESCRIPTION)
