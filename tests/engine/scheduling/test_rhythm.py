"""Prompts alongside decoding sequences: a step takes at most twice as long as without prompts."""

from __future__ import annotations

from typing import Any

import pytest
from builders.sequences import make_scheduler, sequence_of

from turret.server.engine.scheduling.scheduler import Scheduler
from turret.server.engine.scheduling.sequence import Step
from turret.server.engine.speculation import StepCost


def scheduler_of(cost: StepCost | None = None, **limits: Any) -> Scheduler:
    defaults = {"max_num_seqs": 64, "max_num_batched_tokens": 512}
    return make_scheduler(8192, cost=cost, **{**defaults, **limits})


def run(scheduler: Scheduler, seconds: float | None = None) -> Step:
    step = scheduler.schedule()
    scheduler.complete(step, seconds)
    for item in step.scheduled:
        if item.sequence.num_computed == len(item.sequence.tokens):
            item.sequence.tokens.append(1)
    return step


def prompt_tokens(step: Step) -> int:
    return sum(item.num_new for item in step.scheduled if item.num_new > 1)


def decoding(scheduler: Scheduler, count: int) -> None:
    """Add this number of sequences, and run a step in which they begin to answer."""
    for number in range(count):
        scheduler.add(sequence_of([1000 + number, 2, 3], "", 1000))
    run(scheduler)
    assert len(scheduler.running) == count


# The tokens of a chunk are ``decodes + fixed_rows``, but at least 16.
@pytest.mark.parametrize(
    ("decodes", "fixed_rows", "expected"), [(4, 7.0, 16), (15, 7.0, 22), (15, 40.0, 55)]
)
def test_each_chunk_of_a_prompt_costs_at_most_one_more_step(
    decodes: int, fixed_rows: float, expected: int
) -> None:
    cost = StepCost()
    cost.fixed_rows = fixed_rows
    scheduler = scheduler_of(cost)
    decoding(scheduler, decodes)
    prompt = sequence_of(list(range(200)), "", 4)
    scheduler.add(prompt)
    taken = []
    while prompt.num_computed < 200:
        step = run(scheduler)
        # No decoding sequence is left out.
        assert sum(item.num_new == 1 for item in step.scheduled) >= decodes
        taken.append(prompt_tokens(step))
    assert set(taken[:-1]) == {expected}


@pytest.mark.parametrize(
    ("decodes", "prompts", "max_num_seqs", "cost", "expected"),
    [
        # Several prompts share the tokens of a step: 15 decodes and the initial 7 fixed rows.
        (15, [10] * 3, 64, StepCost(), 22),
        # A burst takes a whole step, but only if all of its prompts find a place.
        (15, [51] * 4, 64, StepCost(), 204),
        (15, [51] * 4, 16, StepCost(), 22),
        # Nothing decodes alongside the prompt, or the rows of prompts are cheap.
        (0, [400], 64, StepCost(), 400),
        (15, [400], 64, None, 400),
    ],
)
def test_the_tokens_of_prompts_in_a_step(
    decodes: int, prompts: list[int], max_num_seqs: int, cost: StepCost | None, expected: int
) -> None:
    scheduler = scheduler_of(cost, max_num_seqs=max_num_seqs)
    if decodes:
        decoding(scheduler, decodes)
    for number, length in enumerate(prompts):
        scheduler.add(sequence_of([number, *range(length - 1)], "", 4))
    assert prompt_tokens(run(scheduler)) == expected


@pytest.mark.parametrize(
    ("readers", "writers", "expected"),
    [
        # However many prompts another tenant sends, they take no more time than the answer. With so
        # few decodes, that is the smallest chunk, 16.
        ([b"a"], [b"b"], 16),
        ([b"a"] * 9, [b"b"], 16),
        # Tenants have equal shares of the time: 16 for each reader, divided by the writers, but at
        # least 16.
        ([b"a", b"c", b"d"], [b"b"], 48),
        ([b"a", b"c", b"d"], [b"b", b"e"], 24),
        ([b"a"], [b"b", b"e"], 16),
        # A tenant's own prompts may delay its answer: all of a step but the decode.
        ([b"b"], [b"b"], 511),
    ],
)
def test_prompts_of_one_tenant_delay_answers_of_another_by_a_step(
    readers: list[bytes], writers: list[bytes], expected: int
) -> None:
    scheduler = scheduler_of(StepCost())
    for number, tenant in enumerate(writers):
        scheduler.add(sequence_of([1000 + number, 2, 3], "", 1000, tenant=tenant))
    run(scheduler)
    for number, tenant in enumerate(readers):
        scheduler.add(sequence_of([number, *range(4000)], "", 4, tenant=tenant))
    # The first steps begin to read the prompts of all tenants.
    steps = [run(scheduler) for _ in range(4)]
    for step in steps:
        assert sum(item.num_new == 1 for item in step.scheduled) == len(writers)
    assert prompt_tokens(steps[-1]) == expected


@pytest.mark.parametrize("num_prompts", [1, 3])
def test_a_long_context_makes_chunks_smaller_beside_a_sequence_that_decodes(
    num_prompts: int,
) -> None:
    span, size, budget = 2000.0, 8000, 512
    scheduler = scheduler_of(attention_span=span)
    decoding(scheduler, 1)
    prompts = [sequence_of([number, *range(size)], "", 4) for number in range(num_prompts)]
    for prompt in prompts:
        scheduler.add(prompt)
    num_steps = 0
    while prompts[-1].num_computed < size:
        before = {prompt: prompt.num_computed for prompt in prompts}
        step = run(scheduler)
        num_steps += 1
        chunks = [
            (item.num_new, before[item.sequence]) for item in step.scheduled if item.num_new > 1
        ]
        assert step.scheduled[0].num_new == 1
        # With attention to the context, a step takes at most as long as two with short contexts.
        assert sum(new * (1 + start / span) for new, start in chunks) <= 2 * budget
    assert num_steps <= num_prompts * 2 * size / budget + 1


def test_a_long_context_alone_takes_whole_steps() -> None:
    scheduler = scheduler_of(attention_span=2000.0)
    scheduler.add(sequence_of(list(range(8000)), "", 4))
    assert [prompt_tokens(run(scheduler)) for _ in range(15)] == [512] * 15


def test_a_prompt_beside_many_decoding_sequences_has_a_constant_limit_without_costs() -> None:
    scheduler = scheduler_of(max_num_batched_tokens=2048, most_beside=128)
    decoding(scheduler, 4)
    scheduler.add(sequence_of(list(range(300)), "", 1))
    assert [prompt_tokens(run(scheduler)) for _ in range(3)] == [128, 128, 44]
    for number in range(2):
        scheduler.add(sequence_of([number, *range(299)], "", 1))
    assert prompt_tokens(run(scheduler)) == 600, "with two prompts, four sequences are too few"


def test_costs_are_learnt_from_steps_that_only_generate() -> None:
    cost = StepCost()
    scheduler = scheduler_of(cost)
    scheduler.add(sequence_of([1, 2, 3], "", 1000))
    run(scheduler, seconds=1e6)
    assert cost.fixed_rows == 7.0
    # With steps of 1 and of 31 rows, a row costs a tenth of a step's fixed cost.
    for _ in range(200):
        run(scheduler, seconds=11.0)
    for number in range(30):
        scheduler.add(sequence_of([number, 2], "", 1000))
    while any(len(s.tokens) - s.num_computed > 1 for s in scheduler.running) or len(
        scheduler.waiting
    ):
        run(scheduler, seconds=1e6)
    for _ in range(200):
        run(scheduler, seconds=41.0)
    assert cost.fixed_rows == pytest.approx(10.0, rel=0.2)
