"""Requests and answers of /v1/responses, to and from turret.v1."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from turret.server.http.bodies.answer_fields import Ended, adapters_of, chat_logprobs, usage_of
from turret.server.http.bodies.constraints import read_text_format
from turret.server.http.bodies.fields import Fields, why_no_text
from turret.server.http.bodies.generation import NAMES as SHARED_NAMES
from turret.server.http.bodies.generation import Asked
from turret.v1 import inference_pb2

NAMES = {
    **SHARED_NAMES,
    "input": "input",
    "chat": "input",
    "chat.messages": "input",
    "stop.max_tokens": "max_output_tokens",
    "options.top_n": "top_logprobs",
}
LOGPROBS = "message.output_text.logprobs"
_ROLES = {"developer": "system", "system": "system", "user": "user", "assistant": "assistant"}
_TEXTS = ("input_text", "output_text", "text")
_STATELESS = "nothing is kept between requests: send the whole conversation as input"
_NO_TOOLS = "tools are not supported by this endpoint: use /v1/chat/completions"

# Field → values that ask for nothing (null does so everywhere), and what to say of others.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "store": ((False,), _STATELESS),
    "previous_response_id": ((), _STATELESS),
    "conversation": ((), _STATELESS),
    "background": ((False,), "an answer is made while its client waits"),
    "prompt": ((), "there are no stored prompts: send input"),
    "tools": (([],), _NO_TOOLS),
    "tool_choice": (("none", "auto"), _NO_TOOLS),
    "truncation": (("disabled",), "a conversation is not cut: send one that fits"),
    "context_management": (([],), "a conversation is not cut: send one that fits"),
    "moderation": ((), "is not supported"),
}


@dataclass(slots=True, kw_only=True)
class Sent:
    """What an answer repeats of its request, and which parts of the answer were asked for."""

    instructions: str | None
    metadata: dict[str, Any]
    max_output_tokens: int | None
    text_format: dict[str, Any]
    names: dict[str, str]
    has_logprobs: bool
    echoed: dict[str, Any]


def read_sent(fields: Fields, asked: Asked) -> Sent:
    """Read what only this endpoint has; ``asked`` takes in what it says of the answer."""
    for name, (neutral, why) in REFUSED.items():
        value = fields.get(name)
        # Compared with its type: 0 is no False.
        if value is not None and not any(type(value) is type(n) and value == n for n in neutral):
            fields.refuse(name, why)
    names = read_text_format(fields.inner("text").inner("format"), asked.message)
    reasoning = fields.inner("reasoning")
    if reasoning.get("effort") not in (None, "none"):
        reasoning.refuse("effort", "is not supported")
    if asked.num_choices != 1:
        fields.refuse("n", "must be 1: a response is one answer")
    limit = fields.integer("max_output_tokens", 1)
    if limit is not None:
        asked.message.stop.max_tokens = limit
    options = asked.message.options
    top = fields.integer("top_logprobs")
    options.logprobs = LOGPROBS in (fields.array("include") or []) or bool(top)
    options.top_n = top or 0
    return Sent(
        instructions=fields.text("instructions"),
        metadata=fields.object("metadata") or {},
        max_output_tokens=limit,
        names=names,
        text_format=_text_format(fields) if names else {"type": "text"},
        has_logprobs=options.logprobs,
        echoed={
            "temperature": _or(fields.number("temperature"), 1.0),
            "top_p": _or(fields.number("top_p"), 1.0),
            "presence_penalty": _or(fields.number("presence_penalty"), 0.0),
            "frequency_penalty": _or(fields.number("frequency_penalty"), 0.0),
            "top_logprobs": top or 0,
            "user": fields.get("user"),
            "safety_identifier": fields.get("safety_identifier"),
            "prompt_cache_key": fields.get("prompt_cache_key"),
        },
    )


def _text_format(fields: Fields) -> dict[str, Any]:
    """As OpenAI's clients read it back: a schema has a name, and is strict or not."""
    form = dict(fields.inner("text").object("format") or {})
    if form.get("type") == "json_schema":
        form = {"name": "answer", "strict": True, **form}
    return form


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def read_input(fields: Fields, instructions: str | None) -> inference_pb2.Chat:
    """The conversation: the instructions as the system's turn, then ``input``."""
    chat = inference_pb2.Chat()
    if instructions is not None:
        chat.messages.add(role="system", content=instructions)
    sent = fields.get("input")
    if sent is None:
        fields.refuse("input", "must be set")
    elif isinstance(sent, str):
        chat.messages.add(role="user", content=fields.text("input") or "")
    elif not isinstance(sent, list) or not sent:
        fields.refuse("input", "must be a string or a list of items, at least one")
    else:
        for index, item in enumerate(sent):
            path = f"input[{index}]"
            if not isinstance(item, dict):
                fields.refuse(path, "must be an object")
                continue
            _read_item(Fields(item, fields.violations, f"{path}."), chat)
    return chat


def _read_item(item: Fields, chat: inference_pb2.Chat) -> None:
    kind = item.get("type")
    if kind == "item_reference":
        item.refuse("type", _STATELESS)
        return
    if kind not in (None, "message"):
        item.refuse("type", "must be message: there are no other items")
        return
    role = item.text("role")
    if role not in _ROLES:
        item.refuse("role", f"must be one of {', '.join(_ROLES)}")
        return
    chat.messages.add(role=_ROLES[role], content=_text_of(item))


def _text_of(item: Fields) -> str:
    content = item.get("content")
    if not isinstance(content, list):
        if content is None:
            item.refuse("content", "must be set")
        return item.text("content") or ""
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _TEXTS:
            item.refuse(f"content[{index}]", "must be text: the model reads nothing else")
            return ""
        why = why_no_text(part.get("text"))
        if why is not None:
            item.refuse(f"content[{index}].text", why)
            return ""
        texts.append(part["text"])
    return "".join(texts)


class Response:
    """The object that answers, in each of its states.

    Args:
        request_id: Of the call; the ids of answer and message are made of it.
        asked: What was asked for.
        sent: What is repeated.
    """

    def __init__(self, request_id: str, asked: Asked, sent: Sent) -> None:
        self.item_id = f"msg_{request_id}"
        self._id = f"resp_{request_id}"
        self._asked = asked
        self._sent = sent
        self._created = int(time.time())

    def begun(self) -> dict[str, Any]:
        """The answer before its first token."""
        sent = self._sent
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": None,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": sent.instructions,
            "max_output_tokens": sent.max_output_tokens,
            "max_tool_calls": None,
            "model": self._asked.model,
            "output": [],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "text": {"format": sent.text_format},
            "tool_choice": "auto",
            "tools": [],
            "truncation": "disabled",
            "usage": None,
            "metadata": sent.metadata,
            **sent.echoed,
        }

    def ended(self, answer: Ended, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        """The answer as a whole; one that was cut at its limit is incomplete."""
        is_cut = answer.finish_reason == inference_pb2.GenerateResponse.LENGTH
        status = "incomplete" if is_cut else "completed"
        used = usage_of([answer], 1)
        return self.begun() | {
            "status": status,
            "completed_at": int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": [self.item(status, [self.part(text, logprobs)])],
            "usage": {
                "input_tokens": used["prompt_tokens"],
                "input_tokens_details": used["prompt_tokens_details"],
                "output_tokens": used["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": used["total_tokens"],
            },
            "adapters_used": adapters_of([answer]),
        }

    def failed(self, message: str, status: int) -> dict[str, Any]:
        """The answer that broke off."""
        code = "rate_limit_exceeded" if status == 429 else "server_error"
        error = {"code": code, "message": message}
        return self.begun() | {"status": "failed", "error": error}

    def item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        """The only item of the output."""
        return {
            "id": self.item_id,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": content,
        }

    def part(self, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        """The only part of the item."""
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def logprobs_of(self, answer: Ended) -> list[dict[str, Any]]:
        """The logprobs of an answer or of a part of one, if they were asked for."""
        if not self._sent.has_logprobs:
            return []
        # Here bytes are always a list.
        found = chat_logprobs(answer.logprobs)["content"]
        for token in found:
            for one in (token, *token["top_logprobs"]):
                one["bytes"] = one["bytes"] or []
        return found
