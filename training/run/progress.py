"""The progress of a run on the terminal: a bar, or a line now and then where there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_LINES = 20


@contextmanager
def training_progress(
    num_steps: int, title: str = "training"
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a listener for the lines of ``metrics.jsonl``; draws on stderr."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[losses]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=num_steps, losses="")
        losses = {"step": "", "validation": ""}

        def listen(row: dict[str, Any]) -> None:
            name = "loss" if row["kind"] == "step" else "validation"
            losses[row["kind"]] = f"{name} {row['loss']:.3f}"
            bar.update(task, completed=row["step"], losses="  ".join(filter(None, losses.values())))
            is_due = row["kind"] == "validation" or row["step"] % max(1, num_steps // _LINES) == 0
            if not console.is_terminal and is_due:
                console.print(
                    f"step {row['step']}/{num_steps}  {losses[row['kind']]}  {row['seconds']:.0f} s"
                )

        yield listen
