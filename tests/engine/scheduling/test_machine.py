"""Scheduler, block pool and queue under random traffic, without a model or a clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from builders.sequences import BLOCK_SIZE, make_scheduler, run_alone, sequence_of
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from turret.server.engine.scheduling.block_pool import BlockPool, next_key, root_key
from turret.server.engine.scheduling.fair_queue import FairQueue
from turret.server.engine.scheduling.scheduler import Scheduler
from turret.server.engine.scheduling.sequence import PLACEHOLDER, Sequence, SequenceState, Step

NUM_BLOCKS = 14
MAX_SEQS = 4
MAX_TOKENS = 10


class SchedulerMachine(RuleBasedStateMachine):
    """Requests arrive, are cancelled, and run.

    A simulated runner appends a token per sampled step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE)
        self.ready: set[Sequence] = set()
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=MAX_SEQS,
            max_num_batched_tokens=MAX_TOKENS,
            is_ready=lambda sequence: sequence in self.ready,
        )
        self.live: list[Sequence] = []
        self.finished: list[Sequence] = []
        # The base generation that computes each sequence and each block.
        self.base_of: dict[Sequence, int] = {}
        self.base_of_block: dict[int, int] = {}

    @rule(
        prompt=st.lists(st.integers(0, 2), min_size=1, max_size=14),
        name=st.sampled_from(["", "a", "b"]),
        max_tokens=st.integers(1, 8),
        preset=st.sampled_from([0, 0, 4, 8]),
        score=st.booleans(),
        is_ready=st.booleans(),
    )
    def arrive(
        self,
        prompt: list[int],
        name: str,
        max_tokens: int,
        preset: int,
        score: bool,
        is_ready: bool,
    ) -> None:
        sequence = sequence_of(prompt, f"{name}{preset}", max_tokens, preset, score)
        self.scheduler.add(sequence)
        self.live.append(sequence)
        if is_ready:
            self.ready.add(sequence)

    @rule()
    def load(self) -> None:
        """Make all loading adapters resident."""
        self.ready.update(self.live)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.live:
            self._finish(data.draw(st.sampled_from(self.live)))

    @rule()
    def drain(self) -> None:
        """Request a change of the base."""
        self.scheduler.is_draining = True

    @rule()
    def change_base(self) -> None:
        if self.scheduler.is_draining and self.scheduler.is_drained:
            self.scheduler.change_base(self.scheduler.base_generation + 1)
            self.scheduler.is_draining = False

    @rule()
    def step(self) -> None:
        before = {s: s.num_computed for s in self.live}
        step = self.scheduler.schedule()
        self._check_step(step, before)
        ends = [item.sequence for item in step.scheduled if item.samples]
        self.scheduler.complete(step)
        for sequence in ends:
            if sequence.request.score:
                self._finish(sequence)
                continue
            sequence.tokens.append(1)
            if sequence.num_generated == sequence.request.stop.max_tokens:
                self._finish(sequence)

    def _check_step(self, step: Step, before: dict[Sequence, int]) -> None:
        assert sum(item.num_new for item in step.scheduled) <= MAX_TOKENS
        assert len({item.sequence for item in step.scheduled}) == len(step.scheduled)
        for item in step.scheduled:
            sequence = item.sequence
            assert item.num_new >= 1
            assert sequence in self.ready or sequence.num_preemptions
            # Positions from an adapter are not computed, and no other position is skipped.
            assert sequence.num_computed >= sequence.num_preset
            if sequence.request.score:
                first = max(before[sequence], sequence.num_preset)
                assert sequence.num_computed == first or sequence.num_preemptions
            end = sequence.num_computed + item.num_new
            assert end <= min(len(sequence.tokens), len(sequence.blocks) * BLOCK_SIZE)
        for sequence, start in step.presets:
            assert 0 <= start < sequence.num_preset // BLOCK_SIZE
        self._check_base(step)

    def _check_base(self, step: Step) -> None:
        """A sequence is computed with one base, including blocks that are found by their keys."""
        base = self.scheduler.base_generation
        for sequence, start in step.presets:
            for block in sequence.blocks[start : sequence.num_preset // BLOCK_SIZE]:
                self.base_of_block[block] = base
        for item in step.scheduled:
            sequence = item.sequence
            assert sequence in self.base_of or not self.scheduler.is_draining
            assert self.base_of.setdefault(sequence, base) == base
            known = sequence.num_computed // BLOCK_SIZE
            assert all(self.base_of_block[block] == base for block in sequence.blocks[:known])
            for block in sequence.blocks[known:]:
                self.base_of_block[block] = base

    def _finish(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        self.live.remove(sequence)
        self.finished.append(sequence)

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        held: dict[int, int] = {}
        for sequence in self.live:
            assert len(set(sequence.blocks)) == len(sequence.blocks)
            for block in sequence.blocks:
                held[block] = held.get(block, 0) + 1
        assert 0 not in held
        assert self.pool.num_active == len(held)
        assert self.pool.num_free + len(held) == NUM_BLOCKS - 1

    @invariant()
    def shared_blocks_hold_the_same_beginning(self) -> None:
        owners: dict[int, list[tuple[Any, ...]]] = {}
        for sequence in self.live:
            for i, block in enumerate(sequence.blocks):
                end = (i + 1) * BLOCK_SIZE
                content = (sequence.mix.key, tuple(sequence.tokens[:end]))
                owners.setdefault(block, []).append(content)
        for contents in owners.values():
            assert len(contents) == 1 or len(set(contents)) == 1

    @invariant()
    def every_request_is_in_one_place(self) -> None:
        waiting = list(self.scheduler.waiting)
        assert len(waiting) == len(self.scheduler.waiting)
        assert not set(waiting) & set(self.scheduler.running)
        assert {*waiting, *self.scheduler.running} == set(self.live)
        assert all(s.state is SequenceState.WAITING for s in waiting)
        assert all(s.state is SequenceState.RUNNING for s in self.scheduler.running)
        assert all(s.state is SequenceState.FINISHED and not s.blocks for s in self.finished)
        assert len(self.scheduler.running) <= MAX_SEQS

    def teardown(self) -> None:
        """Without new traffic, all ready requests finish: there is no starvation or livelock."""
        self.ready.update(self.live)
        for _ in range(2000):
            if not self.live:
                break
            self.step()
            self.change_base()
        assert not self.live
        assert self.pool.num_active == 0


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_prefix_is_found_again_within_a_mix_only() -> None:
    scheduler = make_scheduler()
    prompt = list(range(11))
    run_alone(scheduler, sequence_of(prompt, "a"))
    again, other = sequence_of(prompt, "a"), sequence_of(prompt, "b")
    scheduler.add(again)
    scheduler.add(other)
    scheduler.schedule()
    assert again.num_cached == 8
    assert other.num_cached == 0


def test_a_wholly_cached_prompt_still_computes_its_last_token() -> None:
    scheduler = make_scheduler()
    prompt = list(range(8))
    run_alone(scheduler, sequence_of(prompt, "a"))
    again = sequence_of(prompt, "a")
    scheduler.add(again)
    (item,) = scheduler.schedule().scheduled
    assert (again.num_cached, item.num_new) == (4, 4)


def test_prefix_positions_are_filled_once_and_shared() -> None:
    scheduler = make_scheduler()
    first, second = (sequence_of([1, 2], "p", preset=8) for _ in range(2))
    scheduler.add(first)
    scheduler.add(second)
    step = scheduler.schedule()
    assert [(s, start) for s, start in step.presets] == [(first, 0)]
    assert first.blocks[:2] == second.blocks[:2]
    assert first.tokens[:8] == [PLACEHOLDER] * 8
    assert (first.num_cached, second.num_cached) == (0, 0)


def test_keys_differ_by_everything_that_changes_a_value() -> None:
    mixes = [(), (("u", 1, 1.0),), (("u", 2, 1.0),), (("u", 1, 0.5),), (("v", 1, 1.0),)]
    roots = [root_key(generation, mix) for generation in (0, 1) for mix in mixes]
    assert len(set(roots)) == len(roots)
    assert next_key(roots[0], [1, 2]) != next_key(roots[0], [2, 1])
    assert next_key(roots[0], [1]) != next_key(roots[1], [1])


@dataclass(eq=False)
class Item:
    group: str
    number: int
    arrival: float = 0.0
    party: str = ""
    tenant: bytes = b""


def always(_: Item) -> bool:
    return True


def test_the_least_served_group_goes_first_and_order_holds_within_it() -> None:
    line: FairQueue[Item] = FairQueue()
    items = [Item("a", 0), Item("a", 1), Item("b", 0), Item("b", 1)]
    for item in items:
        line.push(item)
    served = []
    while (item := line.peek(always)) is not None:
        line.remove(item)
        line.start(item)
        line.charge(item.group, 10)
        served.append((item.group, item.number))
    assert served == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]


def test_a_group_that_was_idle_has_saved_no_credit() -> None:
    line: FairQueue[Item] = FairQueue()
    busy = [Item("busy", i) for i in range(4)]
    for item in busy:
        line.push(item)
    first = line.peek(always)
    assert first is not None
    line.remove(first)
    line.start(first)
    line.charge("busy", 1000)
    line.push(Item("late", 0))
    line.push(Item("late", 1))
    line.charge("late", 10)
    assert line.peek(always) is not None
    late = line.peek(lambda item: item.group == "late")
    assert late is not None
    # The newcomer entered at the busy group's counter, not at 0, so 10 tokens put it behind.
    chosen = line.peek(always)
    assert chosen is not None
    assert chosen.group == "busy"


def test_a_group_that_is_not_ready_is_passed_over() -> None:
    line: FairQueue[Item] = FairQueue()
    cold, warm = Item("cold", 0), Item("warm", 0)
    line.push(cold)
    line.push(warm)
    assert line.peek(lambda item: item is not cold) is warm


def simulate(rate: float, rare_share: float, steps: int = 6000) -> dict[str, list[float]]:
    """Queue times on a simulated clock, with 4 places and 10 time units per request."""
    line: FairQueue[Item] = FairQueue()
    running: list[tuple[float, Item]] = []
    waits: dict[str, list[float]] = {"popular": [], "rare": []}
    due = {"popular": 0.0, "rare": 0.0}
    share = {"popular": 1.0 - rare_share, "rare": rare_share}
    for now in range(steps):
        for group, fraction in share.items():
            due[group] += rate * fraction
            while due[group] >= 1.0:
                due[group] -= 1.0
                line.push(Item(group, 0, float(now)))
        for end, item in [r for r in running if r[0] <= now]:
            running.remove((end, item))
            line.stop(item)
        while len(running) < 4 and (item := line.peek(always)) is not None:
            line.remove(item)
            line.start(item)
            line.charge(item.group, 10)
            waits[item.group].append(now - item.arrival)
            running.append((now + 10.0, item))
    return waits


def test_a_rare_adapter_does_not_starve_behind_a_popular_one() -> None:
    # The load is twice the capacity, nine tenths of it for one adapter.
    waits = simulate(rate=0.8, rare_share=0.1)
    popular, rare = sorted(waits["popular"]), sorted(waits["rare"])
    assert len(rare) > 300
    p99_rare = rare[int(0.99 * len(rare))]
    p50_popular = popular[len(popular) // 2]
    assert p99_rare <= 3 * p50_popular
    # Only the popular adapter suffers from its overload: the rare one waits just for a place.
    assert p99_rare <= 20.0


@pytest.mark.parametrize("count", [1, 5])
def test_blocks_are_all_or_nothing(count: int) -> None:
    pool = BlockPool(4, BLOCK_SIZE)
    taken = pool.allocate(count)
    assert (taken is None) == (count > 3)
    assert pool.num_free == 3 - len(taken or [])
