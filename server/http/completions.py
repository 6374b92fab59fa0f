"""POST /v1/completions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, ClassVar

from turret.server.api.inference_answers import converted, together
from turret.server.api.limits import MAX_INPUTS
from turret.server.errors import InvalidRequestError
from turret.server.http.answers import (
    FINISH_REASONS,
    CompletionLogprobs,
    Ended,
    adapters_of,
    head,
    stop_reason,
    usage_of,
)
from turret.server.http.asked import Asked, asked_of, read_request
from turret.server.http.choices import Choices, Chunk, EventStream, blamed_on
from turret.server.http.endpoint import Exchange
from turret.server.http.reply import HOLE, event_bytes
from turret.server.http.schemas.requests import DEFAULT_MAX_TOKENS, CompletionRequest
from turret.server.words import say
from turret.v1 import inference_pb2

# Limit of a request's answers, over all its prompts. Each costs a task on the event loop.
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
    prompts = [
        _Prompt(prompt=each)
        if isinstance(each, str)
        else _Prompt(token_ids=inference_pb2.TokenIds(ids=each))
        for each in body.prompt.values()
    ]
    del body
    is_scored = stop.max_tokens == 0
    if is_scored and asked.is_stream:
        raise InvalidRequestError.of("stream", say("NEEDS_FIELD", other="max_tokens"))
    count = len(prompts) * asked.num_choices
    if count > MAX_ANSWERS:
        why = say("TOO_MANY_ANSWERS", most=MAX_ANSWERS, found=count)
        raise InvalidRequestError.of("n", why)
    answer_id = f"cmpl-{exchange.call.request_id}"
    whole = head(answer_id, "text_completion", asked.model, info)
    if is_scored:
        answers = await _score(exchange, asked, prompts, places)
    else:
        choices = Choices(exchange, asked, prompts, places)
        if asked.is_stream:
            await _Events(exchange, asked, whole).send(choices)
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
    """Answers for ``max_tokens`` 0, which have only the prompt and its logprobs."""
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
    # The input has the same field numbers in both messages.
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
            _choice(asked, index, answer, CompletionLogprobs())
            for index, answer in enumerate(answers)
        ),
        "usage": usage_of(answers, asked.num_choices),
        "adapters_used": adapters_of(answers),
    }


def _choice(asked: Asked, index: int, answer: Ended, offsets: CompletionLogprobs) -> dict[str, Any]:
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


class _Events(EventStream):
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
        choice = _choice(self._asked, index, grown, self._offsets[index])
        return {**self._first, "choices": [choice], **self._nothing}
