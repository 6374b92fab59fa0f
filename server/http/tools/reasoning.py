"""Takes a block of reasoning from the beginning of an answer."""

from __future__ import annotations

from turret.server.http.tools.pieces import Piece, Said, Thought, possible_start

_BEGIN, _END = "<think>", "</think>"


class Reasoning:
    """Splits a growing text into thoughts and the text after them.

    Args:
        is_open: Whether the prompt has begun the block already.
    """

    def __init__(self, is_open: bool) -> None:
        # before → inside → trimmed (blanks after the block) → after; or before → after.
        self._state = "inside" if is_open else "before"
        self._held = ""

    def feed(self, text: str) -> list[Piece]:
        """The pieces that more text makes certain."""
        self._held += text
        pieces: list[Piece] = []
        if self._state == "before":
            begun = self._held.lstrip()
            if begun.startswith(_BEGIN):
                self._state, self._held = "inside", begun.removeprefix(_BEGIN)
            elif not _BEGIN.startswith(begun):
                self._state = "after"
        if self._state == "inside":
            thought, found, rest = self._held.partition(_END)
            if found:
                self._state, self._held = "trimmed", rest
            else:
                size = len(thought) - possible_start(thought, _END)
                thought, self._held = thought[:size], thought[size:]
            if thought:
                pieces.append(Thought(thought))
        if self._state == "trimmed":
            self._held = self._held.lstrip()
            if self._held:
                self._state = "after"
        if self._state == "after":
            pieces += self._let_go()
        return pieces

    def finish(self) -> list[Piece]:
        """The pieces that are left when the answer has ended."""
        if self._state == "inside" and self._held:
            held, self._held = self._held, ""
            return [Thought(held)]
        return self._let_go()

    def _let_go(self) -> list[Piece]:
        held, self._held = self._held, ""
        return [Said(held)] if held else []
