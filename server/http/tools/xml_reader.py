"""Reads one call, ``<function=NAME><parameter=NAME>...``, out of a growing text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from turret.server.http.tools.pieces import CallBegun, CallGrown, Piece, possible_start
from turret.server.http.tools.schemas import kind_of, kinds_of

_BEGIN, _END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_TEXT = frozenset({"string"})
_HEAD = re.compile(rf"\s*{_BEGIN}([^<>\n]{{1,64}})>")
_NEXT = re.compile(rf"\s*(?:{_PARAMETER}([^<>\n]+)>(?:\n|(?=[^\n]))|{_END})")


class XmlReader:
    """Reads a call from ``<function=`` on, and returns its arguments as JSON.

    A parameter's value is text between its tags, whatever its type: the tool's schema says what the
    text stands for. Texts grow as they come, other values come whole.

    Args:
        index: Which call of the answer it is.
        tools: Those there are, with their arguments' JSON schemas.

    Attributes:
        is_begun: The call's name is known.
        is_done: The call is complete.
        is_none: It turned out to be something else; ``held`` has all of it.
        held: Text that is not read yet: what follows a complete call.
    """

    def __init__(self, index: int, tools: Mapping[str, Mapping[str, Any]]) -> None:
        self._index = index
        self._tools = tools
        self._schema: Mapping[str, Any] = {}
        self._num_parameters = 0
        # Kinds of values that the current parameter may have; None between parameters.
        self._kinds: frozenset[str] | None = None
        self.is_begun = self.is_done = self.is_none = False
        self.held = ""

    def feed(self, text: str) -> list[Piece]:
        """The pieces that more text makes certain."""
        self.held += text
        pieces: list[Piece] = []
        if not self.is_begun:
            pieces += self._begin()
        grown = ""
        while self.is_begun and not self.is_done:
            before = len(self.held), self._kinds
            grown += self._between() if self._kinds is None else self._value(self._kinds)
            if before == (len(self.held), self._kinds):
                break
        return [*pieces, CallGrown(self._index, grown)] if grown else pieces

    def _begin(self) -> list[Piece]:
        head = _HEAD.match(self.held)
        if head is None:
            begun = self.held.lstrip()
            is_open = begun.startswith(_BEGIN) and len(begun) < 80 and "\n" not in begun
            self.is_none = not (_BEGIN.startswith(begun) or is_open)
            return []
        if head[1] not in self._tools:
            self.is_none = True
            return []
        self.held = self.held[head.end() :]
        self.is_begun = True
        self._schema = self._tools[head[1]]
        return [CallBegun(self._index, head[1]), CallGrown(self._index, "{")]

    def _between(self) -> str:
        """Up to a value, or the end of the call."""
        found = _NEXT.match(self.held)
        if found is None:
            begun = self.held.lstrip()
            if any(mark.startswith(begun) or begun.startswith(mark) for mark in (_PARAMETER, _END)):
                return ""
            # Neither a parameter nor the end follows: end the call here; the rest is text.
            self.is_done = True
            return "}"
        self.held = self.held[found.end() :]
        name = found[1]
        if name is None:
            self.is_done = True
            return "}"
        properties = self._schema.get("properties")
        schema = properties.get(name) if isinstance(properties, dict) else None
        self._kinds = kinds_of(schema, self._schema)
        comma = ", " if self._num_parameters else ""
        self._num_parameters += 1
        opening = '"' if self._kinds == _TEXT else ""
        return f"{comma}{json.dumps(name, ensure_ascii=False)}: {opening}"

    def _value(self, kinds: frozenset[str]) -> str:
        value, found, rest = self.held.partition(_PARAMETER_END)
        if found:
            # The line break before the closing tag is not part of the value.
            value = value.removesuffix("\n")
            self.held, self._kinds = rest, None
        elif kinds == _TEXT:
            ends = (f"\n{_PARAMETER_END}", _PARAMETER_END)
            size = len(value) - max(possible_start(value, end) for end in ends)
            value, self.held = value[:size], value[size:]
        else:
            return ""
        if kinds != _TEXT:
            return json.dumps(_meant(value, kinds), ensure_ascii=False)
        return json.dumps(value, ensure_ascii=False)[1:-1] + ('"' if found else "")


def _meant(text: str, kinds: frozenset[str]) -> Any:
    """The value of a parameter's text: parsed as JSON if possible, otherwise the text itself."""
    bare = text.strip()
    lowered = bare.lower()
    if lowered in ("true", "false", "null", "none"):
        # Accept Python's spellings too.
        bare = "null" if lowered == "none" else lowered
    try:
        value = json.loads(bare)
    except (ValueError, RecursionError):
        return text
    if "string" in kinds and kind_of(value) not in kinds:
        return text
    return value
