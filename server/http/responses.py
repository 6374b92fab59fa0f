"""POST /v1/responses: one answer to a conversation. The server stores nothing of it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from turret.server.api.inference.inference import Inference
from turret.server.api.violations import Violations
from turret.server.http.bodies.answer_fields import FINISH_REASONS, Ended
from turret.server.http.bodies.fields import Fields
from turret.server.http.bodies.generation import numbered, read_asked
from turret.server.http.bodies.responses.answer import Response
from turret.server.http.bodies.responses.conversation import Conversation
from turret.server.http.bodies.responses.fields import NAMES, read_sent, refuse_unwritable
from turret.server.http.bodies.responses.items import Event, Items
from turret.server.http.bodies.slips import refuse_if_wrong
from turret.server.http.bodies.tool_fields import read_tools
from turret.server.http.bodies.unsupported import refuse_unsupported
from turret.server.http.choices import Choices
from turret.server.http.exchange.endpoint import Exchange
from turret.server.http.exchange.refusals import refusal_of
from turret.server.http.exchange.reply import Reply
from turret.server.http.readers import make_readers
from turret.server.http.tools.reader import AnswerReader
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
        exchange.call.about(asked.message.adapters)
        refuse_unsupported(fields, is_chat=True)
        sent = read_sent(fields, asked)
        conversation = Conversation(fields, sent.instructions)
        exchange.names.update({**asked.names, **sent.names, **conversation.names})
        prompt = inference_pb2.GenerateRequest(chat=conversation.chat)
        use = read_tools(fields, prompt.chat, is_flat=True)
        make_reader = await make_readers(self._inference, exchange, fields, asked, use)
        refuse_unwritable(fields, sent)
        refuse_if_wrong(fields, exchange.names, asked.message)
        del fields, conversation
        choices = Choices(
            self._inference,
            exchange,
            asked.deadline,
            make_message=lambda index: numbered(asked, prompt, index),
            count=1,
            num_choices=1,
        )
        response = Response(exchange.call.request_id, asked, sent)
        answer = _Answer(choices, response, exchange.call.request_id, make_reader())
        if asked.is_stream:
            await _Stream(exchange.reply, response).send(answer)
            return
        async with contextlib.aclosing(answer.events()) as events:
            async for _ in events:
                pass
        await exchange.reply.json(answer.whole)


class _Answer:
    """One answer, which is the same whether its events are sent or not.

    Attributes:
        whole: The object that answers, once there are no further events.
    """

    def __init__(
        self, choices: Choices, response: Response, request_id: str, reader: AnswerReader
    ) -> None:
        self._choices = choices
        self._response = response
        self._reader = reader
        self._items = Items(request_id)
        self.whole: dict[str, Any] = {}

    async def events(self) -> AsyncGenerator[list[Event], None]:
        """Lists of events as they arrive. The first may be empty, and then only begins the answer.

        Raises:
            TurretError: The answer broke off.
        """
        ended: Ended | None = None
        async with contextlib.aclosing(self._choices.chunks()) as chunks:
            async for _, chunk in chunks:
                pieces = self._reader.feed(chunk.text)
                if chunk.finish_reason in FINISH_REASONS:
                    ended = chunk
                    pieces += self._reader.finish()
                yield self._items.feed(pieces, self._response.logprobs_of(chunk))
        assert ended is not None, "the last chunk says how it ended"
        events, self.whole = self._response.ended(ended, self._items)
        yield events


class _Stream:
    """The events of one answer, each with its type and its number."""

    def __init__(self, reply: Reply, response: Response) -> None:
        self._reply = reply
        self._response = response
        self._num_sent = 0

    async def send(self, answer: _Answer) -> None:
        """Send all events; an answer that fails ends with ``response.failed`` and an error."""
        try:
            async with contextlib.aclosing(answer.events()) as events:
                async for some in events:
                    if not self._num_sent:
                        for kind in ("response.created", "response.in_progress"):
                            await self._event(kind, {"response": self._response.begun()})
                    for kind, fields in some:
                        await self._event(kind, fields)
        except Exception as error:
            # Before the first event, the error is sent as an HTTP status instead.
            if self._num_sent:
                refusal = refusal_of(error, NAMES)
                message = refusal.body["error"]["message"]
                failed = self._response.failed(message, refusal.status)
                await self._event("response.failed", {"response": failed})
            raise
        await self._event(f"response.{answer.whole['status']}", {"response": answer.whole})
        await self._reply.end_events()

    async def _event(self, kind: str, fields: dict[str, Any]) -> None:
        event = {"type": kind, "sequence_number": self._num_sent, **fields}
        self._num_sent += 1
        await self._reply.event(event, kind)
