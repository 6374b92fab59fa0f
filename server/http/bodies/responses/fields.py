"""The fields of /v1/responses that no other endpoint has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from turret.server.api.limits import (
    MAX_CONSTRAINT_CHARS,
    MAX_TOP_LOGPROBS,
)
from turret.server.http.bodies.constraints import read_text_format
from turret.server.http.bodies.fields import Fields, is_longer, unwritable
from turret.server.http.bodies.generation import NAMES as SHARED_NAMES
from turret.server.http.bodies.generation import Asked
from turret.server.http.bodies.unsupported import NO_EFFORT

NAMES = {
    **SHARED_NAMES,
    "input": "input",
    "chat": "input",
    "chat.messages": "input",
    "chat.tools": "tools",
    "stop.max_tokens": "max_output_tokens",
    "options.top_n": "top_logprobs",
}
LOGPROBS = "message.output_text.logprobs"
STATELESS = "nothing is kept between requests: send the whole conversation as input"

# Field → values that ask for nothing (null does so everywhere), and what to say of others.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "store": ((False,), STATELESS),
    "previous_response_id": ((), STATELESS),
    "conversation": ((), STATELESS),
    "background": ((False,), "an answer is made while its client waits"),
    "prompt": ((), "there are no stored prompts: send input"),
    "truncation": (("disabled",), "a conversation is not cut: send one that fits"),
    "context_management": (([],), "a conversation is not cut: send one that fits"),
    "moderation": ((), "is not supported; leave it out"),
}
# Fields that the answer repeats, with the most characters that each may have as JSON.
_REPEATED = {
    "metadata": 16 << 10,
    "tools": 8 * MAX_CONSTRAINT_CHARS,
    "tool_choice": 16 << 10,
    "user": 512,
    "safety_identifier": 512,
    "prompt_cache_key": 512,
    "text.format": MAX_CONSTRAINT_CHARS,
}
# Repeated fields that are never parsed, or not completely.
_AS_SENT = ("tools", "tool_choice", "user", "safety_identifier", "prompt_cache_key")


@dataclass(slots=True, kw_only=True)
class Sent:
    """What the answer repeats of its request, and which optional parts the client asked for."""

    instructions: str | None
    metadata: dict[str, Any]
    max_output_tokens: int | None
    text_format: dict[str, Any]
    names: dict[str, str]
    has_logprobs: bool
    echoed: dict[str, Any]


def read_sent(fields: Fields, asked: Asked) -> Sent:
    """Read the fields that only this endpoint has; those about generation go into ``asked``."""
    for name, (neutral, why) in REFUSED.items():
        value = fields.get(name)
        # Compare the types too: 0 equals False in Python.
        if value is not None and not any(type(value) is type(n) and value == n for n in neutral):
            fields.refuse(name, why)
    names = read_text_format(fields.inner("text").inner("format"), asked.message)
    is_formatted = bool(names)
    reasoning = fields.inner("reasoning")
    if reasoning.get("effort") not in (None, "none"):
        reasoning.refuse("effort", NO_EFFORT)
    if asked.num_choices != 1:
        fields.refuse("n", "must be 1: a response is one answer")
    limit = fields.count("max_output_tokens", 1)
    if limit is not None:
        asked.message.stop.max_tokens, names["stop.max_tokens"] = limit, "max_output_tokens"
    options = asked.message.options
    top = fields.integer("top_logprobs", 0, MAX_TOP_LOGPROBS)
    options.logprobs = LOGPROBS in (fields.array("include") or []) or bool(top)
    options.top_n = top or 0
    return Sent(
        instructions=fields.text("instructions"),
        metadata=fields.object("metadata") or {},
        max_output_tokens=limit,
        names=names,
        text_format=_text_format(fields) if is_formatted else {"type": "text"},
        has_logprobs=options.logprobs,
        echoed={
            "temperature": _or(fields.number("temperature"), 1.0),
            "top_p": _or(fields.number("top_p"), 1.0),
            "presence_penalty": _or(fields.number("presence_penalty"), 0.0),
            "frequency_penalty": _or(fields.number("frequency_penalty"), 0.0),
            "top_logprobs": top or 0,
            "tools": _echoed_tools(fields.get("tools")),
            "tool_choice": _or(fields.get("tool_choice"), "auto"),
            "parallel_tool_calls": fields.get("parallel_tool_calls") is not False,
            "user": fields.get("user"),
            "safety_identifier": fields.get("safety_identifier"),
            "prompt_cache_key": fields.get("prompt_cache_key"),
        },
    )


def refuse_unwritable(fields: Fields, sent: Sent) -> None:
    """Note repeated fields that cannot be written as JSON; call it after reading all fields."""
    repeated = {name: sent.echoed[name] for name in _AS_SENT}
    for name, value in {
        "metadata": sent.metadata,
        "text.format": sent.text_format,
        **repeated,
    }.items():
        most = _REPEATED.get(name)
        if most is not None and is_longer(value, most):
            fields.refuse(name, f"at most {most} characters")
            continue
        found = unwritable(value, name)
        # Skip fields that were already rejected when they were read.
        if found and not any(found[0].startswith(path) for path, _ in fields.violations.found):
            fields.refuse(*found)


def _text_format(fields: Fields) -> dict[str, Any]:
    """As OpenAI's clients read it back: a schema has a name, and is strict or not."""
    form = dict(fields.inner("text").object("format") or {})
    if form.get("type") == "json_schema":
        form = {"name": "answer", "strict": True, **form}
    return form


def _echoed_tools(tools: Any) -> list[Any]:
    """As OpenAI's clients read them back; what is no tool is refused elsewhere."""
    if not isinstance(tools, list):
        return []
    blank = {"description": None, "parameters": {}, "strict": False}
    return [{**blank, **tool} for tool in tools if isinstance(tool, dict)]


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
