"""Reads one call, ``NAME[ARGS]{...}``, out of a growing text."""

from __future__ import annotations

import re
from collections.abc import Container

from turret.server.http.tools.call_reader import ObjectEnd
from turret.server.http.tools.forms import ARGUMENTS, CALL_ID
from turret.server.http.tools.pieces import CallBegun, CallGrown, Piece

_HEAD = re.compile(
    r"\s*([A-Za-z0-9_.-]+)\s*"
    rf"(?:{re.escape(CALL_ID)}\s*([A-Za-z0-9_-]+)\s*)?"
    rf"(?:{re.escape(ARGUMENTS)})?\s*(?=\{{)"
)
# Longer than any name with its id and marks.
_MAX_HEAD_CHARS = 256


class NamedReader:
    """Reads a call from its name on.

    Args:
        index: Which call of the answer it is.
        names: Of the tools there are.

    Attributes:
        is_begun: The call's name is known.
        is_done: The call is complete.
        is_none: It turned out to be something else; ``held`` has all of it.
        held: Text that is not read yet: what follows a complete call.
    """

    def __init__(self, index: int, names: Container[str]) -> None:
        self._index = index
        self._names = names
        self._arguments = ObjectEnd()
        self.is_begun = self.is_done = self.is_none = False
        self.held = ""

    def feed(self, text: str) -> list[Piece]:
        """The pieces that more text makes certain."""
        self.held += text
        pieces: list[Piece] = []
        if not self.is_begun:
            head = _HEAD.match(self.held)
            if head is None or head[1] not in self._names:
                self.is_none = "{" in self.held or len(self.held) > _MAX_HEAD_CHARS
                return []
            self.held = self.held[head.end() :]
            self.is_begun = True
            pieces.append(CallBegun(self._index, head[1], head[2] or ""))
        end = self._arguments.find(self.held)
        self.is_done = end is not None
        grown = self.held[:end]
        self.held = self.held[len(grown) :]
        return [*pieces, CallGrown(self._index, grown)] if grown else pieces
