"""Sequences and schedulers without a model."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

from builders.facts import mix_of

from turret.server.adapters.adapter import Mix
from turret.server.engine.scheduling.block_pool import BlockPool
from turret.server.engine.scheduling.request import (
    Request,
    ResponseOptions,
    SamplingParams,
    StopConditions,
)
from turret.server.engine.scheduling.scheduler import Scheduler
from turret.server.engine.scheduling.sequence import Sequence

BLOCK_SIZE = 4


def sequence_of(
    prompt: SequenceOf[int],
    name: str = "",
    max_tokens: int = 4,
    preset: int = 0,
    score: bool = False,
    mix: Mix | None = None,
    tenant: bytes = b"",
) -> Sequence:
    request = Request(
        request_id="r",
        prompt_token_ids=tuple(prompt),
        stop=StopConditions(max_tokens=max_tokens),
        score=score,
        tenant=tenant,
    )
    return Sequence(request, mix or mix_of(name), 0.0, num_virtual=preset, num_preset=preset)


def run_alone(scheduler: Scheduler, sequence: Sequence) -> None:
    scheduler.add(sequence)
    while sequence.num_computed < len(sequence.tokens):
        scheduler.complete(scheduler.schedule())


def make_scheduler(**limits: Any) -> Scheduler:
    defaults = {"max_num_seqs": 8, "max_num_batched_tokens": 64}
    return Scheduler(BlockPool(64, BLOCK_SIZE), **{**defaults, **limits})


def sequence_with(
    generated: tuple[int, ...] = (),
    logprobs: bool = False,
    stop: StopConditions | None = None,
    **params: Any,
) -> Sequence:
    request = Request(
        request_id="r",
        prompt_token_ids=(3, 4, 5),
        sampling=SamplingParams(**params),
        stop=stop or StopConditions(),
        options=ResponseOptions(logprobs=logprobs, top_n=2 if logprobs else 0),
    )
    sequence = Sequence(request, mix_of(""), 0.0)
    sequence.tokens.extend(generated)
    return sequence
