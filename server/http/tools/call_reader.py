"""Reads one call, ``{"name": ..., "arguments": {...}}``, out of a growing text."""

from __future__ import annotations

import json
import re
from collections.abc import Container
from typing import Any

from turret.server.http.tools.pieces import CallBegun, CallGrown, Piece

_HEAD = re.compile(
    r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_TAIL = re.compile(r"\s*\}")


class ObjectEnd:
    """Finds where a JSON object ends, however its text is cut."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._is_escaped = False

    def find(self, text: str) -> int | None:
        """The place after the closing bracket, from the next character on; None if further on."""
        for place, character in enumerate(text):
            if self._in_string:
                if self._is_escaped:
                    self._is_escaped = False
                elif character == "\\":
                    self._is_escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return place + 1
        return None


class CallReader:
    """Reads a call from the bracket that opens it on.

    Args:
        index: Which call of the answer it is.
        names: Of the tools there are.

    Attributes:
        is_done: The call is complete.
        is_none: It turned out to be something else; ``held`` has all of it.
        held: Text that is not read yet: what follows a complete call.
    """

    def __init__(self, index: int, names: Container[str]) -> None:
        self._index = index
        self._names = names
        self._whole = ObjectEnd()
        self._num_looked_at = 0
        self._arguments: ObjectEnd | None = None
        self._is_closing = False
        self.is_begun = self.is_done = self.is_none = False
        self.held = ""

    def feed(self, text: str) -> list[Piece]:
        """The pieces that more text makes certain."""
        self.held += text
        pieces: list[Piece] = []
        if not self.is_begun:
            pieces += self._begin()
        if self._arguments is not None:
            pieces += self._grow(self._arguments)
        if self._is_closing and (tail := _TAIL.match(self.held)):
            self.held = self.held[tail.end() :]
            self._is_closing, self.is_done = False, True
        return pieces

    def _begin(self) -> list[Piece]:
        head = _HEAD.match(self.held)
        if head is not None:
            name = _loaded(head[1])
            if name not in self._names:
                self.is_none = True
                return []
            self.held = self.held[head.end() :]
            self.is_begun, self._arguments = True, ObjectEnd()
            return [CallBegun(self._index, name)]
        # The fields may come in another order. Then read the call as a whole.
        end = self._whole.find(self.held[self._num_looked_at :])
        if end is None:
            self._num_looked_at = len(self.held)
            return []
        end += self._num_looked_at
        call = _loaded(self.held[:end])
        name = call.get("name") if isinstance(call, dict) else None
        if not isinstance(name, str) or name not in self._names:
            self.is_none = True
            return []
        arguments = call.get("arguments", call.get("parameters", {}))
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        self.held = self.held[end:]
        self.is_begun = self.is_done = True
        return [CallBegun(self._index, name), CallGrown(self._index, arguments)]

    def _grow(self, arguments: ObjectEnd) -> list[Piece]:
        end = arguments.find(self.held)
        if end is not None:
            self._arguments, self._is_closing = None, True
        end = len(self.held) if end is None else end
        grown, self.held = self.held[:end], self.held[end:]
        return [CallGrown(self._index, grown)] if grown else []


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
