"""Converts the fields that several endpoints share, from turret.v1 to OpenAI's JSON."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from turret.v1 import inference_pb2

_Response = inference_pb2.GenerateResponse
Ended = inference_pb2.GenerateResponse | inference_pb2.GenerateChunk

FINISH_REASONS = {_Response.STOP: "stop", _Response.LENGTH: "length"}
# JSON has no infinity. OpenAI's API reports this value for an impossible token.
LEAST_LOGPROB = -9999.0
_REPLACEMENT = "\ufffd"


def head(
    answer_id: str, kind: str, model: str, info: inference_pb2.GetModelResponse
) -> dict[str, Any]:
    """The first fields of every answer and every event."""
    return {
        "id": answer_id,
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": f"fp_{info.digest[:12]}",
    }


def stop_reason(answer: Ended) -> str | int | None:
    """The stop string or token of the request that ended an answer, as vLLM reports it."""
    which = answer.WhichOneof("stop")
    return None if which is None else getattr(answer, which)


def usage_of(ended: Sequence[Ended], num_choices: int) -> dict[str, Any]:
    """Total usage. Every ``num_choices`` consecutive answers share a prompt, which counts once."""
    firsts = ended[::num_choices]
    prompt = sum(answer.usage.prompt_tokens for answer in firsts)
    completion = sum(answer.usage.completion_tokens for answer in ended)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {
            "cached_tokens": sum(answer.usage.cached_tokens for answer in firsts)
        },
    }


def adapters_of(ended: Sequence[Ended]) -> list[dict[str, Any]]:
    """The adapters used, as the first answer lists them. OpenAI's API does not have this field."""
    return uses_json(ended[0].adapters_used)


def uses_json(uses: Iterable[inference_pb2.AdapterUse]) -> list[dict[str, Any]]:
    """The adapters that produced an answer, as JSON."""
    return [
        {
            "name": use.name,
            "generation": use.generation,
            "digest": use.digest,
            # Seven digits hide the error of single precision: 0.7 stays 0.7, not 0.69999999.
            "weight": float(f"{use.weight:.7g}"),
            "cold_start": use.cold_start,
            "load_ms": use.load_ms,
        }
        for use in uses
    ]


def finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


def _bytes_of(text: str) -> list[int] | None:
    # A token that is only part of a character has no text of its own, so its bytes are unknown
    # here.
    return None if _REPLACEMENT in text else list(text.encode())


def _name(token: inference_pb2.TokenLogprob | inference_pb2.TopLogprob, *, names_ids: bool) -> str:
    """The text of a token, or its id in vLLM's form; ids also tell parts of characters apart."""
    return f"token_id:{token.token_id}" if names_ids else token.text


def chat_logprobs(
    tokens: Iterable[inference_pb2.TokenLogprob], *, names_ids: bool
) -> dict[str, Any]:
    """Log probabilities in the form of /v1/chat/completions."""

    def entry(token: inference_pb2.TokenLogprob | inference_pb2.TopLogprob) -> dict[str, Any]:
        return {
            "token": _name(token, names_ids=names_ids),
            "logprob": finite(token.logprob),
            "bytes": _bytes_of(token.text),
        }

    content = [
        {**entry(token), "top_logprobs": [entry(top) for top in token.top]} for token in tokens
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """Log probabilities in the form of /v1/completions: parallel lists, with tokens' offsets."""

    def __init__(self) -> None:
        self._offset = 0

    def render(
        self, tokens: Iterable[inference_pb2.TokenLogprob], *, names_ids: bool
    ) -> dict[str, Any]:
        """The lists for the next tokens."""
        lists: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token in tokens:
            lists["tokens"].append(_name(token, names_ids=names_ids))
            lists["text_offset"].append(self._offset)
            self._offset += len(token.text)
            # The first token of a prompt has no log probability.
            known = token.HasField("logprob")
            lists["token_logprobs"].append(finite(token.logprob) if known else None)
            lists["top_logprobs"].append(_by_name(token, names_ids=names_ids) if known else None)
        return lists


def _by_name(token: inference_pb2.TokenLogprob, *, names_ids: bool) -> dict[str, float]:
    """The log probabilities of the likeliest tokens and of the sampled one, by the token's name.

    If several tokens have the same name, the likeliest one counts.
    """
    found: dict[str, float] = {}
    for each in (*token.top, token):
        found.setdefault(_name(each, names_ids=names_ids), finite(each.logprob))
    return found
