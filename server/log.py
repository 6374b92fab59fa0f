"""One-line logs: ``time level logger message key=value …``, with the request id where there is one.

In JSON format, a line is an object: ``time``, ``level``, ``logger``, ``message``, and the fields.
Callers log ids, names, counts and durations; never prompts, completions or bearer tokens.
"""

from __future__ import annotations

import contextvars
import io
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from turret.server.basics.work import OnProgress
from turret.words import printable

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")

# Values of these characters need no quotes. All others are quoted, so that no value breaks the
# line.
_PLAIN = re.compile(r"[A-Za-z0-9._:/,+@-]+")


def fields(**values: Any) -> dict[str, Any]:
    """The fields of a log line: ``_log.info("message", extra=log.fields(adapter=name))``."""
    return {"fields": values}


def _quoted(value: Any) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def _stamp(record: logging.LogRecord) -> str:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{stamp}.{int(record.msecs):03d}Z"


def _fields_of(formatter: logging.Formatter, record: logging.LogRecord) -> dict[str, Any]:
    values = dict(getattr(record, "fields", {}))
    if current := request_id.get():
        values.setdefault("request_id", current)
    if record.exc_info:
        values["traceback"] = formatter.formatException(record.exc_info)
    return values


class LineFormatter(logging.Formatter):
    """Renders a record, its fields and its traceback as exactly one line."""

    def format(self, record: logging.LogRecord) -> str:
        head = f"{_stamp(record)} {record.levelname} {record.name} {printable(record.getMessage())}"
        values = _fields_of(self, record)
        return " ".join([head, *(f"{key}={_quoted(value)}" for key, value in values.items())])


class JsonFormatter(logging.Formatter):
    """Renders the same content as a JSON object on one line; numbers and booleans keep their type.

    A field with the name of one of the record's own fields gets a trailing underscore.
    """

    def format(self, record: logging.LogRecord) -> str:
        own = {
            "time": _stamp(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        values = {
            f"{key}_" if key in own else key: value
            for key, value in _fields_of(self, record).items()
        }
        return json.dumps(own | values, default=str, ensure_ascii=False)


_FORMATTERS = {"text": LineFormatter, "json": JsonFormatter}


def configure(
    level: int = logging.INFO,
    stream: TextIO | None = None,
    log_format: Literal["text", "json"] = "text",
) -> None:
    """Send everything under ``turret``, and other loggers' warnings, to ``stream`` (stderr)."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_FORMATTERS[log_format]())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("turret").setLevel(level)
    logging.captureWarnings(True)


class _Lines(io.TextIOBase):
    """A stream that passes on each line. Handlers write whole lines."""

    def __init__(self, take: Callable[[str], None]) -> None:
        self._take = take

    def write(self, text: str) -> int:
        self._take(text.removesuffix("\n"))
        return len(text)


@contextmanager
def taken_by(take: Callable[[str], None]) -> Iterator[None]:
    """Pass log lines to ``take`` instead of stderr while the block runs."""
    handlers = [
        each
        for each in logging.getLogger().handlers
        if isinstance(each, logging.StreamHandler) and each.stream is sys.stderr
    ]
    before = sys.stderr
    for handler in handlers:
        handler.setStream(_Lines(take))
    try:
        yield
    finally:
        for handler in handlers:
            handler.setStream(before)


# Progress of long steps: a bar on the terminal, otherwise an occasional log line.

_log = logging.getLogger(__name__)
# Bars currently shown.
_drawn: list[Progress] = []
# Steps that finish sooner get no log line.
_FIRST_SECONDS = 3.0
_EVERY_SECONDS = 10.0


@contextmanager
def progress_bar() -> Iterator[OnProgress]:
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

    # Print lines above the bar, which redraws it. A line that is written directly would end up next
    # to the bar.
    with taken_by(above), Progress(*columns, console=console) as bar, _noted(bar):
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
    """Show the cursor again, which a bar hides, even if the bar's work has not ended.

    The process may end while a thread still loads something.
    """
    for bar in tuple(_drawn):
        bar.stop()


def _lines(now: Callable[[], float]) -> OnProgress:
    """A function that logs steps after ``_FIRST_SECONDS``, and then every ``_EVERY_SECONDS``."""
    due: dict[str, float] = {}

    def report(description: str, done: int, total: int) -> None:
        when = due.setdefault(description, now() + _FIRST_SECONDS)
        if now() >= when and done < total:
            due[description] = now() + _EVERY_SECONDS
            _log.info(description, extra=fields(done=done, total=total))

    return report
