"""Implements Embed: a vector for each input."""

from __future__ import annotations

import functools
from typing import Any

from turret.server.api.access.shares import Party
from turret.server.api.call import Call
from turret.server.api.gate import Backend
from turret.server.api.inference.inputs import (
    check_inputs,
    pooled_requests,
    run_inputs,
    summed_fields,
)
from turret.server.api.inference.requests import check_request_id, request_salt
from turret.server.api.limits import MAX_EMBEDDING_NUMBERS, InputLimits
from turret.server.api.violations import Violations, adapter_refs
from turret.server.engine.scheduling.request import Output, Pooling, PoolingKind
from turret.v1 import inference_pb2

_Embed = inference_pb2.EmbedRequest
_KINDS = {
    _Embed.POOLING_UNSPECIFIED: PoolingKind.LAST,
    _Embed.LAST: PoolingKind.LAST,
    _Embed.MEAN: PoolingKind.MEAN,
}


def pooling_of(
    message: inference_pb2.EmbedRequest, hidden_size: int, violations: Violations
) -> Pooling:
    """How to pool the hidden states; an invalid value is noted, and left at its default."""
    values: dict[str, Any] = {}
    violations.check_enum(message, "pooling")
    if message.pooling in _KINDS:
        values["kind"] = _KINDS[message.pooling]
    if message.HasField("normalize"):
        values["normalize"] = message.normalize
    dimensions = hidden_size
    if message.HasField("dimensions"):
        fits = 1 <= message.dimensions <= hidden_size
        violations.check(
            fits, "dimensions", "NOT_IN_RANGE", least=1, most=hidden_size, value=message.dimensions
        )
        dimensions = values["dimensions"] = message.dimensions if fits else hidden_size
    most = MAX_EMBEDDING_NUMBERS // dimensions
    violations.check(
        len(message.inputs) <= most,
        "inputs",
        "TOO_MANY_NUMBERS",
        most=most,
        found=len(message.inputs),
        numbers=dimensions,
        most_numbers=MAX_EMBEDDING_NUMBERS,
    )
    return Pooling(**values)


async def embed(
    message: inference_pb2.EmbedRequest,
    backend: Backend,
    call: Call,
    party: Party,
    deadline: float | None,
) -> inference_pb2.EmbedResponse:
    """Answer a message.

    Args:
        message: What the client sent.
        backend: Answers.
        call: On whose behalf.
        party: Whose requests the inputs are.
        deadline: ``time.monotonic()`` seconds, or None.

    Raises:
        InvalidRequestError: Lists every offending field.
        TurretError: What the first input to fail raised; see ``Engine.submit``.
    """
    call.about(message.adapters)
    vocabulary = await backend.vocabularies.of(message.adapters)
    violations, limits = Violations(), InputLimits.of(backend, vocabulary)
    check_inputs(message.inputs, limits, violations)
    refs = adapter_refs(message.adapters, violations)
    pooling = pooling_of(message, backend.model_info.hidden_size, violations)
    check_request_id(message.request_id, violations)
    salt = request_salt(call, message.cache_salt, violations)
    violations.raise_if_any()
    request_id = message.request_id or call.request_id
    make = pooled_requests(
        message.inputs,
        functools.partial(backend.vocabularies.of, message.adapters),
        limits,
        call,
        adapters=refs,
        pooling=pooling,
        request_id=request_id,
        deadline=deadline,
        salt=salt,
    )
    found = await run_inputs(
        backend, call, party, count=len(message.inputs), make=make, convert=_vector
    )
    return inference_pb2.EmbedResponse(
        embeddings=[vector for vector, _ in found],
        request_id=request_id,
        **summed_fields([finish for _, finish in found]),
    )


def _vector(output: Output) -> inference_pb2.Embedding:
    assert output.pooled is not None
    return inference_pb2.Embedding(values=output.pooled)
