"""An answer to a conversation, taken apart as its text grows."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Mapping
from typing import Any

from turret.server.http.tools.calls import Calls
from turret.server.http.tools.channels import Channels
from turret.server.http.tools.pieces import CallBegun, Piece, Said, Thought
from turret.server.http.tools.reasoning import Reasoning

# Mistral's templates accept only ids of nine characters; others accept any.
_ID_CHARS = {"mistral": 9, "mistral11": 9}


class AnswerReader:
    """Reads one answer.

    Args:
        form: How the model calls tools; None if it is told of none.
        tools: Those that it may call, with their arguments' JSON schemas; none if it may not.
        is_parallel: Whether calls after the first are told.
        has_reasoning: Whether the answer may begin with a block of reasoning.
        is_open: Whether the prompt has begun that block.
        has_channels: Whether the answer is messages in channels, with their marks.

    Attributes:
        num_calls: Calls of tools told so far.
    """

    def __init__(
        self,
        form: str | None,
        tools: Mapping[str, Mapping[str, Any]],
        *,
        is_parallel: bool = True,
        has_reasoning: bool = False,
        is_open: bool = False,
        has_channels: bool = False,
    ) -> None:
        self._channels = Channels(tools) if has_channels else None
        self._reasoning = Reasoning(is_open) if has_reasoning else None
        has_calls = form is not None and tools and not has_channels
        self._calls = Calls(form, tools) if form is not None and has_calls else None
        self._id_chars = _ID_CHARS.get(form or "", 24)
        self._most = None if is_parallel else 1
        self.num_calls = 0

    def feed(self, text: str) -> list[Piece]:
        """The pieces that more text makes certain; every call has an id."""
        if self._channels is not None:
            return self._numbered(self._channels.feed(text))
        if self._reasoning is not None:
            return self._told(self._reasoning.feed(text))
        return self._told([Said(text)] if text else [])

    def finish(self) -> list[Piece]:
        """The last pieces, when the answer has ended."""
        if self._channels is not None:
            return self._numbered(self._channels.finish())
        pieces = [] if self._reasoning is None else self._told(self._reasoning.finish())
        if self._calls is not None:
            pieces += self._numbered(self._calls.finish())
        return pieces

    def _told(self, pieces: list[Piece]) -> list[Piece]:
        if self._calls is None:
            return pieces
        told: list[Piece] = []
        for piece in pieces:
            if isinstance(piece, Said):
                told += self._numbered(self._calls.feed(piece.text))
            else:
                told.append(piece)
        return told

    def _numbered(self, pieces: list[Piece]) -> list[Piece]:
        """The pieces with ids for calls, without calls beyond the allowed number."""
        told: list[Piece] = []
        for piece in pieces:
            if isinstance(piece, Said | Thought) or self._most is None or piece.index < self._most:
                told.append(self._with_id(piece) if isinstance(piece, CallBegun) else piece)
        return told

    def _with_id(self, call: CallBegun) -> CallBegun:
        self.num_calls += 1
        return call if call.call_id else dataclasses.replace(call, call_id=self._new_id())

    def _new_id(self) -> str:
        digits = uuid.uuid4().hex
        return digits[:9] if self._id_chars == 9 else f"call_{digits[: self._id_chars]}"
