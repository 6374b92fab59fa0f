"""Splits an answer in channels into thoughts, text, and calls of tools."""

from __future__ import annotations

from collections.abc import Container

from turret.server.basics.channels import CHANNEL, ENDS, FUNCTIONS, MARKS, MESSAGE, Header
from turret.server.http.tools.pieces import (
    CallBegun,
    CallGrown,
    Piece,
    Said,
    Thought,
    possible_start,
)

# Longer than any mark together with the names of a channel and a tool.
_MAX_HEADER_CHARS = 256
_RECIPIENT = "to="


class Channels:
    """Splits a growing text with its marks; see ``server/basics/channels.py``.

    An answer that begins as no message does is something said, and so is a call of a tool that
    there is not.

    Args:
        names: Of the tools that may be called.
    """

    def __init__(self, names: Container[str]) -> None:
        self._names = names
        # begin: start of the answer; header: before a message's text; then the kind of that text;
        # plain: an answer without messages.
        self._state = "begin"
        self._held = ""
        self._count = 0
        self._has_arguments = False

    def feed(self, text: str) -> list[Piece]:
        """The pieces that more text makes certain."""
        self._held += text
        pieces: list[Piece] = []
        while True:
            before = self._state, len(self._held)
            pieces += self._step()
            if before == (self._state, len(self._held)):
                return pieces

    def finish(self) -> list[Piece]:
        """The pieces that are left when the answer has ended."""
        held, self._held = self._held, ""
        if self._state in ("begin", "header"):
            # Drop a header without a message.
            is_header = held.lstrip().startswith(MARKS) or self._state == "header"
            return [] if is_header or not held else [Said(held)]
        return [*self._grown(held), *self._end()]

    def _step(self) -> list[Piece]:
        if self._state == "begin":
            return self._begin()
        if self._state == "header":
            return self._read_header()
        if self._state == "plain":
            text, self._held = self._held, ""
            return self._grown(text)
        text, mark = _until(self._held, (*ENDS, CHANNEL))
        if mark is None:
            size = len(text) - max(possible_start(text, m) for m in MARKS)
            self._held = text[size:]
            return self._grown(text[:size])
        # Keep the mark: it begins the next header.
        self._held = self._held[len(text) :]
        pieces = [*self._grown(text), *self._end()]
        self._state = "header"
        return pieces

    def _begin(self) -> list[Piece]:
        begun = self._held.lstrip()
        if begun.startswith((*MARKS, _RECIPIENT)):
            self._state = "header"
        elif not any(start.startswith(begun) for start in (*MARKS, _RECIPIENT)):
            self._state = "plain"
        return []

    def _read_header(self) -> list[Piece]:
        text, found, rest = self._held.partition(MESSAGE)
        if not found:
            if len(text) > _MAX_HEADER_CHARS:
                # The model no longer follows the format: treat everything as text.
                self._state, self._held = "plain", ""
                return [Said(text)]
            return []
        self._held = rest
        header = Header.parse(_last_message(text))
        if header.is_thought:
            self._state = "thought"
            return []
        name = header.recipient.removeprefix(FUNCTIONS)
        if header.recipient.startswith(FUNCTIONS) and name in self._names:
            self._state, self._has_arguments = "call", False
            return [CallBegun(self._count, name)]
        self._state = "said"
        return [] if header.is_said else [Said(text + MESSAGE)]

    def _grown(self, text: str) -> list[Piece]:
        if self._state == "call" and not self._has_arguments:
            text = text.lstrip()
            self._has_arguments = bool(text)
        if not text:
            return []
        if self._state == "call":
            return [CallGrown(self._count, text)]
        return [Thought(text) if self._state == "thought" else Said(text)]

    def _end(self) -> list[Piece]:
        """The pieces at the end of a message."""
        if self._state != "call":
            return []
        pieces: list[Piece] = [] if self._has_arguments else [CallGrown(self._count, "{}")]
        self._count += 1
        return pieces


def _until(text: str, marks: tuple[str, ...]) -> tuple[str, str | None]:
    """The text before the first of the marks, and that mark."""
    places = {mark: place for mark in marks if (place := text.find(mark)) >= 0}
    if not places:
        return text, None
    mark = min(places, key=places.__getitem__)
    return text[: places[mark]], mark


def _last_message(header: str) -> str:
    """A header and its role, without the end of the message before it."""
    for end in ENDS:
        header = header.rpartition(end)[2]
    return header
