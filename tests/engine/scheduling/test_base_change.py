"""Scheduling during a change of the base weights: requests before and after it, and keys."""

from __future__ import annotations

from builders.sequences import BLOCK_SIZE, make_scheduler, run_alone, sequence_of

from turret.server.engine.scheduling.block_pool import BlockPool, root_key
from turret.server.engine.scheduling.scheduler import Scheduler
from turret.server.engine.scheduling.sequence import SequenceState


def test_a_prefix_is_not_found_after_the_base_changed() -> None:
    scheduler = make_scheduler()
    prompt = list(range(11))
    first = sequence_of(prompt, "a")
    run_alone(scheduler, first)
    scheduler.finish(first)
    scheduler.change_base(2)
    again = sequence_of(prompt, "a")
    scheduler.add(again)
    scheduler.schedule()
    assert again.num_cached == 0


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
    scheduler = Scheduler(BlockPool(5, BLOCK_SIZE), max_num_seqs=8, max_num_batched_tokens=64)
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
