"""Implements Classify: labels for each input."""

from __future__ import annotations

import functools
import math
from array import array

from turret.server.adapters.head import REGRESSION, SINGLE_LABEL, Head
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
from turret.server.api.limits import MAX_LABEL_SCORES, InputLimits
from turret.server.api.violations import Violations, adapter_refs
from turret.server.engine.scheduling.request import Output, Pooling
from turret.server.errors import InvalidRequestError
from turret.server.words import say
from turret.v1 import inference_pb2


async def classify(
    message: inference_pb2.ClassifyRequest,
    backend: Backend,
    call: Call,
    party: Party,
    deadline: float | None,
) -> inference_pb2.ClassifyResponse:
    """Answer a message; arguments and errors are those of ``embed``."""
    call.about(message.adapters)
    vocabulary = await backend.vocabularies.of(message.adapters)
    violations, limits = Violations(), InputLimits.of(backend, vocabulary)
    check_inputs(message.inputs, limits, violations)
    refs = adapter_refs(message.adapters, violations)
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
        pooling=Pooling(classifies=True),
        request_id=request_id,
        deadline=deadline,
        salt=salt,
    )
    count = len(message.inputs)

    def convert(output: Output) -> inference_pb2.Classification:
        head, logits = output.head, output.pooled
        assert head is not None
        assert logits is not None
        # This cannot be checked earlier: the adapter may be replaced until the engine holds it.
        if count > (most := MAX_LABEL_SCORES // len(logits)):
            raise InvalidRequestError.of(
                "inputs",
                say(
                    "TOO_MANY_NUMBERS",
                    most=most,
                    found=count,
                    numbers=len(logits),
                    most_numbers=MAX_LABEL_SCORES,
                ),
            )
        return _classification(head, logits)

    found = await run_inputs(backend, call, party, count=count, make=make, convert=convert)
    return inference_pb2.ClassifyResponse(
        classifications=[classification for classification, _ in found],
        request_id=request_id,
        **summed_fields([finish for _, finish in found]),
    )


def _classification(head: Head, logits: array[float]) -> inference_pb2.Classification:
    scores = [
        inference_pb2.LabelScore(label=label, probability=probability, logit=logit)
        for label, probability, logit in zip(
            head.labels, probabilities(head, logits), logits, strict=True
        )
    ]
    best = max(range(len(logits)), key=logits.__getitem__)
    return inference_pb2.Classification(label=head.labels[best], scores=scores)


def probabilities(head: Head, logits: array[float]) -> list[float] | list[None]:
    """The probability of each label; None if the numbers are not those of labels."""
    if head.problem_type == REGRESSION:
        return [None] * len(logits)
    if head.problem_type == SINGLE_LABEL:
        largest = max(logits)
        shares = [math.exp(logit - largest) for logit in logits]
        total = math.fsum(shares)
        return [share / total for share in shares]
    return [_sigmoid(logit) for logit in logits]


def _sigmoid(logit: float) -> float:
    # Avoid exp() of a large positive number, which overflows.
    if logit >= 0:
        return 1 / (1 + math.exp(-logit))
    return math.exp(logit) / (1 + math.exp(logit))
