"""Prints adapters, fusions and merges as tables."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from turret.clients.results import Adapter, Alias, Fusion, MergeState, ModuleError
from turret.words import about_bytes, counted

# Warn if rounding loses this share of the change or more.
_LOST = 0.5
_WIDEST = 10_000
_KINDS: dict[str, dict[str, Any]] = {
    # Fold a long name onto the next line, because a cut one is useless.
    "text": {"overflow": "fold"},
    "bold": {"no_wrap": True, "style": "bold"},
    "number": {"justify": "right"},
}
# Maximum number of labels of a head to show.
_MOST_LABELS = 20


def print_adapters(adapters: Iterable[Adapter]) -> None:
    """Print one row per adapter."""
    columns: dict[str, str] = dict.fromkeys(("name", "method", "ranks", "where"), "text")
    columns |= dict.fromkeys(("gen.", "in use", "size"), "number")
    rows = (
        (
            adapter.name,
            adapter.method,
            _ranks(adapter),
            _where(adapter),
            str(adapter.generation),
            str(adapter.in_flight),
            about_bytes(adapter.bytes_disk),
        )
        for adapter in adapters
    )
    print_cells(columns, rows)


def print_cells(columns: Mapping[str, str], rows: Iterable[Sequence[str]], **options: Any) -> None:
    """Print a table whose cells are shown as they are, even if they look like rich's markup.

    Args:
        columns: Heading → kind.
        rows: The cells.
        options: Options of rich's table.
    """
    table = Table(**options)
    for heading, kind in columns.items():
        table.add_column(Text(heading), **_KINDS[kind])
    for row in rows:
        table.add_row(*map(Text, row))
    terminal().print(table)


def print_change(verb: str, adapter: Adapter) -> None:
    """Print a line about an adapter that was registered or replaced, and one per warning.

    Args:
        verb: The action, such as ``loaded``.
        adapter: The adapter as it is now.
    """
    ranks = f" of rank {_ranks(adapter)}" if adapter.ranks else ""
    print(
        f"{verb} {adapter.name}@{adapter.generation}: {adapter.method}{ranks},"
        f" {about_bytes(adapter.bytes_disk)}, {_where(adapter)}"
    )
    if adapter.chat_template:
        print(f"chat template: {adapter.chat_template}")
    for warning in adapter.warnings:
        print(f"warning: {warning}")


def print_adapter(adapter: Adapter, *, made: str = "uploaded or fused") -> None:
    """Print one row per property; ``made`` describes the origin of files without a source."""
    used = adapter.last_used_time
    rows = {
        "name": adapter.name,
        "uuid": adapter.uuid,
        "generation": str(adapter.generation),
        "kept": ", ".join(map(str, adapter.kept_generations)) or "none",
        "digest": adapter.digest,
        "method": adapter.method,
        "ranks": _ranks(adapter),
        "target modules": ", ".join(adapter.target_modules),
        "labels": _labels(adapter),
        "state": adapter.state.lower(),
        "residency": _where(adapter),
        "size": f"disk {about_bytes(adapter.bytes_disk)}, host {about_bytes(adapter.bytes_host)}, "
        f"device {about_bytes(adapter.bytes_device)}",
        "in flight": str(adapter.in_flight),
        "last used": "never" if used is None else used.isoformat(sep=" ", timespec="seconds"),
        "base model": adapter.base_model,
        "source": adapter.source or made,
        "chat template": adapter.chat_template or "the base model's",
        "invocation tokens": " ".join(map(str, adapter.invocation_token_ids)),
        "warnings": "\n".join(adapter.warnings),
    }
    _print_rows(rows)


def print_fusion(fusion: Fusion) -> None:
    """Print the new adapter, then the errors of the fusion."""
    print_adapter(fusion.adapter, made="fused")
    _print_errors(fusion.relative_error, fusion.modules)
    _print_kinds(fusion.modules)


def alias_text(alias: Alias) -> str:
    """An alias and its targets, with their shares of the requests if there are several."""
    total = sum(target.weight for target in alias.targets)
    targets = (
        f"{target.name}@{target.generation}"
        + (f" ({target.weight / total:.0%})" if len(alias.targets) > 1 else "")
        for target in alias.targets
    )
    return f"{alias.name} is {', '.join(targets)}"


def print_merge_state(state: MergeState) -> None:
    """Print the mix that is merged, and the errors of the merge."""
    if not state.active:
        print(f"nothing is merged; base generation {state.base_generation}")
        return
    time = state.merge_time
    rows = {
        "merged": mix_text(state),
        "precision": state.precision.lower(),
        "base generation": str(state.base_generation),
        "since": "" if time is None else time.isoformat(sep=" ", timespec="seconds"),
    }
    _print_rows(rows)
    _print_errors(state.relative_error, state.modules)
    share = state.update_error
    print(f"the rounding error is {share:.1%} of the adapters' update")
    if share >= _LOST:
        advice = "; use --precision bf16 to keep it" if state.precision == "NF4" else ""
        print(f"warning: most of the update is lost{advice}")


def mix_text(state: MergeState) -> str:
    """The mix that is merged, such as ``sql@1=0.5, json@2=1``."""
    return ", ".join(f"{a.name}@{a.generation}={a.weight:g}" for a in state.adapters)


def _print_rows(rows: dict[str, str]) -> None:
    known = [(name, value) for name, value in rows.items() if value]
    print_cells({"name": "bold", "value": "text"}, known, show_header=False)


def _print_errors(relative_error: float, modules: tuple[ModuleError, ...]) -> None:
    console = terminal()
    console.print(f"relative error {relative_error:.3g} over {counted(len(modules), 'module')}")
    if modules:
        worst = max(modules, key=lambda module: module.relative_error)
        console.print(Text(f"worst {worst.relative_error:.3g} in {worst.module}"))


def _print_kinds(modules: Iterable[ModuleError]) -> None:
    """One row per kind of module, such as ``q_proj``, over all layers."""
    kinds: dict[str, list[ModuleError]] = {}
    for module in modules:
        kinds.setdefault(module.module.rpartition(".")[2], []).append(module)
    headings = ("layers", "rank", "median error", "worst error")
    rows = []
    for kind, group in kinds.items():
        errors = [module.relative_error for module in group]
        low, high = min(m.rank for m in group), max(m.rank for m in group)
        rank = str(low) if low == high else f"{low}-{high}"
        rows.append(
            (kind, str(len(group)), rank, f"{median(errors):.3g}", f"{max(errors):.3g}"),
        )
    print_cells({"module": "text", **dict.fromkeys(headings, "number")}, rows)


def terminal() -> Console:
    """A console as wide as the terminal; for a file or a pipe, lines may have any length."""
    return Console() if sys.stdout.isatty() or "COLUMNS" in os.environ else Console(width=_WIDEST)


def _where(adapter: Adapter) -> str:
    """The fastest tier that an adapter is in, whether it is pinned, and any unusual state."""
    parts = [adapter.residency.lower()]
    if adapter.pinned:
        parts.append("pinned")
    if adapter.state not in ("", "ACTIVE"):
        parts.append(adapter.state.lower())
    return ", ".join(parts)


def _ranks(adapter: Adapter) -> str:
    return ", ".join(map(str, adapter.ranks))


def _labels(adapter: Adapter) -> str:
    """The labels of the adapter's head; only the first if there are many."""
    more = len(adapter.labels) - _MOST_LABELS
    shown = ", ".join(adapter.labels[:_MOST_LABELS])
    return f"{shown} and {more} more (--json has all)" if more > 0 else shown
