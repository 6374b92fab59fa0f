"""Progress of long steps: a bar on the terminal, otherwise an occasional log line."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from turret.server import log

Report = Callable[[str, int, int], None]

_log = logging.getLogger(__name__)
# Bars currently shown.
_drawn: list[Progress] = []
# Steps that finish sooner get no log line.
_FIRST_SECONDS = 3.0
_EVERY_SECONDS = 10.0


@contextmanager
def progress_bar() -> Iterator[Report]:
    """Yield ``report(description, done, total)``; draws on stderr if that is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(time.monotonic)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )

    def above(line: str) -> None:
        console.print(Text(line), highlight=False, soft_wrap=True)

    # Printing above the bar redraws it. A line written past it would end up beside the bar.
    with log.taken_by(above), Progress(*columns, console=console) as bar, _noted(bar):
        tasks = {}

        def report(description: str, done: int, total: int) -> None:
            if description not in tasks:
                tasks[description] = bar.add_task(description, total=total)
            bar.update(tasks[description], completed=done)

        yield report


@contextmanager
def _noted(bar: Progress) -> Iterator[None]:
    _drawn.append(bar)
    try:
        yield
    finally:
        _drawn.remove(bar)


def end_bars() -> None:
    """Show the cursor again, which a bar hides, before its work has ended.

    What a thread loads is not waited for when the process ends.
    """
    for bar in tuple(_drawn):
        bar.stop()


def _lines(now: Callable[[], float]) -> Report:
    """Log steps that take longer than ``_FIRST_SECONDS``, and again every ``_EVERY_SECONDS``."""
    due: dict[str, float] = {}

    def report(description: str, done: int, total: int) -> None:
        when = due.setdefault(description, now() + _FIRST_SECONDS)
        if now() >= when and done < total:
            due[description] = now() + _EVERY_SECONDS
            _log.info(description, extra=log.fields(done=done, total=total))

    return report
