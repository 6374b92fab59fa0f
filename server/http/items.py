"""The output of a response as it grows: items, and the events about them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, Protocol

from turret.server.http.tools.calls import CallBegun, Piece, Said, Thought

Logprobs = list[dict[str, Any]]
# The event's type, and its fields beside the type and the number.
Event = tuple[str, dict[str, Any]]


class Item(Protocol):
    """One entry of the output; ``place`` identifies it in every event."""

    def begin(self) -> list[Event]:
        """The events before its content."""
        ...

    def grow(self, text: str, logprobs: Logprobs) -> Event:
        """More of its content."""
        ...

    def end(self, status: str) -> list[Event]:
        """The events after its content; the last has the whole item."""
        ...


class Items:
    """Makes items of an answer's pieces.

    What is said becomes a message, each call an item of its own, what is thought reasoning. An
    answer of nothing is an empty message.

    Args:
        request_id: Of the call; the items' ids are made of it.

    Attributes:
        output: The items that are complete.
    """

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._open: Item | None = None
        self._pending: Logprobs = []
        self.output: list[dict[str, Any]] = []

    def feed(self, pieces: Iterable[Piece], logprobs: Logprobs) -> list[Event]:
        """The events for more pieces of the answer.

        Args:
            pieces: Of the answer.
            logprobs: Of the tokens that came with them. They are told with what is said; those of
                calls and thoughts are not.
        """
        self._pending += logprobs
        events: list[Event] = []
        for piece in pieces:
            if isinstance(piece, Said):
                if self._open is not None and not isinstance(self._open, _Message):
                    # Drop the logprobs of the marks that closed the previous item.
                    self._pending = _last(self._pending, len(piece.text))
                events += self._in(_Message)
                events.append(self._grow(piece.text))
                continue
            self._pending = []
            if isinstance(piece, Thought):
                events += self._in(_Reasoning)
            elif isinstance(piece, CallBegun):
                events += self._end("completed")
                self._open = _Call(self._id("fc"), len(self.output), piece)
                events += self._open.begin()
                continue
            events.append(self._grow(piece.text))
        return events

    def finish(self, status: str) -> list[Event]:
        """The events at the end of the answer; its last item gets this status."""
        events: list[Event] = []
        if self._open is None:
            events += self._in(_Message)
        if self._pending and isinstance(self._open, _Message):
            events.append(self._grow(""))
        return events + self._end(status)

    def _id(self, kind: str) -> str:
        """The id of an item: that of the answer, from the second item on with a number."""
        number = len(self.output)
        return f"{kind}_{self._request_id}" + (f"_{number}" if number else "")

    def _in(self, kind: type[_Message] | type[_Reasoning]) -> list[Event]:
        if isinstance(self._open, kind):
            return []
        events = self._end("completed")
        self._open = kind(self._id(kind.prefix), len(self.output))
        return events + self._open.begin()

    def _grow(self, text: str) -> Event:
        assert self._open is not None
        logprobs, self._pending = self._pending, []
        return self._open.grow(text, logprobs)

    def _end(self, status: str) -> list[Event]:
        if self._open is None:
            return []
        events = self._open.end(status)
        self.output.append(events[-1][1]["item"])
        self._open = None
        return events


def _last(logprobs: Logprobs, num_chars: int) -> Logprobs:
    """The log probabilities of the tokens that make up the last characters."""
    for index in reversed(range(len(logprobs))):
        num_chars -= len(logprobs[index]["token"])
        if num_chars <= 0:
            return logprobs[index:]
    return logprobs


class _Texts(ABC):
    """An item whose content is one part with text."""

    prefix: ClassVar[str]
    # Prefix of the types of its text events.
    kind: ClassVar[str]

    def __init__(self, item_id: str, index: int) -> None:
        self._id = item_id
        self._index = index
        self._place = {"item_id": item_id, "output_index": index, "content_index": 0}
        self._texts: list[str] = []
        self._logprobs: Logprobs = []

    def begin(self) -> list[Event]:
        item = self._item("in_progress", [])
        added = "response.output_item.added", {"output_index": self._index, "item": item}
        part = {**self._place, "part": self._part("", [])}
        return [added, ("response.content_part.added", part)]

    def grow(self, text: str, logprobs: Logprobs) -> Event:
        self._texts.append(text)
        self._logprobs += logprobs
        return f"{self.kind}.delta", {**self._place, "delta": text, **self._scored(logprobs)}

    def end(self, status: str) -> list[Event]:
        text = "".join(self._texts)
        part = self._part(text, self._logprobs)
        item = self._item(status, [part])
        done = {**self._place, "text": text, **self._scored(self._logprobs)}
        return [
            (f"{self.kind}.done", done),
            ("response.content_part.done", {**self._place, "part": part}),
            ("response.output_item.done", {"output_index": self._index, "item": item}),
        ]

    @abstractmethod
    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]: ...

    @abstractmethod
    def _part(self, text: str, logprobs: Logprobs) -> dict[str, Any]: ...

    def _scored(self, logprobs: Logprobs) -> dict[str, Any]:
        return {}


class _Message(_Texts):
    prefix = "msg"
    kind = "response.output_text"

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": content,
        }

    def _part(self, text: str, logprobs: Logprobs) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _scored(self, logprobs: Logprobs) -> dict[str, Any]:
        return {"logprobs": logprobs}


class _Reasoning(_Texts):
    prefix = "rs"
    kind = "response.reasoning_text"

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "reasoning",
            "status": status,
            "summary": [],
            "content": content,
        }

    def _part(self, text: str, logprobs: Logprobs) -> dict[str, Any]:
        return {"type": "reasoning_text", "text": text}


class _Call:
    """An item that calls a function."""

    def __init__(self, item_id: str, index: int, begun: CallBegun) -> None:
        self._id = item_id
        self._index = index
        self._begun = begun
        self._place = {"item_id": item_id, "output_index": index}
        self._arguments: list[str] = []

    def begin(self) -> list[Event]:
        item = self._item("in_progress", "")
        return [("response.output_item.added", {"output_index": self._index, "item": item})]

    def grow(self, text: str, logprobs: Logprobs) -> Event:
        self._arguments.append(text)
        return "response.function_call_arguments.delta", {**self._place, "delta": text}

    def end(self, status: str) -> list[Event]:
        arguments = "".join(self._arguments)
        done = {**self._place, "name": self._begun.name, "arguments": arguments}
        item = self._item(status, arguments)
        return [
            ("response.function_call_arguments.done", done),
            ("response.output_item.done", {"output_index": self._index, "item": item}),
        ]

    def _item(self, status: str, arguments: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "function_call",
            "status": status,
            "call_id": self._begun.call_id,
            "name": self._begun.name,
            "arguments": arguments,
        }
