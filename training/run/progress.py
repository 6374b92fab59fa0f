"""The progress of a run: a bar on a terminal, otherwise lines.

Without a terminal, a line is printed at least every ten seconds, even if one step, a validation or
the answers for the report take longer. So a log always shows that the run continues, and where.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

_LINES = 20
LINE_SECONDS = 10.0


@contextmanager
def training_progress(
    title: str = "training",
    *,
    stays: bool = True,
    is_quiet: bool = False,
    line_seconds: float = LINE_SECONDS,
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a listener that shows lines of ``metrics.jsonl`` and the trainer's events on stderr.

    Args:
        title: The beginning of the lines.
        stays: Whether the bar stays visible afterwards.
        is_quiet: Whether to show neither the bar nor the lines.
        line_seconds: Maximum number of seconds between two lines without a terminal.
    """
    console = Console(stderr=True, highlight=False, quiet=is_quiet)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        _Steps(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[now]}"),
        _Times(table_column=Column(no_wrap=True)),
    )
    is_drawn = console.is_terminal and not is_quiet
    with _Bar(*columns, console=console, transient=not stays, disable=not is_drawn) as bar:
        task = bar.add_task(title, total=None, now="")
        shown = _Shown(console, title, lambda **fields: bar.update(task, **fields))
        done = threading.Event()
        beating = threading.Thread(target=shown.beat, args=(done, line_seconds), daemon=True)
        if not console.is_terminal:
            shown.line("starting")
            beating.start()
        try:
            yield shown.listen
        finally:
            done.set()


class _Bar(Progress):
    """A bar with room for a terminal's ^C, which would wrap the last line and duplicate it."""

    def get_renderable(self) -> RenderableType:
        return _Narrowed(super().get_renderable())


@dataclass(frozen=True, slots=True)
class _Narrowed:
    """Draws its content a little narrower than the current terminal."""

    drawn: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(1, options.max_width - len("^C"))
        yield from console.render(self.drawn, options.update(width=width))


class _Steps(ProgressColumn):
    """The numbers of finished and of all steps, once they are known."""

    def render(self, task: Task) -> Text:
        done = "" if task.total is None else f"{task.completed:.0f}/{task.total:.0f}"
        return Text(done, style="progress.download")


class _Times(ProgressColumn):
    """The elapsed time, and the remaining time if it can be estimated."""

    def render(self, task: Task) -> Text:
        gone = Text(f"{_clock(task.elapsed or 0.0)} gone", style="progress.elapsed")
        if task.finished or task.time_remaining is None:
            return gone
        left = Text(f" {_clock(task.time_remaining)} left", style="progress.remaining")
        return gone + left


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _Shown:
    """The listener's state. Both the listener and a timer thread print lines from it."""

    def __init__(self, console: Console, title: str, update: Callable[..., None]) -> None:
        self._console = console
        self._title = title
        self._num_steps = 0
        self._update = update
        self._losses = {"step": "", "validation": ""}
        self._step = 0
        self._phase = "starting"
        self._started = self._said = time.monotonic()
        self._lock = threading.Lock()

    def listen(self, row: dict[str, Any]) -> None:
        kind = row["kind"]
        if kind == "begin":
            self._num_steps = row["steps"]
            self._update(total=row["steps"])
        elif kind == "phase":
            self._phase = row["text"]
            # The phase replaces the losses: 80 columns have no room for both.
            self._update(now=self._phase)
        elif kind == "note":
            self._console.print(row["text"], markup=False, soft_wrap=True)
        else:
            self._metrics(row)

    def _metrics(self, row: dict[str, Any]) -> None:
        name = "loss" if row["kind"] == "step" else "validation"
        self._losses[row["kind"]] = text = f"{name} {row['loss']:.3f}"
        if "accuracy" in row:
            # A bar has no room for all three figures.
            self._losses["validation"] = f"accuracy {row['accuracy']:.3f}"
            text += f"  accuracy {row['accuracy']:.3f}  macro F1 {row['macro_f1']:.3f}"
        self._step, self._phase = row["step"], ""
        losses = "  ".join(filter(None, self._losses.values()))
        self._update(completed=self._step, now=losses)
        every = max(1, self._num_steps // _LINES)
        is_due = row["kind"] == "validation" or self._step % every == 0
        if not self._console.is_terminal and is_due:
            self.line(text)

    def line(self, text: str) -> None:
        with self._lock:
            self._said = time.monotonic()
            where = f"step {self._step}/{self._num_steps}  " if self._num_steps else ""
            seconds = self._said - self._started
            self._console.print(
                f"{self._title}: {where}{text}  {seconds:.0f} s", markup=False, soft_wrap=True
            )

    def beat(self, done: threading.Event, line_seconds: float) -> None:
        """Print the current state if nothing else was printed for ``line_seconds``."""
        while not done.wait(max(0.0, self._said + line_seconds - time.monotonic())):
            if time.monotonic() - self._said >= line_seconds:
                self.line(self._phase or "working")
