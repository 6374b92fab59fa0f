"""POST /v1/chat/completions and /v1/completions: answers in the form of OpenAI's older APIs."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

from turret.server.api.inference import converted, together
from turret.server.api.limits import MAX_INPUTS
from turret.server.errors import InvalidRequestError
from turret.server.http.answers import (
    FINISH_REASONS,
    CompletionLogprobs,
    Ended,
    adapters_of,
    chat_logprobs,
    head,
    stop_reason,
    usage_of,
)
from turret.server.http.asked import Asked, asked_of, chat_of, read_request, tools_in, with_input
from turret.server.http.choices import Choices, Chunk, blamed_on, make_readers
from turret.server.http.endpoint import HOLE, Exchange, Template, event_bytes
from turret.server.http.request_models import DEFAULT_MAX_TOKENS, ChatRequest, CompletionRequest
from turret.server.http.tool_calls import AnswerReader, Said, delta_of, message_of
from turret.server.words import say
from turret.v1 import inference_pb2


class EventStream(ABC):
    """Sends answers as events of OpenAI's older APIs, with one choice per event.

    Args:
        exchange: The request that is answered.
        asked: The request without its prompts.
        first: The first fields of every event.
    """

    # The part of a choice that grows, with ``HOLE`` in place of its text.
    growing: ClassVar[Any]

    def __init__(self, exchange: Exchange, asked: Asked, first: dict[str, Any]) -> None:
        self._reply = exchange.reply
        self._asked = asked
        self._first = first
        self._nothing = {"usage": None} if asked.includes_usage else {}
        self._templates: dict[int, Template] = {}

    async def send(self, choices: Choices) -> None:
        """Send all events."""
        ended: dict[int, Ended] = {}
        self._reply.is_stream = True
        async with contextlib.aclosing(choices.chunks()) as chunks:
            async for index, chunk in chunks:
                is_last = chunk.finish_reason in FINISH_REASONS
                if self._asked.message.options.running_usage:
                    self._nothing = {"usage": usage_of([chunk], 1)}
                    self._templates.clear()
                await self._chunk(index, chunk, is_last)
                if is_last:
                    ended[index] = chunk
        if self._asked.includes_usage:
            answers = [ended[index] for index in sorted(ended)]
            used = usage_of(answers, self._asked.num_choices)
            end = {"usage": used, "adapters_used": adapters_of(answers)}
            await self._reply.event({**self._first, "choices": [], **end})
        await self._reply.end_events()

    @abstractmethod
    async def _chunk(self, index: int, chunk: Chunk, is_last: bool) -> None:
        """Send the events for a part of an answer."""

    @abstractmethod
    def _value(self, index: int, grown: Any, **more: Any) -> dict[str, Any]:
        """The object of an event, in which ``grown`` is the new part of the answer."""

    async def _text(self, index: int, text: str) -> None:
        """Send an event that only adds text; the bytes around the text are rendered once."""
        if index not in self._templates:
            self._templates[index] = Template(self._value(index, self.growing))
        await self._reply.send_event(self._templates[index].event(text))


# Maximum number of a request's answers, over all its prompts.
MAX_ANSWERS = MAX_INPUTS

_Prompt = inference_pb2.GenerateRequest


async def complete(exchange: Exchange) -> None:
    """Continue prompts."""
    info, body, mix = read_request(exchange, CompletionRequest)
    asked = asked_of(body, mix, exchange.names)
    options, stop = asked.message.options, asked.message.stop
    options.echo, options.logprobs = body.echo, body.logprobs is not None
    options.top_n = body.logprobs or 0
    if not stop.HasField("max_tokens"):
        stop.max_tokens = DEFAULT_MAX_TOKENS
    places = [f"prompt{place}" for place in body.prompt]
    prompts = [with_input(_Prompt(), each) for each in body.prompt.values()]
    del body
    is_scored = stop.max_tokens == 0
    if is_scored and asked.is_stream:
        raise InvalidRequestError.of("stream", say("NEEDS_FIELD", other="max_tokens"))
    count = len(prompts) * asked.num_choices
    if count > MAX_ANSWERS:
        raise InvalidRequestError.of("n", say("TOO_MANY_ANSWERS", most=MAX_ANSWERS, found=count))
    answer_id = f"cmpl-{exchange.call.request_id}"
    whole = head(answer_id, "text_completion", asked.model, info)
    if is_scored:
        answers = await _score(exchange, asked, prompts, places)
    else:
        choices = Choices(exchange, asked, prompts, places)
        if asked.is_stream:
            await _CompletionEvents(exchange, asked, whole).send(choices)
            return
        answers = await choices.whole()
    size = count + sum(len(answer.logprobs) for answer in answers) * (1 + options.top_n)
    await exchange.reply.made_json(lambda: whole | _whole(asked, answers), size)


async def _score(
    exchange: Exchange,
    asked: Asked,
    prompts: Sequence[_Prompt],
    places: Sequence[str],
) -> list[inference_pb2.GenerateResponse]:
    """Answers for ``max_tokens`` 0, which contain at most the prompt and its logprobs."""
    scored = await together(
        [
            _score_one(exchange, asked, prompt, place)
            for prompt, place in zip(prompts, places, strict=True)
        ],
        exchange.call.party.most_at_once,
    )
    return [answer for answer in scored for _ in range(asked.num_choices)]


async def _score_one(
    exchange: Exchange, asked: Asked, prompt: _Prompt, place: str
) -> inference_pb2.GenerateResponse:
    options, inference = asked.message.options, exchange.services.inference
    question = inference_pb2.ScoreRequest(
        adapters=asked.message.adapters,
        top_n=options.top_n,
        cache_salt=asked.message.cache_salt,
    )
    # The input has the same field numbers in both messages, so its bytes can be merged.
    question.MergeFromString(prompt.SerializeToString())
    with exchange.call.party.hold(), blamed_on(place):
        scored = await inference.score(question, exchange.call)
    answer = inference_pb2.GenerateResponse(
        finish_reason=inference_pb2.GenerateResponse.LENGTH,
        usage=scored.usage,
        adapters_used=scored.adapters_used,
    )
    if options.echo:
        ids = [token.token_id for token in scored.tokens]
        read = inference_pb2.TokenizeRequest(
            token_ids=inference_pb2.TokenIds(ids=ids), adapters=asked.message.adapters
        )
        answer.text = (await inference.tokenize(read, exchange.call)).text
        answer.logprobs.extend(scored.tokens)
    return answer


def _whole(asked: Asked, answers: Sequence[inference_pb2.GenerateResponse]) -> dict[str, Any]:
    return {
        "choices": (
            _text_choice(asked, index, answer, CompletionLogprobs())
            for index, answer in enumerate(answers)
        ),
        "usage": usage_of(answers, asked.num_choices),
        "adapters_used": adapters_of(answers),
    }


def _text_choice(
    asked: Asked, index: int, answer: Ended, offsets: CompletionLogprobs
) -> dict[str, Any]:
    logprobs = None
    if asked.message.options.logprobs:
        logprobs = offsets.render(answer.logprobs, names_ids=asked.names_ids)
    return {
        "index": index,
        "text": answer.text,
        "logprobs": logprobs,
        "finish_reason": FINISH_REASONS.get(answer.finish_reason),
        "stop_reason": stop_reason(answer),
    }


class _CompletionEvents(EventStream):
    growing: ClassVar = Chunk(text=HOLE)

    def __init__(self, exchange: Exchange, asked: Asked, first: dict[str, Any]) -> None:
        super().__init__(exchange, asked, first)
        self._tenant = exchange.call.tenant
        self._offsets: defaultdict[int, CompletionLogprobs] = defaultdict(CompletionLogprobs)

    async def _chunk(self, index: int, chunk: Chunk, is_last: bool) -> None:
        options = self._asked.message.options
        if options.logprobs or is_last:
            if is_last or chunk.text or chunk.logprobs:
                size = len(chunk.logprobs) * (1 + options.top_n)
                event = await converted(
                    self._tenant, size, lambda: event_bytes(self._value(index, chunk))
                )
                await self._reply.send_event(event)
        elif chunk.text:
            await self._text(index, chunk.text)

    def _value(self, index: int, grown: Any, **more: Any) -> dict[str, Any]:
        choice = _text_choice(self._asked, index, grown, self._offsets[index])
        return {**self._first, "choices": [choice], **self._nothing}


async def answer_chat(exchange: Exchange) -> None:
    """Answer a conversation."""
    info, body, mix = read_request(exchange, ChatRequest)
    asked = asked_of(body, mix, exchange.names)
    options = asked.message.options
    options.logprobs, options.top_n = body.logprobs, body.top_logprobs or 0
    prompt = inference_pb2.GenerateRequest(chat=chat_of(body.messages, body))
    use = tools_in(body, prompt.chat)
    del body
    make_reader = await make_readers(exchange, asked, use, prompt.chat)
    choices = Choices(exchange, asked, [prompt])
    answer_id = f"chatcmpl-{exchange.call.request_id}"
    if asked.is_stream:
        first = head(answer_id, "chat.completion.chunk", asked.model, info)
        await _ChatEvents(exchange, asked, first, make_reader).send(choices)
        return
    answers = await choices.whole()
    whole = head(answer_id, "chat.completion", asked.model, info)
    whole["usage"] = usage_of(answers, asked.num_choices)
    whole["adapters_used"] = adapters_of(answers)
    size = sum(len(answer.logprobs) for answer in answers) * (1 + options.top_n)
    await exchange.reply.made_json(
        lambda: whole | {"choices": _choices(asked, answers, make_reader)}, size
    )


class _ChatEvents(EventStream):
    growing: ClassVar = {"content": HOLE}

    def __init__(
        self,
        exchange: Exchange,
        asked: Asked,
        first: dict[str, Any],
        make_reader: Callable[[], AnswerReader],
    ) -> None:
        super().__init__(exchange, asked, first)
        self._make_reader = make_reader
        self._readers: dict[int, AnswerReader] = {}

    async def _chunk(self, index: int, chunk: Chunk, is_last: bool) -> None:
        if index not in self._readers:
            self._readers[index] = self._make_reader()
            await self._event(index, {"role": "assistant", "content": ""})
        reader = self._readers[index]
        pieces = reader.feed(chunk.text) + (reader.finish() if is_last else [])
        # Send the logprobs of tokens at once, even if their text is held back or becomes a call.
        logprobs = _logprobs(self._asked, chunk) if chunk.logprobs else None
        for piece in pieces or ([Said("")] if logprobs else []):
            if logprobs is None and isinstance(piece, Said):
                await self._text(index, piece.text)
            else:
                await self._event(index, delta_of(piece), logprobs=logprobs)
                logprobs = None
        if is_last:
            reason = _finish_reason(chunk, reader)
            await self._event(index, {}, finish_reason=reason, stop_reason=stop_reason(chunk))

    async def _event(self, index: int, delta: dict[str, Any], **more: Any) -> None:
        await self._reply.event(self._value(index, delta, **more))

    def _value(self, index: int, grown: Any, **more: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": grown, "logprobs": None, "finish_reason": None}
        return {**self._first, "choices": [choice | more], **self._nothing}


def _choices(
    asked: Asked,
    answers: Iterable[inference_pb2.GenerateResponse],
    make_reader: Callable[[], AnswerReader],
) -> Iterator[dict[str, Any]]:
    for index, answer in enumerate(answers):
        reader = make_reader()
        yield {
            "index": index,
            "message": message_of(reader, answer.text),
            "logprobs": _logprobs(asked, answer),
            "finish_reason": _finish_reason(answer, reader),
            "stop_reason": stop_reason(answer),
        }


def _finish_reason(answer: Ended, reader: AnswerReader) -> str:
    reason = FINISH_REASONS[answer.finish_reason]
    return "tool_calls" if reason == "stop" and reader.num_calls else reason


def _logprobs(asked: Asked, answer: Ended) -> dict[str, Any] | None:
    if not asked.message.options.logprobs:
        return None
    return chat_logprobs(answer.logprobs, names_ids=asked.names_ids)
