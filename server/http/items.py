"""Answers made of items: text, reasoning and tool calls, each with events as it grows."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from turret.server.http.answers import FINISH_REASONS, Ended
from turret.server.http.asked import Asked, ToolUse
from turret.server.http.choices import Choices, make_readers
from turret.server.http.endpoint import Exchange
from turret.server.http.refusals import Refusal, refusal_of
from turret.server.http.tools.calls import AnswerPiece, CallBegun, Said, Thought
from turret.v1 import inference_pb2

Logprobs = list[dict[str, Any]]
# The event's type, and its other fields.
Event = tuple[str, dict[str, Any]]
Kind = type[Said] | type[Thought] | type[CallBegun]


@dataclass(slots=True)
class Item:
    """One entry of an answer; ``call`` is None unless its kind is a call."""

    index: int
    kind: Kind
    call: CallBegun | None = None
    text: str = ""
    logprobs: Logprobs = field(default_factory=list)


class Dialect(ABC):
    """How an API writes an answer that is made of items.

    Attributes:
        is_never_empty: Whether an empty answer has an empty message.
        has_done: Whether a stream ends with ``[DONE]``.
        whole: The complete answer, once there are no further events.
    """

    is_never_empty: ClassVar[bool]
    has_done: ClassVar[bool]
    whole: dict[str, Any]

    @abstractmethod
    def start(self) -> list[Event]:
        """The events before the first item."""

    @abstractmethod
    def begin(self, item: Item) -> list[Event]:
        """The events before an item's content."""

    @abstractmethod
    def grow(self, item: Item, text: str, logprobs: Logprobs) -> Event:
        """The events for more of an item's content."""

    @abstractmethod
    def end(self, item: Item, is_cut: bool) -> list[Event]:
        """The events after an item's content, which a limit may have cut."""

    @abstractmethod
    def finish(self, answer: Ended, is_cut: bool) -> list[Event]:
        """The events after the last item; sets ``whole``."""

    @abstractmethod
    def fail(self, refusal: Refusal) -> list[Event]:
        """The events before the error that ends a stream."""

    def event(self, kind: str, fields: dict[str, Any]) -> dict[str, Any]:
        """An event in its final form."""
        return {"type": kind, **fields}

    def logprobs_of(self, answer: Ended) -> Logprobs:
        """The log probabilities to report for a part of an answer."""
        return []


class _Items:
    """Groups an answer's pieces into items: an item is a call, or a run of other pieces."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._open: Item | None = None
        self._pending: Logprobs = []
        self._count = 0

    def feed(self, pieces: Iterable[AnswerPiece], logprobs: Logprobs) -> list[Event]:
        """The events for more pieces of the answer.

        Args:
            pieces: New pieces of the answer.
            logprobs: The log probabilities of the pieces' tokens. Only those of text are
                reported, not those of calls and reasoning.
        """
        self._pending += logprobs
        events: list[Event] = []
        for piece in pieces:
            is_open = self._open is not None
            if not isinstance(piece, Said):
                self._pending = []
            elif is_open and not self._is_in(Said):
                # Keep only the new item's logprobs: drop those of the marks that closed the
                # previous item.
                self._pending = _last(self._pending, len(piece.text))
            if isinstance(piece, CallBegun):
                events += self._begin(CallBegun, piece)
                continue
            if isinstance(piece, Said | Thought) and not self._is_in(type(piece)):
                events += self._begin(type(piece))
            events.append(self._grow(piece.text))
        return events

    def finish(self, is_cut: bool) -> list[Event]:
        """The events at the end of the answer; its last item may have been cut."""
        events: list[Event] = []
        if self._open is None and self._dialect.is_never_empty:
            events += self._begin(Said)
        if self._pending and self._is_in(Said):
            events.append(self._grow(""))
        return events + self._end(is_cut)

    def _is_in(self, kind: Kind) -> bool:
        return self._open is not None and self._open.kind is kind

    def _begin(self, kind: Kind, call: CallBegun | None = None) -> list[Event]:
        events = self._end(is_cut=False)
        self._open = Item(self._count, kind, call)
        self._count += 1
        return events + self._dialect.begin(self._open)

    def _grow(self, text: str) -> Event:
        assert self._open is not None
        logprobs, self._pending = self._pending, []
        self._open.text += text
        self._open.logprobs += logprobs
        return self._dialect.grow(self._open, text, logprobs)

    def _end(self, is_cut: bool) -> list[Event]:
        ended, self._open = self._open, None
        return [] if ended is None else self._dialect.end(ended, is_cut)


def _last(logprobs: Logprobs, num_chars: int) -> Logprobs:
    """The log probabilities of the tokens that form the last characters."""
    for index in reversed(range(len(logprobs))):
        num_chars -= len(logprobs[index]["token"])
        if num_chars <= 0:
            return logprobs[index:]
    return logprobs


async def answer_in_items(
    exchange: Exchange,
    asked: Asked,
    prompt: inference_pb2.GenerateRequest,
    use: ToolUse,
    dialect: Dialect,
) -> None:
    """Send the only answer to a conversation, as events or as a whole.

    Raises:
        InvalidRequestError: See ``make_readers``.
        TurretError: The answer broke off.
    """
    reader = (await make_readers(exchange, asked, use, prompt.chat))()
    choices = Choices(exchange, asked, [prompt])
    reply, items, is_stream = exchange.reply, _Items(dialect), asked.is_stream
    reply.is_stream, is_started = is_stream, False

    async def send(events: list[Event]) -> None:
        for kind, fields in events if is_stream else ():
            await reply.event(dialect.event(kind, fields), kind)

    ended: Ended | None = None
    try:
        # The items keep the whole answer, even for a stream.
        async with contextlib.aclosing(choices.chunks(is_whole=True)) as chunks:
            async for _, chunk in chunks:
                if not is_started:
                    is_started = True
                    await send(dialect.start())
                pieces = reader.feed(chunk.text)
                if chunk.finish_reason in FINISH_REASONS:
                    ended = chunk
                    pieces += reader.finish()
                await send(items.feed(pieces, dialect.logprobs_of(chunk)))
    except Exception as error:
        # Before the first event, the error becomes an HTTP status instead.
        if is_started:
            await send(dialect.fail(refusal_of(error, exchange.names)))
        raise
    assert ended is not None, "the last chunk says how it ended"
    is_cut = ended.finish_reason == inference_pb2.GenerateResponse.LENGTH
    await send([*items.finish(is_cut), *dialect.finish(ended, is_cut)])
    if is_stream:
        await reply.end_events(has_done=dialect.has_done)
    else:
        await reply.json(dialect.whole)
