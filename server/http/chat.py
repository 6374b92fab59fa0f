"""POST /v1/chat/completions."""

from __future__ import annotations

import contextlib
from typing import Any

from turret.server.api.inference import Inference
from turret.server.api.violations import Violations
from turret.server.http.answer_fields import (
    FINISH_REASONS,
    Ended,
    adapters_of,
    chat_logprobs,
    head,
    stop_reason,
    usage_of,
)
from turret.server.http.choices import Choices
from turret.server.http.exchange.endpoint import Exchange
from turret.server.http.fields import Fields, why_no_text
from turret.server.http.generation import Asked, numbered, read_asked
from turret.server.http.unsupported import refuse_unsupported
from turret.v1 import inference_pb2

# OpenAI's newer word for what templates call the system's turn.
_ROLES = {"developer": "system"}
_NO_ROLES = ("tool", "function")


class ChatCompletions:
    """Answers conversations.

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
        _read_logprobs(fields, asked.message.options)
        prompt = inference_pb2.GenerateRequest(chat=read_messages(fields))
        exchange.names.update(asked.names)
        violations.raise_if_any()
        del fields
        # Each answer counts its share of what was sent.
        exchange.call.message_bytes //= asked.num_choices
        choices = Choices(
            self._inference,
            exchange,
            asked.deadline,
            make_message=lambda index: numbered(asked, prompt, index),
            count=asked.num_choices,
            num_choices=asked.num_choices,
        )
        answer_id = f"chatcmpl-{exchange.call.request_id}"
        if asked.is_stream:
            first = head(answer_id, "chat.completion.chunk", asked.model, info)
            await _send_events(exchange, asked, choices, first)
            return
        answers = await choices.whole()
        body = head(answer_id, "chat.completion", asked.model, info)
        body["choices"] = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": _logprobs(asked, answer),
                "finish_reason": FINISH_REASONS[answer.finish_reason],
                "stop_reason": stop_reason(answer),
            }
            for index, answer in enumerate(answers)
        ]
        body["usage"] = usage_of(answers, asked.num_choices)
        body["adapters_used"] = adapters_of(answers)
        await exchange.reply.json(body)


async def _send_events(
    exchange: Exchange, asked: Asked, choices: Choices, first: dict[str, Any]
) -> None:
    nothing = {"usage": None} if asked.includes_usage else {}
    ended: dict[int, Ended] = {}
    begun: set[int] = set()

    async def send(index: int, delta: dict[str, Any], logprobs: Any, **end: Any) -> None:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
        await exchange.reply.event({**first, "choices": [choice | end], **nothing})

    async with contextlib.aclosing(choices.chunks()) as chunks:
        async for index, chunk in chunks:
            if index not in begun:
                begun.add(index)
                await send(index, {"role": "assistant", "content": ""}, None)
            if chunk.text or chunk.logprobs:
                await send(index, {"content": chunk.text}, _logprobs(asked, chunk))
            if chunk.finish_reason in FINISH_REASONS:
                ended[index] = chunk
                reason = FINISH_REASONS[chunk.finish_reason]
                await send(index, {}, None, finish_reason=reason, stop_reason=stop_reason(chunk))
    if asked.includes_usage:
        answers = [ended[index] for index in sorted(ended)]
        end = {"usage": usage_of(answers, asked.num_choices), "adapters_used": adapters_of(answers)}
        await exchange.reply.event({**first, "choices": [], **end})
    await exchange.reply.end_events()


def _logprobs(asked: Asked, answer: Ended) -> dict[str, Any] | None:
    return chat_logprobs(answer.logprobs) if asked.message.options.logprobs else None


def _read_logprobs(fields: Fields, options: inference_pb2.ResponseOptions) -> None:
    options.logprobs = fields.flag("logprobs")
    top = fields.integer("top_logprobs")
    if top and not options.logprobs:
        fields.refuse("top_logprobs", "needs logprobs")
    options.top_n = top or 0


def read_messages(fields: Fields) -> inference_pb2.Chat:
    """The conversation; what is wrong with it is noted."""
    chat = inference_pb2.Chat()
    turns = fields.array("messages")
    if turns is None and fields.get("messages") is None:
        fields.refuse("messages", "must be set")
    for index, turn in enumerate(turns or []):
        path = f"messages[{index}]"
        if not isinstance(turn, dict):
            fields.refuse(path, "must be an object with role and content")
            continue
        entry = Fields(turn, fields.violations, f"{path}.")
        role = entry.text("role")
        if entry.get("role") is None:
            entry.refuse("role", "must be set")
        if role in _NO_ROLES or entry.get("tool_calls") or entry.get("function_call"):
            entry.refuse("role", "tools are not supported")
        chat.messages.add(role=_ROLES.get(role or "", role or ""), content=_content(entry))
    return chat


def _content(entry: Fields) -> str:
    """A turn's text: a string, or parts of type ``text``."""
    content = entry.get("content")
    if content is None:
        return ""
    if not isinstance(content, list):
        return entry.text("content") or ""
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            entry.refuse(f"content[{index}]", "must be of type text: the model reads nothing else")
            return ""
        why = why_no_text(part.get("text"))
        if why is not None:
            entry.refuse(f"content[{index}].text", why)
            return ""
        texts.append(part["text"])
    return "".join(texts)
