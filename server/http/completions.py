"""POST /v1/completions."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from turret.server.api.inference.answers import together
from turret.server.api.inference.inference import Inference
from turret.server.api.limits import MAX_INPUTS, MAX_TOP_LOGPROBS
from turret.server.api.violations import Violations
from turret.server.http.bodies.answer_fields import (
    FINISH_REASONS,
    CompletionLogprobs,
    Ended,
    adapters_of,
    head,
    stop_reason,
    usage_of,
)
from turret.server.http.bodies.fields import Fields
from turret.server.http.bodies.generation import Asked, numbered, read_asked
from turret.server.http.bodies.prompts import read_prompts
from turret.server.http.bodies.slips import refuse_if_wrong
from turret.server.http.bodies.unsupported import refuse_unsupported
from turret.server.http.choices import Choices, blamed_on
from turret.server.http.exchange.endpoint import Exchange
from turret.server.http.exchange.template import HOLE, Template
from turret.server.words import say
from turret.v1 import inference_pb2

# The default of OpenAI's API.
DEFAULT_MAX_TOKENS = 16
# Limit of a request's answers, over all its prompts. Each costs a task on the event loop.
MAX_ANSWERS = MAX_INPUTS

_Prompt = inference_pb2.GenerateRequest


class Completions:
    """Continues prompts.

    Args:
        inference: What answers.
    """

    def __init__(self, inference: Inference) -> None:
        self._inference = inference

    async def __call__(self, exchange: Exchange) -> None:
        info = self._inference.model()
        violations = Violations()
        fields = Fields(exchange.take_body(), violations)
        asked = read_asked(fields, info.name, least_tokens=0)
        exchange.call.about(asked.message.adapters)
        refuse_unsupported(fields, is_chat=False)
        _read_options(fields, asked.message)
        read = read_prompts(fields, "prompt", _Prompt)
        places, prompts = list(read), list(read.values())
        is_scored = asked.message.stop.max_tokens == 0
        if is_scored and asked.is_stream:
            fields.refuse("stream", "needs max_tokens of at least 1")
        count = len(prompts) * asked.num_choices
        if count > MAX_ANSWERS:
            fields.refuse("n", say("TOO_MANY_ANSWERS", most=MAX_ANSWERS, found=count))
        exchange.names.update(asked.names)
        refuse_if_wrong(fields, exchange.names, asked.message)
        del fields, read
        # Divide the size of the request among its answers.
        exchange.call.message_bytes //= count
        answer_id = f"cmpl-{exchange.call.request_id}"
        body = head(answer_id, "text_completion", asked.model, info)
        if is_scored:
            answers = await self._score(exchange, asked, prompts, places)
        else:
            choices = Choices(
                self._inference,
                exchange,
                asked.deadline,
                make_message=lambda index: numbered(
                    asked, prompts[index // asked.num_choices], index % asked.num_choices
                ),
                count=count,
                num_choices=asked.num_choices,
                places=places,
            )
            if asked.is_stream:
                await _send_events(exchange, asked, choices, body)
                return
            answers = await choices.whole()
        body["choices"] = [_choice(asked, index, answer) for index, answer in enumerate(answers)]
        body["usage"] = usage_of(answers, asked.num_choices)
        body["adapters_used"] = adapters_of(answers)
        await exchange.reply.json(body)

    async def _score(
        self,
        exchange: Exchange,
        asked: Asked,
        prompts: Sequence[_Prompt],
        places: Sequence[str],
    ) -> list[inference_pb2.GenerateResponse]:
        """Answers without tokens, for ``max_tokens`` 0: only the prompt and its logprobs."""
        scored = await together(
            [
                self._score_one(exchange, asked, prompt, place)
                for prompt, place in zip(prompts, places, strict=True)
            ],
            exchange.party.most_at_once,
        )
        return [answer for answer in scored for _ in range(asked.num_choices)]

    async def _score_one(
        self, exchange: Exchange, asked: Asked, prompt: _Prompt, place: str
    ) -> inference_pb2.GenerateResponse:
        options = asked.message.options
        question = inference_pb2.ScoreRequest(adapters=asked.message.adapters, top_n=options.top_n)
        # The input has the same field numbers in both messages.
        question.MergeFromString(prompt.SerializeToString())
        with exchange.party.hold(), blamed_on(place):
            scored = await self._inference.score(question, exchange.call, asked.deadline)
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
            answer.text = (await self._inference.tokenize(read)).text
            answer.logprobs.extend(scored.tokens)
        return answer


def _choice(asked: Asked, index: int, answer: Ended) -> dict[str, Any]:
    logprobs = None
    if asked.message.options.logprobs:
        logprobs = CompletionLogprobs().render(answer.logprobs)
    return {
        "index": index,
        "text": answer.text,
        "logprobs": logprobs,
        "finish_reason": FINISH_REASONS[answer.finish_reason],
        "stop_reason": stop_reason(answer),
    }


async def _send_events(
    exchange: Exchange, asked: Asked, choices: Choices, first: dict[str, Any]
) -> None:
    nothing = {"usage": None} if asked.includes_usage else {}
    ended: dict[int, Ended] = {}
    offsets: defaultdict[int, CompletionLogprobs] = defaultdict(CompletionLogprobs)
    templates: dict[int, Template] = {}
    async with contextlib.aclosing(choices.chunks()) as chunks:
        async for index, chunk in chunks:
            is_last = chunk.finish_reason in FINISH_REASONS
            if is_last:
                ended[index] = chunk
            elif not (chunk.text or chunk.logprobs):
                continue
            elif not asked.message.options.logprobs:
                if index not in templates:
                    templates[index] = Template({**first, "choices": [_growing(index)], **nothing})
                await exchange.reply.send_event(templates[index].event(chunk.text))
                continue
            logprobs = None
            if asked.message.options.logprobs:
                logprobs = offsets[index].render(chunk.logprobs)
            choice = {
                "index": index,
                "text": chunk.text,
                "logprobs": logprobs,
                "finish_reason": FINISH_REASONS[chunk.finish_reason] if is_last else None,
                "stop_reason": stop_reason(chunk),
            }
            await exchange.reply.event({**first, "choices": [choice], **nothing})
    if asked.includes_usage:
        answers = [ended[index] for index in sorted(ended)]
        end = {"usage": usage_of(answers, asked.num_choices), "adapters_used": adapters_of(answers)}
        await exchange.reply.event({**first, "choices": [], **end})
    await exchange.reply.end_events()


def _growing(index: int) -> dict[str, Any]:
    """A choice whose text grows, and nothing else."""
    return {
        "index": index,
        "text": HOLE,
        "logprobs": None,
        "finish_reason": None,
        "stop_reason": None,
    }


def _read_options(fields: Fields, message: inference_pb2.GenerateRequest) -> None:
    options = message.options
    options.echo = fields.flag("echo")
    top = fields.integer("logprobs", 0, MAX_TOP_LOGPROBS)
    options.logprobs = top is not None
    options.top_n = top or 0
    if not message.stop.HasField("max_tokens"):
        message.stop.max_tokens = DEFAULT_MAX_TOKENS
