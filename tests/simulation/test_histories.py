"""Hundreds of random histories of one server on a simulated clock: its guarantees hold in each."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest
from simulation.parts import Clock
from simulation.world import World

from turret.server.adapters import leases, name_table, registry
from turret.server.adapters.adapter import HostResult
from turret.server.engine import loop
from turret.server.engine.loop import EngineLoop
from turret.server.engine.scheduling.scheduler import Drafts, Scheduler
from turret.server.engine.scheduling.sequence import HeldBlocks, Scheduled, Sequence

NUM_ACTIONS = 50


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (loop, leases, name_table, registry):
        monkeypatch.setattr(module, "time", clock)
    return clock


def live(seed: int, clock: Clock) -> World:
    """One history, from the first action to the last answer."""
    world = World(seed, clock)
    try:
        for _ in range(NUM_ACTIONS):
            world.act()
        world.finish()
    except BaseException as error:
        error.add_note(f"seed {seed}")
        raise
    return world


def _live_many(count: int, clock: Clock) -> None:
    for seed in range(count):
        live(seed, clock)


@pytest.mark.parametrize("num_histories", [500, pytest.param(20_000, marks=pytest.mark.long)])
def test_every_history_keeps_the_guarantees(clock: Clock, num_histories: int) -> None:
    endings: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    start = time.monotonic()
    for seed in range(num_histories):
        world = live(seed, clock)
        endings.update(world.ended.values())
        counts.update(world.counts)
        counts["full"] += world.runner.num_full
        counts["accepted"] += world.runner.num_accepted
        counts["preempted"] += sum(a.sequence.num_preemptions for a in world.requests)
    print(f"\n{dict(endings)} {dict(counts)} in {time.monotonic() - start:.1f} s")
    # All kinds of events must have happened; otherwise, the histories prove little.
    assert endings.keys() >= {
        *("LENGTH", "STOP", "CANCELLED", "DEADLINE", "AdapterUnloadedError"),
        *("AdapterCheckpointError", "BudgetExceededError"),
    }
    assert counts.keys() >= {
        *("loaded", "replaced", "unloaded", "kept", "pinned", "merged", "blocked"),
        *("full", "preempted", "accepted", "handed over"),
    }


def test_a_seed_determines_a_history(clock: Clock) -> None:
    first, second = (live(7, clock) for _ in range(2))
    assert list(first.ended.values()) == list(second.ended.values())
    assert first.counts == second.counts


def _keep_blocks(self: HeldBlocks, sequence: Sequence) -> None:
    for each in sequence.passes:
        each.blocks, each.num_computed = [], 0


def _accept_all(self: Scheduler, item: Scheduled, count: int) -> None:
    """Plant a fault: use the keys and values of a whole draft for the drawn tokens."""
    self._held.computed(item.sequence, min(len(item.draft), count + 1))
    self._drafts.accepted(item.sequence, count)


def _trust(self: EngineLoop, sequence: Sequence, result: HostResult) -> None:
    """Plant a fault: start a request without checking again that its adapters are resident."""
    answer = self._answers.get(sequence)
    if answer is not None and result.error is None:
        self._make_ready(answer)
    elif answer is not None and result.error is not None:
        self._fail(answer, result.error)


@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        (HeldBlocks, "free", _keep_blocks),
        (Scheduler, "_make_room", lambda self, now: 0),
        (Scheduler, "accept", _accept_all),
        (Drafts, "take_back", lambda self, sequence: None),
        (EngineLoop, "_loaded", _trust),
        # Tokens are lost if answers are cut before they are handed out.
        (EngineLoop, "_hand_out", lambda self: None),
        (leases.Leases, "close_lease", lambda self, mix: None),
        (leases.Leases, "change_base", lambda self, generation: frozenset()),
    ],
)
def test_a_fault_is_detected_within_few_histories(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, broken: Any
) -> None:
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises(AssertionError):
        _live_many(200, clock)
