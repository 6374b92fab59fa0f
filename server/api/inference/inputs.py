"""Calls with several inputs: their checks, concurrent execution, and summed usage."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from turret.server.adapters.ref import AdapterRef
from turret.server.api.access.shares import Party
from turret.server.api.call import Call
from turret.server.api.gate import Backend
from turret.server.api.inference.answers import adapter_uses, outputs_of, timing, together
from turret.server.api.inference.requests import check_input, input_token_ids
from turret.server.api.limits import MAX_INPUTS, InputLimits
from turret.server.api.violations import Violations
from turret.server.engine.scheduling.request import (
    AdapterUse,
    Finish,
    FinishReason,
    Output,
    Pooling,
    Request,
    Timing,
)
from turret.server.errors import InvalidRequestError, UnavailableError
from turret.server.words import say
from turret.v1 import inference_pb2

if TYPE_CHECKING:
    from turret.server.api.vocabularies import Vocabulary

_T = TypeVar("_T")
# Violations of these fields concern the whole call, not one of its inputs.
_SHARED = ("adapters", "inputs")


def check_inputs(
    inputs: Sequence[inference_pb2.Input], limits: InputLimits, violations: Violations
) -> None:
    """Check every input as far as possible without tokenising it.

    Raises:
        PromptTooLongError: One cannot be as few tokens as the limit, whatever they are.
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


def pooled_requests(
    inputs: Sequence[inference_pb2.Input],
    vocabulary_for: Callable[[str], Awaitable[Vocabulary]],
    limits: InputLimits,
    call: Call,
    *,
    adapters: tuple[AdapterRef, ...],
    pooling: Pooling,
    request_id: str,
    deadline: float | None,
    salt: bytes,
) -> Callable[[int], Awaitable[Request]]:
    """Returns a function that makes the request for an input, given its index.

    ``vocabulary_for`` finds the vocabulary for an input, by the chat template that it brings.
    """
    # Divide the size of the message among its inputs.
    message_bytes = call.message_bytes // len(inputs)

    async def make(index: int) -> Request:
        vocabulary = await vocabulary_for(inputs[index].chat.chat_template)
        ids = await input_token_ids(inputs[index], vocabulary.tokenizer, limits)
        return Request(
            request_id=request_id,
            prompt_token_ids=tuple(ids),
            adapters=adapters,
            deadline=deadline,
            message_bytes=message_bytes,
            pooling=pooling,
            own_tokenizer=vocabulary.own,
            salt=salt,
            party=call.party,
        )

    return make


async def run_inputs(
    backend: Backend,
    call: Call,
    party: Party,
    *,
    count: int,
    make: Callable[[int], Awaitable[Request]],
    convert: Callable[[Output], _T],
) -> list[tuple[_T, Finish]]:
    """Run a request for each input, a limited number at a time.

    Args:
        backend: Answers.
        call: On whose behalf.
        party: Whose requests they are; each is counted.
        count: Of all inputs.
        make: The request for an input, by its index; asked for when its turn comes.
        convert: What is kept of a request's last output.

    Returns:
        In the order of the inputs, what was kept, and how the request ended, with its timing told
        from the beginning of this.

    Raises:
        TurretError: What the first of them to fail raised; the others end.
    """
    start = time.monotonic()

    async def one(index: int) -> tuple[_T, Finish]:
        with party.hold(), blamed_on(index):
            outputs = outputs_of(backend, await make(index), call, is_whole=True)
            waited = time.monotonic() - start
            kept, finish = await _last(outputs, convert)
            return kept, replace(finish, timing=_later(finish.timing, waited))

    return await together([one(index) for index in range(count)], party.most_at_once)


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
    """The fields that every finished answer has, by name, over all inputs of a call."""
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
