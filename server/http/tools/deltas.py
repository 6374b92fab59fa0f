"""The pieces of an answer in the words of /v1/chat/completions."""

from __future__ import annotations

from typing import Any

from turret.server.http.tools.pieces import CallBegun, Piece, Said, Thought
from turret.server.http.tools.reader import AnswerReader


def delta_of(piece: Piece) -> dict[str, Any]:
    """The delta of a stream's event for a piece."""
    if isinstance(piece, Said):
        return {"content": piece.text}
    if isinstance(piece, Thought):
        return {"reasoning_content": piece.text}
    call: dict[str, Any] = {"index": piece.index}
    if isinstance(piece, CallBegun):
        function = {"name": piece.name, "arguments": ""}
        call |= {"id": piece.call_id, "type": "function", "function": function}
    else:
        call["function"] = {"arguments": piece.text}
    return {"tool_calls": [call]}


def message_of(reader: AnswerReader, text: str) -> dict[str, Any]:
    """A whole answer as a message of the assistant."""
    said: list[str] = []
    thought: list[str] = []
    calls: list[dict[str, Any]] = []
    for piece in (*reader.feed(text), *reader.finish()):
        if isinstance(piece, Said):
            said.append(piece.text)
        elif isinstance(piece, Thought):
            thought.append(piece.text)
        elif isinstance(piece, CallBegun):
            function = {"name": piece.name, "arguments": ""}
            calls.append({"id": piece.call_id, "type": "function", "function": function})
        else:
            calls[-1]["function"]["arguments"] += piece.text
    content = "".join(said)
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if thought:
        message["reasoning_content"] = "".join(thought)
    if calls:
        message |= {"content": content or None, "tool_calls": calls}
    return message
