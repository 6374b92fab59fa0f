"""``turret train plan``: the steps and the cost of a run, before it starts."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from turret.training.memory import MemoryEstimate, estimate_memory, measure_peak
from turret.training.run import max_rank_flag
from turret.training.serving_cost import ServingCost, serving_cost
from turret.training.settings import render_config
from turret.training.settings.checks import SERVED_RANK
from turret.training.settings.resolve import Resolved
from turret.words import counted

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of a run: its steps and its cost.

    Attributes:
        resolved: The run.
        rows: The lines to print, each with its name.
        estimate: The memory of the run; None for a fusion, whose components are part of it.
        cost: The cost of serving the adapter; None for a fusion.
    """

    resolved: Resolved
    rows: tuple[tuple[str, str], ...]
    estimate: MemoryEstimate | None = None
    cost: ServingCost | None = None

    def figures(self) -> dict[str, Any]:
        """The resolved config, the extent of the run and its costs, for JSON."""
        dataset, (memory, cost) = self.resolved.dataset, (self.estimate, self.cost)
        return {
            "config": self.resolved.config,
            "data": {
                "examples": dataset.num_examples,
                "tokens": dataset.num_tokens,
                "rows": len(dataset.train),
                "validation_rows": len(dataset.validation),
            },
            "memory": memory and asdict(memory) | {"total": memory.total},
            "served": cost,
        }

    def print(self, console: Console) -> None:
        """Print the resolved config, the trained parameters, the memory and the cost of serving."""
        console.print(Text(render_config(self.resolved.config)), soft_wrap=True)
        table = Table(show_header=False, box=None)
        for name, text in self.rows:
            table.add_row(name, Text(text))
        with console.capture() as drawn:
            console.print(table)
        # Remove the blanks that pad all lines to the length of the longest.
        for line in drawn.get().splitlines():
            console.print(Text(line.rstrip()), soft_wrap=True)

    def peak(self) -> int:
        """Run two steps in another process, and measure their peak memory in bytes."""
        with tempfile.TemporaryDirectory() as scratch:
            return measure_peak(self.resolved, Path(scratch))

    def compared(self, peak: int) -> str:
        """A line that compares a measured peak with the estimate."""
        line, estimate = f"measured peak {peak / _MIB:.0f} MiB", self.estimate
        if estimate is None:
            return line
        total = estimate.total
        if self.resolved.config.base.device == "cuda":
            # torch does not count what CUDA itself takes.
            line, total = f"{line} without CUDA's context", total - estimate.process
        return f"{line}; error of the estimate {total / peak - 1:+.1%}"


def make_plan(resolved: Resolved) -> Plan:
    """Estimate the memory of a run, and the cost of serving its adapter."""
    rows = list(_extent(resolved))
    if flag := max_rank_flag(resolved):
        rows.append(("server", f"turret serve{flag} (default: {SERVED_RANK})"))
    if resolved.config.method.components is not None:
        why = "not estimated for a fusion; use --measure"
        return Plan(resolved, (*rows, ("memory", why)))
    estimate, cost = estimate_memory(resolved), serving_cost(resolved)
    return Plan(resolved, (*rows, *_costs(resolved, estimate, cost)), estimate, cost)


def _extent(resolved: Resolved) -> Iterator[tuple[str, str]]:
    run, dataset = resolved.config.run, resolved.dataset
    rows = (
        f", packed into {counted(len(dataset.train), 'row')}"
        if resolved.config.data.packing
        else ""
    )
    yield (
        "data",
        f"{counted(dataset.num_examples, 'example')}, {counted(dataset.num_tokens, 'token')}{rows};"
        f" {len(dataset.validation)} to validate on",
    )
    epochs = (run.steps or 0) * run.batch_size * run.gradient_accumulation / len(dataset.train)
    yield (
        "steps",
        f"{run.steps} of {counted(run.batch_size * run.gradient_accumulation, 'row')}, "
        f"{epochs:.1f} epochs",
    )


def _costs(
    resolved: Resolved, estimate: MemoryEstimate, cost: ServingCost
) -> Iterator[tuple[str, str]]:
    yield "trained weights", f"{estimate.num_parameters:,}"
    yield (
        "memory",
        f"{estimate.total / _MIB:.0f} MiB: base {estimate.base / _MIB:.0f}, adapter and optimizer "
        f"{estimate.adapter / _MIB:.0f}, largest step {estimate.step / _MIB:.0f}, process "
        f"{estimate.process / _MIB:.0f}",
    )
    yield "adapter file", f"{cost.file_bytes / 1e6:.2f} MB ({resolved.config.run.adapter_dtype})"
    yield "served", _served(cost)


def _served(cost: ServingCost) -> str:
    text = (
        f"{cost.host_bytes / _MIB:.2f} MiB of memory, {cost.relative_multiply_adds:.1%} more "
        "products per token than the base"
    )
    cache = f"{cost.cache_bytes / _MIB:.2f} MiB of KV cache"
    if cost.num_soft_tokens:
        text += f"; {counted(cost.num_soft_tokens, 'soft token')} before each prompt, {cache}"
    if cost.num_prefix_positions:
        text += f"; {counted(cost.num_prefix_positions, 'prefix position')} shared by all, {cache}"
    return text
