"""One-line logs: ``time level logger message key=value …``, with the request id where there is one.

Callers log ids, names, counts and durations; never prompts, completions or bearer tokens.
"""

from __future__ import annotations

import contextvars
import json
import logging
import re
import sys
import time
from typing import Any, TextIO

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")

# Values made of these need no quotes; everything else is quoted, so a value never breaks the line.
_PLAIN = re.compile(r"[A-Za-z0-9._:/,+@-]+")


def fields(**values: Any) -> dict[str, Any]:
    """``log.info("message", extra=fields(adapter=name))``."""
    return {"fields": values}


def _quoted(value: Any) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


class LineFormatter(logging.Formatter):
    """Renders a record, its fields and its traceback as exactly one line."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        message = record.getMessage().replace("\r", "\\r").replace("\n", "\\n")
        head = f"{stamp}.{int(record.msecs):03d}Z {record.levelname} {record.name} {message}"
        values = dict(getattr(record, "fields", {}))
        if current := request_id.get():
            values.setdefault("request_id", current)
        if record.exc_info:
            values["traceback"] = self.formatException(record.exc_info)
        return " ".join([head, *(f"{key}={_quoted(value)}" for key, value in values.items())])


def configure(level: int = logging.INFO, stream: TextIO | None = None) -> None:
    """Send everything under ``turret`` and warnings of others to ``stream`` (stderr)."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(LineFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("turret").setLevel(level)
    logging.captureWarnings(True)
