"""Drafts in the scheduler: they use leftover tokens and blocks, and return unused ones."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import pytest
from builders.sequences import BLOCK_SIZE, make_scheduler, sequence_of

from turret.server.engine.scheduling.scheduler import Scheduler
from turret.server.engine.scheduling.sequence import Scheduled, Sequence
from turret.server.engine.speculation import Drafter, MixMemory, Speculation, StepCost, StepPlan


class Eager(Drafter):
    """Drafts as many 7s as there is room for."""

    asked: int = 0
    learnt: int | None = None

    def draft(self, memory: MixMemory, plan: StepPlan, most: int) -> tuple[int, ...]:
        self.asked = most
        return (7,) * min(most, self._last_end - len(self._tokens) - 1)

    def learn(self, num_accepted: int) -> None:
        self.learnt = num_accepted


def eager(prompt: SequenceOf[int], max_tokens: int = 100, name: str = "") -> Sequence:
    sequence = sequence_of(prompt, name, max_tokens)
    sequence.drafter = Eager(
        sequence.group,
        sequence.tokens,
        start=0,
        prompt_end=sequence.prompt_end,
        max_tokens=max_tokens,
        end_ids=frozenset(),
    )
    return sequence


def make(num_blocks: int = 64) -> Scheduler:
    return make_scheduler(
        num_blocks, max_num_batched_tokens=24, speculation=Speculation(StepCost())
    )


def step(scheduler: Scheduler, right: int = 0) -> list[Scheduled]:
    """A step in which this number of draft tokens of each sequence is right."""
    found = scheduler.schedule()
    scheduler.complete(found)
    for item in found.scheduled:
        if item.sequence.num_computed == len(item.sequence.tokens):
            count = min(right, len(item.draft))
            item.sequence.tokens += [*item.draft[:count], 1]
            if item.draft:
                scheduler.accept(item, count)
    return list(found.scheduled)


def test_drafts_use_the_tokens_that_the_step_has_left() -> None:
    scheduler = make()
    first, second = eager([1, 2, 3]), eager([4] * 30)
    scheduler.add(first)
    assert [item.draft for item in step(scheduler)] == [()]
    assert [len(item.draft) for item in step(scheduler)] == [23]
    scheduler.add(second)
    # The prompt takes all remaining tokens, and a chunk of a prompt has no draft.
    assert [(item.num_new, len(item.draft)) for item in step(scheduler)] == [(1, 0), (23, 0)]
    assert [(item.num_new, len(item.draft)) for item in step(scheduler)] == [(1, 16), (7, 0)]
    assert sum(item.num_rows for item in step(scheduler)) == 24


def test_correct_drafts_are_kept_and_wrong_ones_leave_nothing_behind() -> None:
    scheduler = make()
    sequence = eager([1, 2, 3])
    scheduler.add(sequence)
    step(scheduler)
    assert (sequence.num_computed, len(sequence.blocks)) == (3, 1)
    served = scheduler.waiting.served(sequence.group)
    step(scheduler, right=6)
    assert sequence.tokens == [1, 2, 3, 1, *[7] * 6, 1]
    assert sequence.num_computed == 10
    assert len(sequence.blocks) == 3
    assert scheduler.blocks.num_active == 3
    assert scheduler.waiting.served(sequence.group) == served + 7
    assert isinstance(sequence.drafter, Eager)
    assert sequence.drafter.learnt == 6
    # Two blocks are full, so a request with the same tokens finds them.
    other = eager([*sequence.tokens[:10], 5])
    scheduler.add(other)
    step(scheduler, right=0)
    assert other.blocks[:2] == sequence.blocks[:2]
    assert other.num_cached == 8


def test_drafts_take_only_free_blocks() -> None:
    """Three blocks for two sequences: a sequence that needs one gets it, despite drafts."""
    scheduler = make(num_blocks=4)
    first, second = eager([1, 2, 3], 8), eager([4, 5], 8)
    scheduler.add(first)
    step(scheduler)
    scheduler.add(second)
    for _ in range(2):
        step(scheduler)
        assert scheduler.blocks.num_active == len(first.blocks) + len(second.blocks) <= 3
        assert first.num_preemptions == second.num_preemptions == 0
    found = scheduler.schedule()
    assert found.num_preempted == 0
    assert all(
        item.sequence.num_computed + item.num_rows <= BLOCK_SIZE * len(item.sequence.blocks)
        for item in found.scheduled
    )


@pytest.mark.parametrize("num_others", [0, 2])
def test_steps_have_no_drafts_if_the_device_lacks_memory_for_them(num_others: int) -> None:
    scheduler = make()
    sequences = [eager([1, 2, 3], name=f"{i}") for i in range(1 + num_others)]
    for sequence in sequences:
        scheduler.add(sequence)
    step(scheduler)
    found = scheduler.schedule()
    assert any(item.draft for item in found.scheduled)
    assert scheduler.abandon(found) is not None
    held = sum(len(s.blocks) for s in scheduler.running)
    assert scheduler.blocks.num_active == held == len(scheduler.running)
    assert not any(item.draft for item in step(scheduler))
    # A single request without a draft cannot be made smaller.
    if num_others == 0:
        assert scheduler.abandon(scheduler.schedule()) is None
    scheduler.finish(sequences[-1])
    if num_others:
        step(scheduler)
        assert any(item.draft for item in step(scheduler))
