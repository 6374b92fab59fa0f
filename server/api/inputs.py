"""Calls with several inputs, which return a vector or labels for each input."""

from __future__ import annotations

import contextlib
import math
import time
from array import array
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from turret.server.adapters.adapter import REGRESSION, SINGLE_LABEL, Head
from turret.server.api.call import Call
from turret.server.api.gate import Backend
from turret.server.api.inference_answers import adapter_uses, outputs_of, timing, together
from turret.server.api.inference_requests import check_input, input_token_ids, shared_fields
from turret.server.api.limits import (
    MAX_EMBEDDING_NUMBERS,
    MAX_INPUTS,
    MAX_LABEL_SCORES,
    InputLimits,
)
from turret.server.api.violations import Violations
from turret.server.engine.scheduling.request import (
    AdapterUse,
    Finish,
    FinishReason,
    Output,
    Pooling,
    PoolingKind,
    Request,
    Timing,
)
from turret.server.errors import InvalidRequestError, UnavailableError
from turret.server.words import say
from turret.v1 import inference_pb2

_T = TypeVar("_T")
# Violations of these fields concern the whole call, not one of its inputs.
_SHARED = ("adapters", "inputs")


def check_inputs(
    inputs: Sequence[inference_pb2.Input], limits: InputLimits, violations: Violations
) -> None:
    """Check everything in the inputs that can be checked before they are tokenised.

    Raises:
        PromptTooLongError: An input exceeds the limit, however it is tokenised.
    """
    violations.check(len(inputs) > 0, "inputs", "EMPTY")
    if not violations.check_count(len(inputs), MAX_INPUTS, "inputs"):
        return
    for index, each in enumerate(inputs):
        found = Violations()
        with blamed_on(index):
            check_input(each, limits, found)
        for path, why in found.found:
            violations.add(_path(index, path), why)
        if violations.is_full:
            return


@contextlib.contextmanager
def blamed_on(index: int) -> Iterator[None]:
    """Report errors in an input with that input's path."""
    try:
        yield
    except InvalidRequestError as error:
        if any(path.startswith(_SHARED) for path, _ in error.violations):
            raise
        found = error.violations or [("", error.message)]
        raise type(error).of_all([(_path(index, path), why) for path, why in found]) from None


def _path(index: int, path: str) -> str:
    within = path.removeprefix("input").removeprefix(".")
    return f"inputs[{index}].{within}" if within else f"inputs[{index}]"


async def pooled(
    message: inference_pb2.ClassifyRequest | inference_pb2.EmbedRequest,
    backend: Backend,
    call: Call,
    *,
    pooling_of: Callable[[Violations], Pooling],
    convert: Callable[[Output], _T],
) -> tuple[list[_T], dict[str, Any]]:
    """Run a request for each input of a message, a limited number at a time.

    Args:
        message: The message from the client.
        backend: The backend that runs the requests.
        call: The call on whose behalf the requests run; each is counted as one of its party.
        pooling_of: Returns how to pool the hidden states, and reports invalid fields.
        convert: Converts a request's last output to its result.

    Returns:
        The results in the order of the inputs, and the other fields of the answer by name.

    Raises:
        InvalidRequestError: Lists every invalid field.
        TurretError: The error of the first input that failed; see ``Engine.submit``. The other
            inputs' requests end.
    """
    call.about(message.adapters)
    vocabulary = await backend.vocabularies.of(message.adapters, draw=call.draw, tenant=call.tenant)
    violations, limits = Violations(), InputLimits.of(backend, vocabulary)
    check_inputs(message.inputs, limits, violations)
    shared = shared_fields(message, call, violations)
    pooling = pooling_of(violations)
    violations.raise_if_any()
    count, start = len(message.inputs), time.monotonic()
    # Divide the size of the message among its inputs.
    shared["message_bytes"] //= count

    async def one(index: int) -> tuple[_T, Finish]:
        each = message.inputs[index]
        with call.party.hold(), blamed_on(index):
            await backend.turns.wait(call.turn)
            vocabulary = await backend.vocabularies.of(
                message.adapters, each.chat.chat_template, draw=call.draw, tenant=call.tenant
            )
            request = Request(
                prompt_token_ids=tuple(
                    await input_token_ids(each, vocabulary.tokenizer, limits, call.tenant)
                ),
                pooling=pooling,
                own_tokenizer=vocabulary.own,
                **shared,
            )
            # The engine does not know how long the input has waited for other inputs of its call.
            waited = time.monotonic() - start
            outputs = outputs_of(backend, request, call, is_whole=True)
            result, finish = await _last(outputs, convert)
            return result, replace(finish, timing=_later(finish.timing, waited))

    found = await together([one(index) for index in range(count)], call.party.most_at_once)
    fields = summed_fields([finish for _, finish in found])
    return [result for result, _ in found], {"request_id": shared["request_id"], **fields}


def _later(spans: Timing, seconds: float) -> Timing:
    return Timing(
        queue_seconds=spans.queue_seconds + seconds,
        time_to_first_token_seconds=spans.time_to_first_token_seconds + seconds,
        total_seconds=spans.total_seconds + seconds,
    )


async def _last(
    outputs: AsyncGenerator[Output, None], convert: Callable[[Output], _T]
) -> tuple[_T, Finish]:
    async with contextlib.aclosing(outputs):
        async for output in outputs:
            if output.finish is None:
                continue
            if output.finish.reason is FinishReason.CANCELLED:
                raise UnavailableError(say("SHUTTING_DOWN"))
            if output.finish.reason is not FinishReason.DEADLINE:
                return convert(output), output.finish
    raise AssertionError("a request ends with a finish, or raises")


def summed_fields(finishes: Sequence[Finish]) -> dict[str, Any]:
    """The fields of an answer that are computed from all inputs of a call, by name."""
    usages = [finish.usage for finish in finishes]
    spans = [finish.timing for finish in finishes]
    total = max(span.total_seconds for span in spans)
    return {
        "usage": inference_pb2.Usage(
            prompt_tokens=sum(usage.prompt_tokens for usage in usages),
            cached_tokens=sum(usage.cached_tokens for usage in usages),
        ),
        "adapters_used": adapter_uses(_distinct(finishes)),
        "timing": timing(
            Timing(
                queue_seconds=min(span.queue_seconds for span in spans),
                time_to_first_token_seconds=total,
                total_seconds=total,
            )
        ),
    }


def _distinct(finishes: Iterable[Finish]) -> list[AdapterUse]:
    """The weights that answered, without duplicates; cold starts are kept where they occurred."""
    places: dict[tuple[int, int], AdapterUse] = {}
    for finish in finishes:
        for place, use in enumerate(finish.adapters_used):
            known = places.setdefault((place, use.generation), use)
            if use.cold_start and not known.cold_start:
                places[place, use.generation] = use
    return [places[key] for key in sorted(places)]


# The method Classify: labels for each input.


async def classify(
    message: inference_pb2.ClassifyRequest, backend: Backend, call: Call
) -> inference_pb2.ClassifyResponse:
    """Answer a message; arguments and errors are those of ``pooled``."""
    count = len(message.inputs)

    def convert(output: Output) -> inference_pb2.Classification:
        head, logits = output.head, output.pooled
        assert head is not None
        assert logits is not None
        # This cannot be checked earlier, because the adapter may be replaced until the engine holds
        # it.
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

    classifications, fields = await pooled(
        message,
        backend,
        call,
        pooling_of=lambda _: Pooling(classifies=True),
        convert=convert,
    )
    return inference_pb2.ClassifyResponse(classifications=classifications, **fields)


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


# The method Embed: a vector for each input.


_Embed = inference_pb2.EmbedRequest
_KINDS = {
    _Embed.POOLING_UNSPECIFIED: PoolingKind.LAST,
    _Embed.LAST: PoolingKind.LAST,
    _Embed.MEAN: PoolingKind.MEAN,
}


def _pooling_of(
    message: inference_pb2.EmbedRequest, hidden_size: int, violations: Violations
) -> Pooling:
    """How to pool the hidden states. An invalid value is reported, and its default is used."""
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
    message: inference_pb2.EmbedRequest, backend: Backend, call: Call
) -> inference_pb2.EmbedResponse:
    """Answer a message; arguments and errors are those of ``pooled``."""
    hidden_size = backend.model_info.hidden_size
    embeddings, fields = await pooled(
        message,
        backend,
        call,
        pooling_of=lambda violations: _pooling_of(message, hidden_size, violations),
        convert=_vector,
    )
    return inference_pb2.EmbedResponse(embeddings=embeddings, **fields)


def _vector(output: Output) -> inference_pb2.Embedding:
    assert output.pooled is not None
    return inference_pb2.Embedding(values=output.pooled)
