"""Shows results as a table, and stores each as a line of JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.machine import cpu_name, slug
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).resolve().parent.parent / "results"

Row = dict[str, Any]
# Table width for files and pipes, which have no width of their own.
_PLAIN_WIDTH = 130


def make_console() -> Console:
    """Standard output, wide enough for the tables."""
    console = Console()
    return console if console.is_terminal else Console(width=_PLAIN_WIDTH)


def print_rows(console: Console, title: str, rows: Sequence[dict[str, str]]) -> None:
    """Print dictionaries with the same keys as rows; the first column is the row's name."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for number, key in enumerate(rows[0]):
        table.add_column(key, justify="right" if number else "left", no_wrap=number == 0)
    for row in rows:
        table.add_row(*row.values())
    console.print(table)


def append_rows(rows: Sequence[Row]) -> Path:
    """Add rows to the file of this machine's processor; returns its path."""
    path = RESULTS / f"{slug(cpu_name())}.jsonl"
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, sort_keys=True) + "\n")
    return path
