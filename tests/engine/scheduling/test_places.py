"""Sharing of places on a simulated clock: a mix that fills the server yields to a waiting one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as SequenceOf
from typing import Any

import pytest
from builders.facts import mix_of
from builders.sequences import BLOCK_SIZE, advance, make_scheduler, run_alone, sequence_of

from turret.server.engine.scheduling.block_pool import root_key
from turret.server.engine.scheduling.sequence import Sequence, SequenceState

STEP_SECONDS = 0.05
AFTER_SECONDS = 5.0
SLOTS = 8
LONG, SHORT = 400, 4
_numbers = itertools.count()


class Clock:
    """A scheduler whose steps take ``STEP_SECONDS`` each."""

    def __init__(self, num_blocks: int = 4096, **limits: Any) -> None:
        self.scheduler = make_scheduler(
            num_blocks, **{"preempt_after_seconds": AFTER_SECONDS, **limits}
        )
        self.now = 0.0
        self.num_preempted = 0
        self.started: dict[Sequence, float] = {}

    def ask(
        self, name: str, max_tokens: int, tenant: bytes = b"", prompt_tokens: int = 3
    ) -> Sequence:
        sequence = sequence_of(
            (next(_numbers), *range(1, prompt_tokens)),
            max_tokens=max_tokens,
            mix=mix_of(*name.split("+")),
            tenant=tenant,
            arrival=self.now,
        )
        self.scheduler.add(sequence)
        return sequence

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            step = advance(self.scheduler, self.now)
            self.num_preempted += step.num_preempted
            self.now += STEP_SECONDS
            for item in step.scheduled:
                self.started.setdefault(item.sequence, self.now)

    def run_until_ended(self, sequences: SequenceOf[Sequence], most_seconds: float) -> None:
        until = self.now + most_seconds
        while any(sequence.state is not SequenceState.FINISHED for sequence in sequences):
            assert self.now < until, "it did not end in time"
            self.step()

    def waited(self, sequence: Sequence) -> float:
        return self.started[sequence] - sequence.arrival


# A request of a mix or tenant that runs in too many places ("hog") yields its place to a waiting
# one ("polite").


def test_a_mix_that_occupies_all_places_yields_one() -> None:
    clock = Clock()
    hogs = [clock.ask("hog", LONG) for _ in range(100)]
    clock.step(20)
    polite = clock.ask("polite", SHORT)
    clock.run_until_ended([polite], 10.0)
    assert clock.waited(polite) <= AFTER_SECONDS + 2 * STEP_SECONDS
    assert clock.num_preempted == 1
    # Requests that yielded also end, with all of their tokens.
    clock.run_until_ended(hogs, 100 * LONG * STEP_SECONDS / SLOTS * 1.5)
    assert all(hog.num_generated == LONG for hog in hogs)


def test_without_a_waiting_limit_no_request_is_preempted() -> None:
    clock = Clock(preempt_after_seconds=None)
    for _ in range(SLOTS):
        clock.ask("hog", LONG)
    clock.step()
    polite = clock.ask("polite", SHORT)
    clock.run_until_ended([polite], 30.0)
    assert clock.num_preempted == 0
    assert clock.waited(polite) > LONG * STEP_SECONDS / 2


@pytest.mark.parametrize("num_mixes", [1, 60])
def test_a_tenant_that_occupies_all_places_yields_half_of_them(num_mixes: int) -> None:
    clock = Clock()
    hogs = [clock.ask(f"mix {n % num_mixes}", LONG, b"hog") for n in range(60)]
    clock.step(20)
    # No other tenant is waiting, so this one may take all places.
    assert len(clock.scheduler.running) == SLOTS
    polite = [clock.ask("mix 0", LONG, b"polite") for _ in range(12)]
    clock.step(int(AFTER_SECONDS / STEP_SECONDS) + SLOTS)
    assert sorted(s.tenant for s in clock.scheduler.running) == [b"hog"] * 4 + [b"polite"] * 4
    clock.run_until_ended([*polite, *hogs], 72 * LONG * STEP_SECONDS / SLOTS * 1.5)
    assert all(s.num_generated == LONG for s in [*polite, *hogs])
    # Only the mixes of one tenant yield to each other.
    assert not any(s.num_preemptions for s in polite)


def test_a_third_tenant_takes_from_the_one_with_the_most_places() -> None:
    clock = Clock(max_num_seqs=6)
    for tenant, count in ((b"small", 1), (b"large", 20)):
        for _ in range(count):
            clock.ask("", LONG, tenant)
    clock.step()
    new = [clock.ask("", LONG, b"new") for _ in range(3)]
    # A place fewer for "large" and one more for "new" would be no fairer.
    for _ in range(2):
        clock.step(int(AFTER_SECONDS / STEP_SECONDS) + SLOTS)
        assert sorted(s.tenant for s in clock.scheduler.running) == (
            [b"large"] * 3 + [b"new"] * 2 + [b"small"]
        )
    assert clock.num_preempted == 2
    assert all(s in clock.started for s in new[:2])


def test_several_waiting_mixes_get_one_place_per_step() -> None:
    clock = Clock()
    for _ in range(100):
        clock.ask("hog", LONG)
    clock.step(20)
    polite = [clock.ask(f"polite {number}", SHORT) for number in range(20)]
    clock.run_until_ended(polite, 30.0)
    for position, waited in enumerate(sorted(map(clock.waited, polite))):
        assert waited <= AFTER_SECONDS + (2 + position) * STEP_SECONDS


def test_a_mix_that_was_served_less_does_not_yield() -> None:
    clock = Clock(max_num_seqs=2)
    clock.ask("popular", LONG)
    clock.step(40)
    # Both places are taken, one of them by a mix that was served very little.
    rare = clock.ask("rare", LONG)
    clock.step()
    clock.ask("popular", LONG)
    clock.step(int(3 * AFTER_SECONDS / STEP_SECONDS))
    assert rare.num_preemptions == 0


def test_two_mixes_with_unlimited_demand_take_turns() -> None:
    clock = Clock()
    names = ("a", "b")
    asked = {name: [clock.ask(name, LONG) for _ in range(60)] for name in names}
    clock.step(2000)
    served = {name: sum(s.num_generated for s in sequences) for name, sequences in asked.items()}
    assert max(served.values()) < 1.2 * min(served.values())
    # Preemptions are rare: at most one per place in the waiting time.
    assert clock.num_preempted <= SLOTS * clock.now / AFTER_SECONDS


def test_a_mix_that_fills_the_cache_yields_blocks() -> None:
    """Places are free, but another mix's long answers fill the cache."""
    clock = Clock(num_blocks=4 * (LONG // BLOCK_SIZE) + 8, max_num_seqs=64)
    for _ in range(40):
        clock.ask("hog", LONG)
    clock.step(200)
    polite = clock.ask("polite", LONG)
    before = clock.now
    while polite not in clock.started:
        clock.step()
        assert clock.now - before < AFTER_SECONDS + 20 * STEP_SECONDS


# A request yields the memory of its adapters to one whose adapters do not fit (``yield_memory``).


def taken(clock: Clock, waiting: Sequence, since: float = 0.0) -> list[Sequence]:
    """The requests that give up memory to a waiting one; all have held theirs from ``since`` on."""
    scheduler = clock.scheduler
    holding = [s for s in (*scheduler.waiting, *scheduler.running) if s is not waiting]
    found = scheduler.yield_memory({waiting.mix}, dict.fromkeys(holding, since), clock.now)
    if found is None:
        return []
    assert found[0] is waiting
    return found[1]


def short_of_memory(name: str) -> tuple[Clock, list[Sequence], Sequence]:
    """Requests for three adapters, of which one does not run, and one that waits for memory."""
    clock = Clock(
        is_ready=lambda sequence: sequence.mix.members[0][0].name != "new", max_num_seqs=2
    )
    holding = [clock.ask(each, LONG, b"hog") for each in ("first", "second", "third")]
    clock.step()
    return clock, holding, clock.ask(name, SHORT, b"polite")


def test_the_memory_of_another_tenants_mix_is_taken_after_the_waiting_time() -> None:
    clock, holding, waiting = short_of_memory("new")
    while clock.now - waiting.arrival < AFTER_SECONDS:
        assert taken(clock, waiting) == []
        clock.step()
    # An adapter that just arrived is not taken.
    assert taken(clock, waiting, since=clock.now) == []
    # The memory of a request that does not run costs nothing to take.
    idle = next(s for s in holding if s.state is SequenceState.WAITING)
    assert taken(clock, waiting) == [idle]
    assert len(clock.scheduler.running) == 2
    clock.scheduler.finish(idle)
    (yielding,) = taken(clock, waiting)
    assert yielding in holding
    assert yielding.state is SequenceState.WAITING
    assert clock.scheduler.running == [s for s in holding if s not in (idle, yielding)]


def test_a_long_answer_yields_its_memory_to_a_mix_that_was_served_less() -> None:
    for tenants in ((b"hog", b"polite"), (b"hog", b"hog"), (b"", b"")):
        clock = Clock(is_ready=lambda sequence: sequence.mix.members[0][0].name != "new")
        long, waiting = clock.ask("long", LONG, tenants[0]), clock.ask("new", SHORT, tenants[1])
        clock.step(int(AFTER_SECONDS / STEP_SECONDS) + 1)
        assert taken(clock, waiting) == [long]
        assert long.state is SequenceState.WAITING


def test_memory_is_taken_only_if_that_helps() -> None:
    clock, holding, waiting = short_of_memory("new+first")
    clock.now += AFTER_SECONDS
    for each in holding:
        each.mix.members[0][0].pinned = True
    assert taken(clock, waiting) == []
    # This adapter is a part of the waiting mix.
    holding[0].mix.members[0][0].pinned = False
    assert taken(clock, waiting) == []
    holding[1].mix.members[0][0].pinned = False
    assert taken(clock, waiting) == [holding[1]]


def test_before_a_change_of_the_base_only_requests_that_have_not_begun_yield_memory() -> None:
    clock, (first, second, third), waiting = short_of_memory("new")
    clock.scheduler.is_draining = True
    # The waiting request has not begun either.
    assert taken(clock, waiting) == []
    waiting.num_preemptions = 1
    assert taken(clock, waiting) == [third]
    assert second.state is first.state is SequenceState.RUNNING


@pytest.mark.parametrize("after", [None, AFTER_SECONDS])
def test_no_request_is_preempted_before_a_change_of_the_base(after: float | None) -> None:
    clock = Clock(preempt_after_seconds=after)
    hogs = [clock.ask("hog", LONG) for _ in range(SLOTS)]
    clock.step()
    clock.ask("polite", SHORT)
    clock.scheduler.is_draining = True
    clock.run_until_ended(hogs, 1.1 * LONG * STEP_SECONDS)
    assert clock.num_preempted == 0
    assert clock.scheduler.is_drained


def test_a_step_that_was_not_computed_is_not_charged() -> None:
    """Otherwise, a device without memory would charge a mix repeatedly for the same tokens."""
    scheduler = make_scheduler()
    for name in ("a", "b"):
        for _ in range(2):
            scheduler.add(sequence_of([1] * 9, name))
    lines = scheduler.waiting
    scheduler.complete(scheduler.schedule())
    for sequence in scheduler.running:
        sequence.tokens.append(1)
    groups = {sequence.group for sequence in scheduler.running}
    served = {group: lines.served(group) for group in groups}
    floor = lines._floor()
    for _ in range(3):
        step = scheduler.schedule()
        assert sum(item.num_new for item in step.scheduled) > 0
        scheduler.abandon(step)
        assert {group: lines.served(group) for group in groups} == served
        assert lines._floor() == pytest.approx(floor)


def test_a_long_prompt_of_one_tenant_delays_no_other_tenants_answer() -> None:
    clock = Clock()
    # Reading this prompt alone takes 100 steps.
    long = clock.ask("base", 1, b"greedy", prompt_tokens=6400)
    clock.step()
    short = clock.ask("base", SHORT, b"other")
    clock.run_until_ended([short], (SHORT + 1) * STEP_SECONDS)
    # Two long prompts share each step, so the second takes about twice as long as alone.
    second = clock.ask("base", 1, b"other", prompt_tokens=1600)
    began = clock.now
    clock.run_until_ended([second], 60 * STEP_SECONDS)
    assert clock.now - began > 45 * STEP_SECONDS
    clock.run_until_ended([long], 100 * STEP_SECONDS)
    # No part of a step is wasted while nobody else waits.
    assert clock.now < (100 + SHORT + 26 + 5) * STEP_SECONDS


def test_prompts_are_read_one_after_the_other_without_tenants() -> None:
    clock = Clock()
    first, second = (clock.ask("base", 1, prompt_tokens=640) for _ in range(2))
    clock.run_until_ended([first], 11 * STEP_SECONDS)
    assert second not in clock.started


# Scheduling during a change of the base weights: requests before and after it, and keys.


def test_a_waiting_sequence_starts_with_the_new_base() -> None:
    """The sequence was considered, has some keys, and waits while the base changes."""
    scheduler = make_scheduler()
    hog, late = sequence_of(range(200), "a"), sequence_of(range(100), "b")
    run_alone(scheduler, hog)
    scheduler.add(late)
    scheduler.schedule()
    assert late.state is SequenceState.WAITING
    assert late.keys
    scheduler.is_draining = True
    scheduler.finish(hog)
    assert scheduler.schedule().scheduled == ()
    scheduler.change_base(2)
    scheduler.is_draining = False
    scheduler.complete(scheduler.schedule())
    assert late.keys[0] == root_key(2, late.mix.key)


def test_a_preempted_sequence_ends_before_the_base_changes() -> None:
    scheduler = make_scheduler(5)
    first, second = sequence_of(range(8), "a"), sequence_of(range(8), "b")
    for sequence in (first, second):
        scheduler.add(sequence)
    scheduler.complete(scheduler.schedule())
    for sequence in (first, second):
        sequence.tokens.append(1)
    scheduler.complete(scheduler.schedule())
    assert second.num_preemptions == 1
    scheduler.is_draining = True
    scheduler.finish(first)
    assert (scheduler.running, scheduler.is_drained) == ([], False)
    (item,) = scheduler.schedule().scheduled
    assert item.sequence is second
    scheduler.finish(second)
    assert scheduler.is_drained
