"""The generated parts of docs/operations.md."""

from __future__ import annotations

import argparse
import inspect

from turret.server import errors
from turret.server.command.flags import add_flags
from turret.server.metrics import Metrics


def render_flags() -> str:
    parser = argparse.ArgumentParser(add_help=False)
    add_flags(parser)
    lines = ["| flag | meaning |", "|---|---|"]
    for action in parser._actions:
        help_text = action.help or ""
        lines.append(f"| `{action.option_strings[0]}` | {help_text} |")
    return "\n".join(lines)


def meanings() -> dict[str, str]:
    """The meaning of each class in ``errors.py``, from its docstring."""
    texts = {
        name: inspect.cleandoc(kind.__doc__).partition("\n")[0].removesuffix(".")
        for name, kind in vars(errors).items()
        if isinstance(kind, type)
        and issubclass(kind, errors.TurretError)
        and kind is not errors.TurretError
        and kind.__doc__
    }
    return {name: text[0].lower() + text[1:] for name, text in texts.items()}


def render_errors() -> str:
    means = meanings()
    lines = ["| reason | status | when |", "|---|---|---|"]
    for name, meaning in means.items():
        kind: type[errors.TurretError] = getattr(errors, name)
        lines.append(f"| `{kind.reason}` | `{kind.code.name}` | {meaning} |")
    lines.append("| `INTERNAL` | `INTERNAL` | a bug; the log has the request id and a traceback |")
    return "\n".join(lines)


def render_metrics() -> str:
    lines = ["| series | type | meaning |", "|---|---|---|"]
    for collector in Metrics().registry._collector_to_names:
        name = getattr(collector, "_name", "")
        if not name.startswith("turret"):
            continue
        kind = getattr(collector, "_type", "")
        labels = ",".join(getattr(collector, "_labelnames", ()))
        shown = f"{name}_total" if kind == "counter" else f"{name}_info" if kind == "info" else name
        shown = f"{shown}{{{labels}}}" if labels else shown
        lines.append(f"| `{shown}` | {kind} | {getattr(collector, '_documentation', '')} |")
    return "\n".join(lines)
