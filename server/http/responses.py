"""POST /v1/responses: one answer to a conversation. The server stores nothing of it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncGenerator
from typing import Any

from turret.server.errors import InvalidRequestError
from turret.server.http.answers import FINISH_REASONS, Ended, adapters_of, chat_logprobs, usage_of
from turret.server.http.asked import (
    RESPONSE_NAMES,
    Asks,
    asked_of,
    numbered,
    set_rendering,
    tools_of,
)
from turret.server.http.choices import Choices, make_readers
from turret.server.http.endpoint import Exchange
from turret.server.http.items import Event, Items
from turret.server.http.refusals import refusal_of
from turret.server.http.reply import Reply
from turret.server.http.schemas.requests import Item, ResponseRequest, TextFormat
from turret.server.http.tools.reader import AnswerReader
from turret.server.words import say
from turret.v1 import inference_pb2

LOGPROBS = "message.output_text.logprobs"


class Responses(Asks):
    """Answers conversations as OpenAI's Responses API does."""

    async def __call__(self, exchange: Exchange) -> None:
        _, body, mix = self._read(exchange, ResponseRequest)
        asked = asked_of(body, mix, exchange.names)
        message = asked.message
        if body.max_output_tokens is not None:
            message.stop.max_tokens = body.max_output_tokens
            exchange.names["stop.max_tokens"] = "max_output_tokens"
        message.options.logprobs = _wants_logprobs(body)
        message.options.top_n = body.top_logprobs or 0
        _set_text_format(body.text.format, message, exchange.names)
        prompt = inference_pb2.GenerateRequest(
            chat=_chat_of(body.input, body.instructions, exchange.names)
        )
        set_rendering(body, prompt.chat)
        use = tools_of(body.tools, body.tool_choice, body.parallel_tool_calls, prompt.chat)
        response = Response(exchange.call.request_id, body)
        del body
        make_reader = await make_readers(self._inference, exchange, asked, use, prompt.chat)
        choices = Choices(
            self._inference,
            exchange,
            asked.deadline,
            make_message=lambda index: numbered(asked, prompt, index),
            count=1,
            num_choices=1,
        )
        answer = _Answer(choices, response, exchange.call.request_id, make_reader())
        if asked.is_stream:
            await _Stream(exchange.reply, response).send(answer)
            return
        async with contextlib.aclosing(answer.events()) as events:
            async for _ in events:
                pass
        await exchange.reply.json(answer.whole)


def _wants_logprobs(body: ResponseRequest) -> bool:
    return LOGPROBS in body.include or bool(body.top_logprobs)


def _set_text_format(
    form: TextFormat | None, message: inference_pb2.GenerateRequest, names: dict[str, str]
) -> None:
    """Set the constraint in ``text.format``, which is ``response_format`` without a level."""
    if form is None or form.type == "text":
        return
    if message.WhichOneof("constraint") is not None:
        why = say("SEVERAL_CONSTRAINTS", names="text.format")
        raise InvalidRequestError.of("text.format.type", why)
    if form.type == "json_object":
        message.json_object = True
        names["json_object"] = "text.format"
    else:
        message.json_schema = json.dumps(form.schema_, ensure_ascii=False)
        names["json_schema"] = "text.format.schema"


def _text_format(form: TextFormat | None) -> dict[str, Any]:
    """As OpenAI's clients read it back: a schema has a name, and is strict or not."""
    if form is None:
        return {"type": "text"}
    blank = {"name": "answer", "strict": True} if form.type == "json_schema" else {}
    return {**blank, **form.model_dump(by_alias=True, exclude_none=True)}


def _chat_of(
    items: list[Item], instructions: str | None, names: dict[str, str]
) -> inference_pb2.Chat:
    """The turns of a conversation; adds to ``names`` which item made each.

    A call of a function is part of the assistant's turn before it, if there is one, as an answer
    that says something and then calls is one turn.
    """
    chat = inference_pb2.Chat()
    turns = chat.messages

    def add(path: str, role: str, content: str = "", call_id: str = "") -> None:
        names[f"chat.messages[{len(turns)}]"] = path
        turns.add(role=role, content=content, tool_call_id=call_id)

    if instructions is not None:
        add("instructions", "system", instructions)
    for index, item in enumerate(items):
        path = f"input[{index}]"
        if item.type == "message":
            role = "system" if item.role == "developer" else item.role or ""
            add(path, role, item.content or "")
        elif item.type == "function_call_output":
            add(path, "tool", item.output or "", item.call_id)
        elif item.type == "function_call":
            if not turns or turns[-1].role != "assistant":
                add(path, "assistant")
            calls = turns[-1].tool_calls
            names[f"chat.messages[{len(turns) - 1}].tool_calls[{len(calls)}]"] = path
            calls.add(id=item.call_id, name=item.name, arguments=item.arguments)
        # Reasoning of earlier turns is left out: the model does not see it again.
    return chat


class Response:
    """The object that answers, in each of its states.

    Args:
        request_id: Of the call; the answer's id is made of it.
        body: What was asked for, parts of which the answer repeats.
    """

    def __init__(self, request_id: str, body: ResponseRequest) -> None:
        self._id = f"resp_{request_id}"
        self._created = int(time.time())
        self._has_logprobs = _wants_logprobs(body)
        self._repeated = {
            "reasoning": {"effort": body.effort, "summary": None},
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": body.model,
            "text": {"format": _text_format(body.text.format)},
            "metadata": body.metadata,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "presence_penalty": body.presence_penalty or 0.0,
            "frequency_penalty": body.frequency_penalty or 0.0,
            "top_logprobs": body.top_logprobs or 0,
            "tools": [
                {"type": "function", "name": tool.name, "description": tool.description or None}
                | {"parameters": tool.parameters, "strict": bool(tool.strict)}
                for tool in body.tools
            ],
            "tool_choice": body.tool_choice,
            "parallel_tool_calls": body.parallel_tool_calls,
            "user": body.user,
            "safety_identifier": body.safety_identifier,
            "prompt_cache_key": body.prompt_cache_key,
        }

    def begun(self) -> dict[str, Any]:
        """The answer before its first token."""
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": None,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "max_tool_calls": None,
            "output": [],
            "previous_response_id": None,
            "service_tier": "default",
            "store": False,
            "truncation": "disabled",
            "usage": None,
            **self._repeated,
        }

    def ended(self, answer: Ended, items: Items) -> tuple[list[Event], dict[str, Any]]:
        """The last events of the items, and the answer as a whole.

        One that was cut at its limit is incomplete, as is the item that was cut.
        """
        is_cut = answer.finish_reason == inference_pb2.GenerateResponse.LENGTH
        status = "incomplete" if is_cut else "completed"
        events = items.finish(status)
        used = usage_of([answer], 1)
        whole = self.begun() | {
            "status": status,
            "completed_at": int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": items.output,
            "usage": {
                "input_tokens": used["prompt_tokens"],
                "input_tokens_details": used["prompt_tokens_details"],
                "output_tokens": used["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": used["total_tokens"],
            },
            "adapters_used": adapters_of([answer]),
        }
        return events, whole

    def failed(self, message: str, status: int) -> dict[str, Any]:
        """The response after an error."""
        code = "rate_limit_exceeded" if status == 429 else "server_error"
        error = {"code": code, "message": message}
        return self.begun() | {"status": "failed", "error": error}

    def logprobs_of(self, answer: Ended) -> list[dict[str, Any]]:
        """The log probabilities of an answer or of a part of it, if the client asked for them."""
        if not self._has_logprobs:
            return []
        # In the Responses API ``bytes`` is always a list.
        found = chat_logprobs(answer.logprobs)["content"]
        for token in found:
            for one in (token, *token["top_logprobs"]):
                one["bytes"] = one["bytes"] or []
        return found


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
                refusal = refusal_of(error, RESPONSE_NAMES)
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
