"""An answer to a conversation, taken apart as its text grows, in the words of OpenAI's API."""

from __future__ import annotations

import uuid
from collections.abc import Collection
from typing import Any

from turret.server.http.tools.calls import Calls
from turret.server.http.tools.pieces import CallBegun, CallGrown, Piece, Said, Thought
from turret.server.http.tools.reasoning import Reasoning

# Mistral's templates take ids of nine characters alone, others any.
_ID_CHARS = {"mistral": 9}


class AnswerReader:
    """Reads one answer.

    Args:
        form: How the model calls tools; None if it is told of none.
        names: Of the tools that it may call; none if it may not.
        is_parallel: Whether calls after the first are told.
        has_reasoning: Whether the answer may begin with a block of reasoning.
        is_open: Whether the prompt has begun that block.

    Attributes:
        num_calls: Calls of tools told so far.
    """

    def __init__(
        self,
        form: str | None,
        names: Collection[str],
        *,
        is_parallel: bool = True,
        has_reasoning: bool = False,
        is_open: bool = False,
    ) -> None:
        self._reasoning = Reasoning(is_open) if has_reasoning else None
        self._calls = Calls(form, names) if form is not None and names else None
        self._id_chars = _ID_CHARS.get(form or "", 24)
        self._most = None if is_parallel else 1
        self.num_calls = 0

    def feed(self, text: str) -> list[dict[str, Any]]:
        """The deltas that more text makes certain."""
        pieces: list[Piece] = [Said(text)] if text else []
        return self._deltas(pieces if self._reasoning is None else self._reasoning.feed(text))

    def finish(self) -> list[dict[str, Any]]:
        """The last deltas, when the answer has ended."""
        deltas = [] if self._reasoning is None else self._deltas(self._reasoning.finish())
        if self._calls is not None:
            deltas += self._told(self._calls.finish())
        return deltas

    def _deltas(self, pieces: list[Piece]) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        for piece in pieces:
            if isinstance(piece, Said) and self._calls is not None:
                deltas += self._told(self._calls.feed(piece.text))
            else:
                deltas += self._told([piece])
        return deltas

    def _told(self, pieces: list[Piece]) -> list[dict[str, Any]]:
        return [delta for piece in pieces if (delta := self._delta(piece)) is not None]

    def _delta(self, piece: Piece) -> dict[str, Any] | None:
        if isinstance(piece, Said):
            return {"content": piece.text}
        if isinstance(piece, Thought):
            return {"reasoning_content": piece.text}
        if self._most is not None and piece.index >= self._most:
            return None
        call: dict[str, Any] = {"index": piece.index}
        if isinstance(piece, CallBegun):
            self.num_calls += 1
            call["id"] = self._new_id()
            call |= {"type": "function", "function": {"name": piece.name, "arguments": ""}}
        else:
            assert isinstance(piece, CallGrown)
            call["function"] = {"arguments": piece.text}
        return {"tool_calls": [call]}

    def _new_id(self) -> str:
        digits = uuid.uuid4().hex
        return digits[:9] if self._id_chars == 9 else f"call_{digits[: self._id_chars]}"


def message_of(reader: AnswerReader, text: str) -> dict[str, Any]:
    """A whole answer as a message of the assistant."""
    said: list[str] = []
    thought: list[str] = []
    calls: list[dict[str, Any]] = []
    for delta in (*reader.feed(text), *reader.finish()):
        said.append(delta.get("content", ""))
        thought.append(delta.get("reasoning_content", ""))
        for part in delta.get("tool_calls", ()):
            if "id" in part:
                calls.append({name: part[name] for name in ("id", "type", "function")})
            else:
                calls[-1]["function"]["arguments"] += part["function"]["arguments"]
    content = "".join(said)
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if any(thought):
        message["reasoning_content"] = "".join(thought)
    if calls:
        message |= {"content": content or None, "tool_calls": calls}
    return message
