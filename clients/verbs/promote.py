"""``turret train promote``: replace a served adapter with one that is better on a test set."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from turret.clients.client import TurretClient
from turret.clients.errors import TurretRpcError
from turret.clients.evaluate import Estimate, MixReport, gain
from turret.clients.requests import AdapterWeight
from turret.clients.results import Adapter
from turret.clients.verbs import command
from turret.clients.verbs.eval import FLAGS, judge, print_reports, read_test_set
from turret.clients.words import say

NOT_PROMOTED = 3
_PROVENANCE = "provenance.json"
_DESCRIPTION = """\
Compare the adapter in DIR with the one that a running server serves as NAME, and make it the next
generation of NAME if it is better. It is better if, for each metric, the 95% confidence interval of
the difference is entirely in its favour. The command exits with 0 if the adapter was promoted, and
with 3 if it is not better.
"""
_OWN_FLAGS: command.Flags = {
    "name": command.flag("the served adapter", metavar="NAME"),
    "directory": command.flag("the new adapter, in PEFT's layout", type=Path, metavar="DIR"),
}
_EVAL_FLAGS = (
    *("data", "--metric", "--classify", "--labels", "--raw", "--limit"),
    *("--max-tokens", "--concurrency"),
)


def _promote(args: argparse.Namespace, client: TurretClient) -> int:
    if args.metrics is None and not args.classify:
        args.metrics = ["perplexity"]
    examples, options = read_test_set(args)
    provenance = _read_provenance(args.directory)
    served = client.adapters.get(args.name)
    # Use another name, because requests for the adapter must not get the new one yet. No other
    # adapter may have it, because it is unloaded at the end.
    name = f"{args.name}-candidate-{uuid.uuid4().hex[:8]}"
    try:
        candidate = client.adapters.upload(name, args.directory)
        mixes = [
            (AdapterWeight(args.name, generation=served.generation),),
            (AdapterWeight(name, generation=candidate.generation),),
        ]
        reports = judge(args, client, examples, mixes, options)
    finally:
        # Ctrl-C closes ``client``, so use another one.
        with contextlib.suppress(TurretRpcError), command.connect(args) as another:
            another.adapters.unload(name, mode="force")
    gains = {metric: gain(metric, *reports) for metric in options.metrics}
    is_better = all(_is_sure(each) for each in gains.values())
    promotion = _described(args, served, candidate, reports, gains)
    generation = None
    if is_better:
        generation = client.adapters.upload(
            args.name, args.directory, replace=True, expected_generation=served.generation
        ).generation
        _write(args.directory / _PROVENANCE, {**provenance, "promotion": promotion})
    if args.json:
        command.print_json({"promoted": is_better, "generation": generation, **promotion})
    else:
        print_reports(reports)
        for metric, each in gains.items():
            print(f"gain in {metric.replace('_', ' ')}: {_shown(each)}")
        print(
            f"promoted: {args.name}@{generation} is served now"
            if is_better
            else f"not promoted: {args.name}@{served.generation} is still served"
        )
    return 0 if is_better else NOT_PROMOTED


def _is_sure(difference: Estimate) -> bool:
    """Whether a gain is certain. There is no interval if all bootstrap draws gave one number."""
    return (difference.value if difference.low is None else difference.low) > 0.0


def _shown(difference: Estimate) -> str:
    bounds = "[?]"
    if difference.low is not None:
        bounds = f"[{difference.low:+.3g}, {difference.high:+.3g}]"
    return f"{difference.value:+.4g} {bounds}"


def _described(
    args: argparse.Namespace,
    served: Adapter,
    candidate: Adapter,
    reports: Sequence[MixReport],
    gains: Mapping[str, Estimate],
) -> dict[str, Any]:
    before, after = reports
    return {
        "name": args.name,
        "digest": candidate.digest,
        "parent": {"generation": served.generation, "digest": served.digest},
        "test": {
            "digest": hashlib.sha256(args.data.read_bytes()).hexdigest(),
            "num_examples": before.examples,
        },
        "scores": {
            metric: {
                "served": _plain(before.metrics[metric]),
                "candidate": _plain(after.metrics[metric]),
                "gain": _plain(each),
            }
            for metric, each in gains.items()
        },
    }


def _plain(figure: Estimate) -> dict[str, float | None]:
    """A figure for JSON, which has no infinity."""
    numbers = {"value": figure.value, "low": figure.low, "high": figure.high}
    return {key: n if n is not None and math.isfinite(n) else None for key, n in numbers.items()}


def _read_provenance(directory: Path) -> dict[str, Any]:
    """The content of the adapter's ``provenance.json``; empty if there is no such file.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is not a JSON object.
    """
    path = directory / _PROVENANCE
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(say("PROVENANCE_INVALID", path=path))
    return found


def _write(path: Path, value: object) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(partial, path)


def add_promote(subparsers: command.Subparsers, text: str) -> None:
    """Add the verb; ``text`` is its line in the help."""
    names = {name: FLAGS[name] for name in _EVAL_FLAGS}
    flags: command.Flags = {**command.shared("--json"), **_OWN_FLAGS, **names}
    text_of_metric = (
        "metric in which the new adapter must be better; repeatable (default: perplexity, or all"
        " that apply with --classify)"
    )
    flags = {**flags, "--metric": {**FLAGS["--metric"], "help": text_of_metric}}
    command.add_verb_parser(subparsers, "promote", text, _promote, flags, description=_DESCRIPTION)
