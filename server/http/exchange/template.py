"""An event that comes again and again, with one text in it that differs."""

from __future__ import annotations

import uuid
from typing import Any

from turret.server.http.exchange.reply import dumps, event_bytes

# Placeholder for the text. It is random, so no text from a client contains it.
HOLE = uuid.uuid4().hex


class Template:
    """The bytes of an event around its text, made once.

    Args:
        value: The event, with ``HOLE`` for the text.
    """

    def __init__(self, value: Any) -> None:
        self._before, _, self._after = event_bytes(value).partition(dumps(HOLE))

    def event(self, text: str) -> bytes:
        """The event with this text."""
        return self._before + dumps(text) + self._after
