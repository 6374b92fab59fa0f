"""The fields that /v1/chat/completions and /v1/completions share, to a GenerateRequest."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from turret.server.http.bodies.constraints import read_constraint
from turret.server.http.bodies.fields import Fields, are_token_ids, is_token_id, why_no_text
from turret.server.http.bodies.model_names import mix_of
from turret.v1 import inference_pb2

# OpenAI's limit.
MAX_CHOICES = 128
# Longer than any request runs.
MAX_TIMEOUT_SECONDS = 30 * 86400.0

_NUMBERS = (
    *("temperature", "top_p", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty"),
)
# Field paths of turret.v1, mapped to the names of this API.
NAMES = {
    "sampling.": "",
    "stop.": "",
    "stop.stop_strings": "stop",
    "stop.include_stop": "include_stop_str_in_output",
}
CHAT_NAMES = {
    **NAMES,
    "input": "messages",
    "chat": "messages",
    "chat.messages": "messages",
    "chat.tools": "tools",
    "options.top_n": "top_logprobs",
}
COMPLETION_NAMES = {
    **NAMES,
    "input": "prompt",
    "token_ids.ids": "prompt",
    "options.top_n": "logprobs",
    "top_n": "logprobs",
}


@dataclass(slots=True, kw_only=True)
class Asked:
    """What a request asks for, whatever its prompt.

    Attributes:
        model: The name that it gives, as it stands in the answer.
        message: Everything but the input.
        num_choices: Answers to each prompt.
        is_stream: Whether the answer comes in events.
        includes_usage: Whether the last event tells what it cost.
        deadline: ``time.monotonic()`` seconds, or None.
        names: Names that the client has for fields of the message, beside those of the endpoint.
    """

    model: str
    message: inference_pb2.GenerateRequest
    num_choices: int
    is_stream: bool
    includes_usage: bool
    deadline: float | None
    names: Mapping[str, str]


def read_asked(fields: Fields, base_name: str, *, least_tokens: int = 1) -> Asked:
    """Read the fields that both endpoints have; errors are noted in their violations.

    Args:
        fields: The request.
        base_name: The base model's own name.
        least_tokens: The lowest limit of an answer that the endpoint takes.

    Raises:
        AdapterNotFoundError: See ``mix_of``.
    """
    message = inference_pb2.GenerateRequest()
    names: dict[str, str] = {}
    message.adapters.extend(mix_of(fields, base_name, names))
    _read_sampling(fields, message.sampling)
    names.update(_read_stop(fields, message.stop, least_tokens))
    message.cache_salt = fields.text("cache_salt") or ""
    num_choices = fields.integer("n", 1, MAX_CHOICES)
    num_choices = 1 if num_choices is None else num_choices
    best_of = fields.integer("best_of", 1, MAX_CHOICES)
    if best_of is not None and best_of != num_choices:
        fields.refuse(
            "best_of",
            f"must be {num_choices}, as n, or be left out: every answer that is made is sent",
        )
    is_stream = fields.flag("stream")
    options = fields.inner("stream_options")
    return Asked(
        model=str(fields.get("model")),
        message=message,
        num_choices=num_choices,
        is_stream=is_stream,
        includes_usage=options.flag("include_usage") and is_stream,
        deadline=read_deadline(fields),
        names={**names, **read_constraint(fields, message)},
    )


def read_deadline(fields: Fields) -> float | None:
    """``timeout``, in seconds from now, as a ``time.monotonic()`` value; None without one."""
    seconds = fields.number("timeout")
    if seconds is None:
        return None
    if not 0 < seconds <= MAX_TIMEOUT_SECONDS:
        fields.refuse("timeout", f"must be in (0, {MAX_TIMEOUT_SECONDS:.0f}] seconds")
        return None
    return time.monotonic() + seconds


def _read_sampling(fields: Fields, sampling: inference_pb2.SamplingParams) -> None:
    for name in _NUMBERS:
        number = fields.number(name)
        if number is not None:
            setattr(sampling, name, number)
    # vLLM disables top_k with -1, turret with 0.
    top_k = fields.count("top_k", -1)
    if top_k is not None:
        sampling.top_k = max(top_k, 0)
    seed = fields.integer("seed", -(1 << 63), (1 << 64) - 1)
    if seed is not None:
        sampling.seed = seed % (1 << 64)
    for key, bias in (fields.object("logit_bias") or {}).items():
        is_id = key.isascii() and key.isdecimal() and len(key) <= 10 and is_token_id(int(key))
        if not is_id or isinstance(bias, bool) or not isinstance(bias, int | float):
            fields.refuse("logit_bias", "must map token ids to numbers")
            return
        # Clamp integers that no float can hold. Anything beyond 100 is rejected later anyway.
        sampling.logit_bias[int(key)] = max(-1000, min(bias, 1000))


def _read_stop(
    fields: Fields, stop: inference_pb2.StopConditions, least_tokens: int
) -> dict[str, str]:
    """Read the conditions; returns the name of the limit, if there is one."""
    older = fields.count("max_tokens", least_tokens)
    newer = fields.count("max_completion_tokens", least_tokens)
    limit, name = (older, "max_tokens") if newer is None else (newer, "max_completion_tokens")
    names = {}
    if limit is not None:
        stop.max_tokens, names["stop.max_tokens"] = limit, name
    least = fields.count("min_tokens")
    if least is not None:
        stop.min_tokens = least
    stop.ignore_eos = fields.flag("ignore_eos")
    stop.include_stop = fields.flag("include_stop_str_in_output") or fields.flag("include_stop")
    texts = fields.get("stop")
    texts = [texts] if isinstance(texts, str) else texts
    if texts is not None and not isinstance(texts, list):
        fields.refuse("stop", "must be a string or a list of strings")
        texts = None
    for index, text in enumerate(texts or []):
        why = why_no_text(text)
        if why is not None:
            fields.refuse(f"stop[{index}]", why)
            return names
        stop.stop_strings.append(text)
    ids = fields.array("stop_token_ids") or []
    if are_token_ids(ids):
        stop.stop_token_ids.extend(ids)
    else:
        fields.refuse("stop_token_ids", "must be a list of token ids")
    return names


def numbered(
    asked: Asked, prompt: inference_pb2.GenerateRequest, choice: int
) -> inference_pb2.GenerateRequest:
    """The request for one of a prompt's answers. With a seed, each answer gets a different one.

    Args:
        asked: What is asked for.
        prompt: The input alone.
        choice: Which of the answers, from 0, which keeps the seed that was sent.
    """
    message = inference_pb2.GenerateRequest()
    message.CopyFrom(asked.message)
    message.MergeFrom(prompt)
    if choice and message.sampling.HasField("seed"):
        message.sampling.seed = (message.sampling.seed + choice) % (1 << 64)
    return message
