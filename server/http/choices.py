"""Runs the answers to one request, parses their tool calls, and groups an answer into items."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from turret.server.api.inference import JoinedChunks, converted
from turret.server.api.limits import MAX_CONSTRAINT_CHARS
from turret.server.errors import InvalidRequestError, UnavailableError
from turret.server.http.answers import FINISH_REASONS, Ended
from turret.server.http.asked import Asked, ToolUse
from turret.server.http.endpoint import Exchange
from turret.server.http.refusals import Refusal, refusal_of, renamed_path
from turret.server.http.tool_calls import (
    AnswerPiece,
    AnswerReader,
    CallBegun,
    Said,
    Thought,
    UnenforceableError,
)
from turret.server.http.tool_grammar import CallsGrammar, constrained
from turret.server.words import say
from turret.v1 import inference_pb2

Chunk = inference_pb2.GenerateChunk
_Request = inference_pb2.GenerateRequest
# Maximum number of chunks, over all answers, that wait to be written.
_MAX_ARRIVED = 256


@contextlib.contextmanager
def blamed_on(place: str) -> Iterator[None]:
    """Report errors in a prompt with the prompt's place in the request."""
    try:
        yield
    except InvalidRequestError as error:
        names = {"input": place, "token_ids.ids": place}
        found = [(renamed_path(path, names), why) for path, why in error.violations]
        raise type(error).of_all(found) from None


class Choices:
    """The answers to some prompts, ``num_choices`` to each.

    The first answer to a prompt starts alone. The others start once it has its first token, and
    then find the prompt in the prefix cache.

    Args:
        exchange: The request that is answered.
        asked: The request without its prompts.
        prompts: The inputs, one per prompt.
        places: The path of each prompt in the request; empty if there is only one prompt.
    """

    def __init__(
        self,
        exchange: Exchange,
        asked: Asked,
        prompts: Sequence[_Request],
        places: Sequence[str] = (),
    ) -> None:
        self._exchange = exchange
        self._asked = asked
        self._prompts = prompts
        self._places = places
        self._num_choices = asked.num_choices
        self._count = len(prompts) * asked.num_choices
        # Each answer accounts for an equal share of the request's size.
        exchange.call.message_bytes //= self._count

    async def whole(self) -> list[inference_pb2.GenerateResponse]:
        """All answers, in the order of the prompts.

        Raises:
            TurretError: The error of the first answer that failed; the others are cancelled.
        """
        answers = [JoinedChunks() for _ in range(self._count)]
        async with contextlib.aclosing(self.chunks(is_whole=True)) as chunks:
            async for index, chunk in chunks:
                answers[index].add(chunk)
        return [answer.response() for answer in answers]

    def chunks(self, *, is_whole: bool = False) -> AsyncGenerator[tuple[int, Chunk], None]:
        """The chunks of all answers as they arrive, each with its answer's index.

        Close the generator if you leave it early; this cancels all answers.

        Args:
            is_whole: Whether the caller collects the answers.

        Raises:
            TurretError: The error of the first answer that failed; the others are cancelled.
        """
        return self._one(0, is_whole) if self._count == 1 else self._many(is_whole)

    def _message(self, index: int) -> _Request:
        """The request for an answer. With a seed, each answer to a prompt gets a different one.

        The message is created only when its answer starts: 128 messages with a long prompt would
        fill the memory.
        """
        prompt, choice = divmod(index, self._num_choices)
        message = _Request()
        message.CopyFrom(self._asked.message)
        message.MergeFrom(self._prompts[prompt])
        if choice and message.sampling.HasField("seed"):
            message.sampling.seed = (message.sampling.seed + choice) % (1 << 64)
        return message

    async def _one(self, index: int, is_whole: bool) -> AsyncGenerator[tuple[int, Chunk], None]:
        message = self._message(index)
        call = self._exchange.call
        answer = self._exchange.services.inference.generate(message, call, is_whole=is_whole)
        # Drop our reference so that the message is freed once it is converted.
        del message
        blamed = contextlib.nullcontext()
        if self._places:
            blamed = blamed_on(self._places[index // self._num_choices])
        with call.party.hold(), blamed:
            async with contextlib.aclosing(answer) as chunks:
                async for chunk in chunks:
                    if chunk.finish_reason == inference_pb2.GenerateResponse.CANCELLED:
                        # OpenAI's API has no finish reason for an incomplete answer, so report an
                        # error.
                        raise UnavailableError(say("REQUEST_ENDED"))
                    yield index, chunk

    async def _many(self, is_whole: bool) -> AsyncGenerator[tuple[int, Chunk], None]:
        # None marks the end of an answer.
        arrived: asyncio.Queue[tuple[int, Chunk | BaseException | None]]
        # Bound the queue: unread chunks must stay in the engine's streams, which count them.
        arrived = asyncio.Queue(_MAX_ARRIVED)
        begun = [asyncio.Event() for _ in range(0, self._count, self._num_choices)]

        async def run(index: int) -> None:
            prompt, choice = divmod(index, self._num_choices)
            try:
                if choice:
                    await begun[prompt].wait()
                async with contextlib.aclosing(self._one(index, is_whole)) as chunks:
                    async for pair in chunks:
                        await arrived.put(pair)
                        begun[prompt].set()
                await arrived.put((index, None))
            except Exception as error:
                await arrived.put((index, error))

        indices = iter(range(self._count))

        async def run_some() -> None:
            for index in indices:
                await run(index)

        # With one task per answer, cancelling them all when the client disconnects would block the
        # event loop for seconds. The workers take the answers in order, so a prompt's first answer
        # has started before others wait for it.
        num_workers = min(self._count, self._exchange.call.party.most_at_once)
        tasks = [asyncio.ensure_future(run_some()) for _ in range(num_workers)]
        try:
            num_open = self._count
            while num_open:
                index, item = await arrived.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    num_open -= 1
                else:
                    yield index, item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def make_readers(
    exchange: Exchange, asked: Asked, use: ToolUse, chat: inference_pb2.Chat
) -> Callable[[], AnswerReader]:
    """Constrain the answers to tool calls where required, and return a factory of readers.

    Raises:
        InvalidRequestError: The answer cannot be constrained to the tools, or to the tools and its
            own constraint.
    """
    message = asked.message
    inference, call = exchange.services.inference, exchange.call
    chat_format = await inference.chat_format(message.adapters, chat, call)
    form: str | None = chat_format.tools
    is_free = message.WhichOneof("constraint") is None
    message.options.call_marks = chat_format.has_channels
    if use.tools and form is not None:
        message.options.call_marks = True
        grammar = CallsGrammar(
            form,
            use.tools,
            is_parallel=use.is_parallel,
            marks=chat_format.marks,
            has_call_ids=chat_format.has_call_ids,
        )
        constrain = functools.partial(_constrain, message, grammar, use, exchange.names)
        try:
            # The schemas of the tools can be as long as a message.
            size = sum(len(tool.parameters) for tool in chat.tools)
            await converted(call.tenant, size, constrain)
        except UnenforceableError as error:
            place = f"{use.paths[error.tool]}{error.path}"
            raise InvalidRequestError.of(place, error.text) from None
        except RecursionError:
            # A schema sent as text may be nested as deeply as the parser allows, which is too deep
            # for recursive functions.
            raise InvalidRequestError.of("tools", say("SCHEMA_TOO_NESTED")) from None
    return lambda: AnswerReader(
        form,
        use.tools,
        is_parallel=use.is_parallel,
        has_reasoning=is_free and not use.must_call and chat_format.has_reasoning,
        is_open=bool(chat_format.opens_reasoning),
        has_channels=chat_format.has_channels,
        is_forced=use.must_call,
    )


def _constrain(
    message: _Request, grammar: CallsGrammar, use: ToolUse, names: dict[str, str]
) -> None:
    """Constrain the answer to calls, or to its own constraint if it has no calls.

    Raises:
        UnenforceableError: A grammar cannot enforce a tool's parameters.
        InvalidRequestError: The constraint cannot be combined with tools.
    """
    kind = message.WhichOneof("constraint")
    if not use.must_call and kind is None:
        return
    for rule, (tool, path) in grammar.places().items():
        names[f"grammar.{rule}"] = use.paths[tool] + path
    if use.must_call or kind is None:
        message.grammar = grammar.alone()
        names["grammar"] = "tools"
        return
    value = _value(message, kind)
    # Leave an unreadable constraint unchanged, because compiling it reports the error.
    if value is None:
        return
    name = names.get(kind) or names.get(f"{kind}.texts") or kind
    if grammar.is_object and kind in ("json_schema", "json_object"):
        # Combine the calls and the constraint in one schema. With two grammars that begin in the
        # same way, the one with longer tokens would win.
        schema = value if kind == "json_schema" else {"type": "object"}
        message.json_schema = json.dumps(grammar.schema_beside(schema), ensure_ascii=False)
        names["json_schema"] = names["json_schema.anyOf[0]"] = name
        for number, tool in enumerate(use.tools, 1):
            place = f"json_schema.anyOf[{number}].properties.parameters"
            names[place] = use.paths[tool]
        return
    answer = constrained(kind, value)
    if answer is None:
        raise InvalidRequestError.of(name, say("GBNF_BESIDE_TOOLS"))
    message.grammar = grammar.beside(answer)
    names["grammar"] = names["grammar.answer"] = name


def _value(message: _Request, kind: str) -> Any:
    """The value of a constraint; None if it is not valid, or too long to be read here."""
    parts = message.choice.texts if kind == "choice" else (getattr(message, kind),)
    if kind != "json_object" and sum(map(len, parts)) > MAX_CONSTRAINT_CHARS:
        return None
    if kind == "json_schema":
        try:
            schema = json.loads(message.json_schema)
        except (ValueError, RecursionError):
            return None
        return schema if isinstance(schema, dict) else None
    if kind == "choice":
        texts = list(message.choice.texts)
        return texts if all(texts) else None
    return getattr(message, kind) or None


Logprobs = list[dict[str, Any]]
# The type of an event, and its other fields.
Event = tuple[str, dict[str, Any]]
Kind = type[Said] | type[Thought] | type[CallBegun]


@dataclass(slots=True)
class Item:
    """One entry of an answer; ``call`` is None unless ``kind`` is ``CallBegun``."""

    index: int
    kind: Kind
    call: CallBegun | None = None
    text: str = ""
    logprobs: Logprobs = field(default_factory=list)


class Dialect(ABC):
    """How an API writes an answer that is made of items.

    Attributes:
        is_never_empty: Whether an answer without any item gets an empty message.
        has_done: Whether a stream ends with ``[DONE]``.
        whole: The whole answer; complete only after ``finish``.
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
        """The event for more of an item's content."""

    @abstractmethod
    def end(self, item: Item, is_cut: bool) -> list[Event]:
        """The events after an item's content, which a limit may have cut."""

    @abstractmethod
    def finish(self, answer: Ended, is_cut: bool) -> list[Event]:
        """The events after the last item; sets ``whole``."""

    def fail(self, refusal: Refusal) -> list[Event]:
        """The events before the error that ends a stream."""
        return []

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
        TurretError: The answer could not be completed.
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
        # ``is_whole`` is true even for a stream, because the items keep the whole answer.
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
