"""Sequences with a first pass: blocks of both passes are allocated, freed and found together."""

from __future__ import annotations

import random

import pytest
from builders.facts import adapter_of
from builders.sequences import BLOCK_SIZE, make_scheduler, sequence_of
from said import says

from turret.server.adapters.adapter import Adapter, Mix
from turret.server.engine.scheduling.scheduler import Scheduler, add_first_pass
from turret.server.engine.scheduling.sequence import Sequence, SequenceState
from turret.server.errors import InvalidRequestError

ROUTED = adapter_of("routed", first_pass="base")
CONSTANT = adapter_of("constant", first_pass="adapter")
PLAIN = adapter_of("plain")


def ask(
    prompt: list[int], *adapters: Adapter, max_tokens: int = 1, num_virtual: int = 0
) -> Sequence:
    mix = Mix(tuple((adapter, 1.0) for adapter in adapters))
    sequence = sequence_of(prompt, max_tokens=max_tokens, preset=num_virtual, mix=mix)
    add_first_pass(sequence)
    return sequence


def finish_all(scheduler: Scheduler, num_generated: int = 1) -> int:
    """Run all sequences to their end; returns the number of preemptions."""
    preempted = 0
    while scheduler.has_work:
        step = scheduler.schedule()
        preempted += step.num_preempted
        for item in step.scheduled:
            for each in item.sequence.passes:
                # The sequence has its own blocks for the computed tokens.
                assert len(each.blocks) * BLOCK_SIZE >= each.num_computed + item.num_new
                assert each.num_computed == item.sequence.num_computed
        held = [b for s in scheduler.running for each in s.passes for b in set(each.blocks)]
        assert len(set(held)) <= scheduler.blocks.num_active
        drawn = [item.sequence for item in step.scheduled if item.samples]
        scheduler.complete(step)
        for sequence in drawn:
            sequence.tokens.append(7)
            if sequence.num_generated >= num_generated:
                scheduler.finish(sequence)
    assert scheduler.blocks.num_active == 0
    return preempted


def run(scheduler: Scheduler, sequence: Sequence) -> Sequence:
    scheduler.add(sequence)
    finish_all(scheduler)
    assert sequence.state is SequenceState.FINISHED
    return sequence


def make(num_blocks: int = 64) -> Scheduler:
    return make_scheduler(num_blocks, max_num_seqs=4, max_num_batched_tokens=16)


def test_a_first_pass_has_the_tokens_of_its_sequence() -> None:
    sequence = ask([1, 2, 3], ROUTED, PLAIN)
    assert sequence.first_pass is not None
    assert sequence.first_pass.mix.key == ()
    sequence.tokens.append(4)
    assert sequence.first_pass.tokens == [1, 2, 3, 4]
    first_pass = ask([1], CONSTANT).first_pass
    assert first_pass is not None
    assert first_pass.mix.key == (("constant", 1, 1.0),)
    assert ask([1], PLAIN).first_pass is None


def test_a_mix_allows_one_first_pass_and_no_prefix_with_it() -> None:
    with pytest.raises(InvalidRequestError, check=says("SEVERAL_FIRST_PASSES")):
        ask([1], ROUTED, CONSTANT)
    with pytest.raises(InvalidRequestError, check=says("FIRST_PASS_WITH_PREFIX")):
        ask([1], ROUTED, PLAIN, num_virtual=2)


def test_a_first_pass_on_the_base_shares_the_cache_of_the_base() -> None:
    text = list(range(20))
    scheduler = make()
    assert run(scheduler, ask(text, ROUTED)).num_cached == 0
    assert run(scheduler, ask([*text, 1])).num_cached == 20
    # Blocks are found as far as both passes have them.
    assert run(scheduler, ask([*text, 1], ROUTED)).num_cached == 20
    assert run(scheduler, ask([*text, 1], CONSTANT)).num_cached == 0
    assert run(scheduler, ask([*text, 1], CONSTANT)).num_cached == 20
    scheduler = make()
    run(scheduler, ask(text))
    assert run(scheduler, ask(text, ROUTED)).num_cached == 0
    scheduler.change_base(2)
    assert run(scheduler, ask(text, ROUTED)).num_cached == 0


def test_a_first_pass_with_constant_scalings_shares_no_block_with_the_adapter() -> None:
    sequence = ask(list(range(8)), CONSTANT)
    run(make(), sequence)
    assert sequence.first_pass is not None
    assert set(sequence.keys).isdisjoint(sequence.first_pass.keys)


@pytest.mark.parametrize("seed", range(8))
def test_no_block_leaks_when_the_cache_is_small(seed: int) -> None:
    draw = random.Random(seed)
    scheduler = make(num_blocks=15)
    for _ in range(12):
        adapters = draw.choice([(), (ROUTED,), (CONSTANT, PLAIN), (PLAIN,)])
        text = [draw.randrange(2)] * draw.randrange(1, 14)
        scheduler.add(ask(text, *adapters, max_tokens=9))
    finish_all(scheduler, num_generated=9)
    assert scheduler.blocks.num_free == 14


def test_sequences_with_a_first_pass_are_preempted_and_come_back() -> None:
    scheduler = make(num_blocks=15)
    sequences = [ask([n] * 9, ROUTED, max_tokens=12) for n in range(3)]
    for sequence in sequences:
        scheduler.add(sequence)
    assert finish_all(scheduler, num_generated=12) > 0
    assert all(sequence.num_generated == 12 for sequence in sequences)
