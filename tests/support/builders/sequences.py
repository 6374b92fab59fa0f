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
from turret.server.engine.scheduling.sequence import Sequence, Step

BLOCK_SIZE = 4


def sequence_of(
    prompt: SequenceOf[int],
    name: str = "",
    max_tokens: int = 4,
    preset: int = 0,
    score: bool = False,
    mix: Mix | None = None,
    tenant: bytes = b"",
    arrival: float = 0.0,
    so_far: tuple[int, ...] = (),
) -> Sequence:
    request = Request(
        request_id="r",
        prompt_token_ids=tuple(prompt),
        stop=StopConditions(max_tokens=max_tokens),
        score=score,
        party=tenant,
        tenant=tenant,
        answer_so_far=so_far,
    )
    mix = mix_of(name) if mix is None else mix
    return Sequence(request, mix, arrival, num_virtual=preset, num_preset=preset)


def run_alone(scheduler: Scheduler, sequence: Sequence) -> None:
    scheduler.add(sequence)
    while sequence.num_computed < len(sequence.tokens):
        scheduler.complete(scheduler.schedule())


def make_scheduler(num_blocks: int = 64, **limits: Any) -> Scheduler:
    defaults = {"max_num_seqs": 8, "max_num_batched_tokens": 64}
    return Scheduler(BlockPool(num_blocks, BLOCK_SIZE), **{**defaults, **limits})


def advance(scheduler: Scheduler, now: float = 0.0) -> Step:
    """Run a step; each request that draws a token draws 1, and ends with its last one."""
    step = scheduler.schedule(now)
    drawing = [item.sequence for item in step.scheduled if item.samples]
    scheduler.complete(step)
    for sequence in drawing:
        sequence.tokens.append(1)
        if sequence.num_generated == sequence.request.stop.max_tokens:
            scheduler.finish(sequence)
    return step


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
