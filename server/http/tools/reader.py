"""Splits an answer as its text grows: into reasoning, channels, text and tool calls."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Container, Mapping
from typing import Any

from turret.server.basics.codes import CHANNEL, ENDS, FUNCTIONS, MARKS, MESSAGE, Header
from turret.server.http.tools.calls import (
    AnswerPiece,
    CallBegun,
    CallGrown,
    Calls,
    Said,
    Thought,
    possible_start,
)

_BEGIN, _END = "<think>", "</think>"


class Reasoning:
    """Splits a growing text into thoughts and the text after them.

    Args:
        is_open: Whether the prompt has already begun the block.
    """

    def __init__(self, is_open: bool) -> None:
        # before → inside → trimmed (blanks after the block) → after; or before → after.
        self._state = "inside" if is_open else "before"
        self._held = ""

    def feed(self, text: str) -> list[AnswerPiece]:
        """Append text, and return the pieces that are now certain."""
        self._held += text
        pieces: list[AnswerPiece] = []
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
            pieces += self._release()
        return pieces

    def finish(self) -> list[AnswerPiece]:
        """The remaining pieces, after the answer has ended."""
        if self._state == "inside" and self._held:
            held, self._held = self._held, ""
            return [Thought(held)]
        return self._release()

    def _release(self) -> list[AnswerPiece]:
        held, self._held = self._held, ""
        return [Said(held)] if held else []


# Longer than any mark together with the names of a channel and a tool.
_MAX_HEADER_CHARS = 256
_RECIPIENT = "to="


class Channels:
    """Splits a growing text with its marks; see ``server/basics/codes.py``.

    An answer that does not begin with a message is text, and so is a call of an unknown tool.

    Args:
        names: The names of the tools that may be called.
    """

    def __init__(self, names: Container[str]) -> None:
        self._names = names
        # begin: at the start of the answer; header: before a message's text; thought, call or said:
        # in a text of that kind; plain: in an answer without messages.
        self._state = "begin"
        self._held = ""
        self._count = 0
        self._has_arguments = False

    def feed(self, text: str) -> list[AnswerPiece]:
        """Append text, and return the pieces that are now certain."""
        self._held += text
        pieces: list[AnswerPiece] = []
        while True:
            before = self._state, len(self._held)
            pieces += self._step()
            if before == (self._state, len(self._held)):
                return pieces

    def finish(self) -> list[AnswerPiece]:
        """The remaining pieces, after the answer has ended."""
        held, self._held = self._held, ""
        if self._state in ("begin", "header"):
            # Drop a header without a message.
            is_header = held.lstrip().startswith(MARKS) or self._state == "header"
            return [] if is_header or not held else [Said(held)]
        return [*self._grown(held), *self._end()]

    def _step(self) -> list[AnswerPiece]:
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
        # Keep the mark, which begins the next header.
        self._held = self._held[len(text) :]
        pieces = [*self._grown(text), *self._end()]
        self._state = "header"
        return pieces

    def _begin(self) -> list[AnswerPiece]:
        begun = self._held.lstrip()
        if begun.startswith((*MARKS, _RECIPIENT)):
            self._state = "header"
        elif not any(start.startswith(begun) for start in (*MARKS, _RECIPIENT)):
            self._state = "plain"
        return []

    def _read_header(self) -> list[AnswerPiece]:
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

    def _grown(self, text: str) -> list[AnswerPiece]:
        if self._state == "call" and not self._has_arguments:
            text = text.lstrip()
            self._has_arguments = bool(text)
        if not text:
            return []
        if self._state == "call":
            return [CallGrown(self._count, text)]
        return [Thought(text) if self._state == "thought" else Said(text)]

    def _end(self) -> list[AnswerPiece]:
        """The pieces at the end of a message."""
        if self._state != "call":
            return []
        pieces: list[AnswerPiece] = [] if self._has_arguments else [CallGrown(self._count, "{}")]
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
    """The header of a message, without the end of the message before it."""
    for end in ENDS:
        header = header.rpartition(end)[2]
    return header


# Mistral's templates accept only ids of nine characters; others accept any.
_ID_CHARS = {"mistral": 9, "mistral11": 9}


class AnswerReader:
    """Reads one answer.

    Args:
        form: The format of the model's tool calls; None if it cannot call tools.
        tools: The callable tools, with the JSON schemas of their arguments; empty if none.
        is_parallel: Whether calls after the first are returned.
        has_reasoning: Whether the answer may begin with a block of reasoning.
        is_open: Whether the prompt has begun that block.
        has_channels: Whether the answer consists of messages in channels, with their marks.
        is_forced: Whether the answer consists only of calls. The beginning of a call that is cut
            off then does not count as text.

    Attributes:
        num_calls: The number of tool calls returned so far.
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
        is_forced: bool = False,
    ) -> None:
        self._is_forced = is_forced
        self._channels = Channels(tools) if has_channels else None
        self._reasoning = Reasoning(is_open) if has_reasoning else None
        has_calls = form is not None and tools and not has_channels
        self._calls = Calls(form, tools) if form is not None and has_calls else None
        self._id_chars = _ID_CHARS.get(form or "", 24)
        self._most = None if is_parallel else 1
        self.num_calls = 0

    def feed(self, text: str) -> list[AnswerPiece]:
        """Append text, and return the pieces that are now certain; every call has an id."""
        if self._channels is not None:
            return self._numbered(self._channels.feed(text))
        if self._reasoning is not None:
            return self._split(self._reasoning.feed(text))
        return self._split([Said(text)] if text else [])

    def finish(self) -> list[AnswerPiece]:
        """The last pieces, after the answer has ended."""
        if self._channels is not None:
            return self._numbered(self._channels.finish())
        pieces = [] if self._reasoning is None else self._split(self._reasoning.finish())
        if self._calls is not None:
            pieces += self._numbered(self._calls.finish())
        return pieces

    def _split(self, pieces: list[AnswerPiece]) -> list[AnswerPiece]:
        """The pieces, with calls instead of the text that contains them."""
        if self._calls is None:
            return pieces
        found: list[AnswerPiece] = []
        for piece in pieces:
            if isinstance(piece, Said):
                found += self._numbered(self._calls.feed(piece.text))
            else:
                found.append(piece)
        return found

    def _numbered(self, pieces: list[AnswerPiece]) -> list[AnswerPiece]:
        """The pieces, with ids for calls and without calls beyond the allowed number."""
        found: list[AnswerPiece] = []
        for piece in pieces:
            if isinstance(piece, Said) and self._is_forced:
                continue
            if isinstance(piece, Said | Thought) or self._most is None or piece.index < self._most:
                found.append(self._with_id(piece) if isinstance(piece, CallBegun) else piece)
        return found

    def _with_id(self, call: CallBegun) -> CallBegun:
        self.num_calls += 1
        return call if call.call_id else dataclasses.replace(call, call_id=self._new_id())

    def _new_id(self) -> str:
        digits = uuid.uuid4().hex
        return digits[:9] if self._id_chars == 9 else f"call_{digits[: self._id_chars]}"


def delta_of(piece: AnswerPiece) -> dict[str, Any]:
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
    """A whole answer as an assistant's message."""
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
