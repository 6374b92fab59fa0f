"""POST /v1/responses: one answer to a conversation, of which nothing is kept."""

from __future__ import annotations

import contextlib
from typing import Any

from turret.server.api.inference import Inference
from turret.server.api.violations import Violations
from turret.server.http.bodies.answer_fields import FINISH_REASONS, Ended
from turret.server.http.bodies.fields import Fields
from turret.server.http.bodies.generation import numbered, read_asked
from turret.server.http.bodies.response_fields import NAMES, Response, read_input, read_sent
from turret.server.http.bodies.unsupported import refuse_unsupported
from turret.server.http.choices import Choices
from turret.server.http.exchange.endpoint import Exchange
from turret.server.http.exchange.refusals import refusal_of
from turret.v1 import inference_pb2


class Responses:
    """Answers conversations as OpenAI's Responses API does.

    Args:
        inference: What answers.
    """

    def __init__(self, inference: Inference) -> None:
        self._inference = inference

    async def __call__(self, exchange: Exchange) -> None:
        info = self._inference.model()
        violations = Violations()
        fields = Fields(exchange.take_body(), violations)
        asked = read_asked(fields, info.name)
        refuse_unsupported(fields, is_chat=True)
        sent = read_sent(fields, asked)
        exchange.names.update({**asked.names, **sent.names})
        prompt = inference_pb2.GenerateRequest(chat=read_input(fields, sent.instructions))
        violations.raise_if_any()
        del fields
        choices = Choices(
            self._inference,
            exchange,
            asked.deadline,
            make_message=lambda index: numbered(asked, prompt, index),
            count=1,
            num_choices=1,
        )
        response = Response(exchange.call.request_id, asked, sent)
        if asked.is_stream:
            await _Stream(exchange, response).send(choices)
            return
        (answer,) = await choices.whole()
        logprobs = response.logprobs_of(answer)
        await exchange.reply.json(response.ended(answer, answer.text, logprobs))


class _Stream:
    """The events of one answer, each with its type and its number."""

    def __init__(self, exchange: Exchange, response: Response) -> None:
        self._reply = exchange.reply
        self._response = response
        self._num_sent = 0

    async def send(self, choices: Choices) -> None:
        """All of them; an answer that breaks off ends in ``response.failed`` and an error."""
        try:
            await self._send(choices)
        except Exception as error:
            # Before the first event it is a status.
            if self._num_sent:
                refusal = refusal_of(error, NAMES)
                message = refusal.body["error"]["message"]
                failed = self._response.failed(message, refusal.status)
                await self._event("response.failed", response=failed)
            raise

    async def _send(self, choices: Choices) -> None:
        texts: list[str] = []
        logprobs: list[dict[str, Any]] = []
        ended: Ended | None = None
        async with contextlib.aclosing(choices.chunks()) as chunks:
            async for _, chunk in chunks:
                if not self._num_sent:
                    await self._begin()
                if chunk.finish_reason in FINISH_REASONS:
                    ended = chunk
                found = self._response.logprobs_of(chunk)
                if chunk.text or found:
                    texts.append(chunk.text)
                    logprobs += found
                    await self._part("response.output_text.delta", delta=chunk.text, logprobs=found)
        assert ended is not None, "the last chunk says how it ended"
        await self._end(ended, "".join(texts), logprobs)

    async def _begin(self) -> None:
        response = self._response
        await self._event("response.created", response=response.begun())
        await self._event("response.in_progress", response=response.begun())
        item = response.item("in_progress", [])
        await self._event("response.output_item.added", output_index=0, item=item)
        await self._part("response.content_part.added", part=response.part("", []))

    async def _end(self, ended: Ended, text: str, logprobs: list[dict[str, Any]]) -> None:
        whole = self._response.ended(ended, text, logprobs)
        (item,) = whole["output"]
        await self._part("response.output_text.done", text=text, logprobs=logprobs)
        await self._part("response.content_part.done", part=item["content"][0])
        await self._event("response.output_item.done", output_index=0, item=item)
        await self._event(f"response.{whole['status']}", response=whole)
        await self._reply.end_events()

    async def _part(self, kind: str, **fields: Any) -> None:
        place = {"item_id": self._response.item_id, "output_index": 0, "content_index": 0}
        await self._event(kind, **place, **fields)

    async def _event(self, kind: str, **fields: Any) -> None:
        event = {"type": kind, "sequence_number": self._num_sent, **fields}
        self._num_sent += 1
        await self._reply.event(event, kind)
