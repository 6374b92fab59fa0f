"""POST /v1/embeddings."""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable
from typing import Any

from turret.server.api.inference.inference import Inference
from turret.server.api.violations import Violations
from turret.server.http.bodies.answer_fields import told_uses
from turret.server.http.bodies.fields import Fields
from turret.server.http.bodies.generation import read_deadline
from turret.server.http.bodies.model_names import mix_of
from turret.server.http.bodies.prompts import read_inputs
from turret.server.http.bodies.slips import refuse_if_wrong
from turret.server.http.exchange.endpoint import Exchange
from turret.v1 import inference_pb2

_Embed = inference_pb2.EmbedRequest
_POOLINGS = {"last": _Embed.LAST, "mean": _Embed.MEAN}
# Serialising more numbers than this takes over a millisecond.
_INLINE_NUMBERS = 2048


class Embeddings:
    """Turns texts into vectors.

    Args:
        inference: What answers.
    """

    def __init__(self, inference: Inference) -> None:
        self._inference = inference

    async def __call__(self, exchange: Exchange) -> None:
        info = self._inference.model()
        violations = Violations()
        fields = Fields(exchange.take_body(), violations)
        message = _Embed(adapters=mix_of(fields, info.name, exchange.names))
        exchange.call.about(message.adapters)
        message.inputs.extend(read_inputs(fields, exchange.names))
        message.cache_salt = fields.text("cache_salt") or ""
        _read_options(fields, message)
        encode = _read_format(fields)
        deadline = read_deadline(fields)
        model = str(fields.get("model"))
        refuse_if_wrong(fields, exchange.names)
        del fields
        answer = await self._inference.embed(message, exchange.call, exchange.party, deadline)
        count = sum(len(each.values) for each in answer.embeddings)
        is_long = count > _INLINE_NUMBERS
        await exchange.reply.made_json(lambda: _body(answer, model, encode), is_long=is_long)


def _read_options(fields: Fields, message: inference_pb2.EmbedRequest) -> None:
    pooling = fields.text("pooling")
    if pooling is not None and pooling not in _POOLINGS:
        fields.refuse("pooling", f"must be one of {', '.join(_POOLINGS)}")
    message.pooling = _POOLINGS.get(pooling or "", _Embed.POOLING_UNSPECIFIED)
    if fields.get("normalize") is not None:
        message.normalize = fields.flag("normalize")
    dimensions = fields.integer("dimensions")
    if dimensions is not None:
        message.dimensions = dimensions


def _read_format(fields: Fields) -> Callable[[inference_pb2.Embedding], Any]:
    """How a vector is written: ``encoding_format``."""
    kind = fields.text("encoding_format") or "float"
    if kind not in _FORMATS:
        fields.refuse("encoding_format", f"must be one of {', '.join(_FORMATS)}")
    return _FORMATS.get(kind, _numbers)


def _numbers(embedding: inference_pb2.Embedding) -> list[float]:
    # Nine significant digits identify every single-precision number.
    return [float(f"{value:.9g}") for value in embedding.values]


def _base64(embedding: inference_pb2.Embedding) -> str:
    """Little-endian single precision."""
    values = embedding.values
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


_FORMATS: dict[str, Callable[[inference_pb2.Embedding], Any]] = {
    "float": _numbers,
    "base64": _base64,
}


def _body(
    answer: inference_pb2.EmbedResponse,
    model: str,
    encode: Callable[[inference_pb2.Embedding], Any],
) -> dict[str, Any]:
    tokens = answer.usage.prompt_tokens
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": encode(each)}
            for index, each in enumerate(answer.embeddings)
        ],
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "adapters_used": told_uses(answer.adapters_used),
    }
