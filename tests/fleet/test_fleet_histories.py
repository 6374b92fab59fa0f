"""Random histories of a fleet: crashes at every step, partitions, late and lost messages."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter

import pytest
from fleets.world import World
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from turret.fleet import follower, registry
from turret.fleet.follower import Follower
from turret.fleet.registry import FleetRegistry
from turret.server.adapters.adapter import Alias

NUM_HISTORIES = 300
NUM_ACTIONS = 400


def live_many(count: int) -> None:
    for seed in range(count):
        live(seed)


def live(seed: int, counts: Counter[str] | None = None) -> None:
    """One history, from the first action until everything is repaired."""
    generator = random.Random(seed)
    world = World(generator.randrange, 2 + seed % 2, stops_alone=seed % 4 < 2)
    try:
        for _ in range(NUM_ACTIONS):
            world.act()
        world.finish()
    except AssertionError as error:
        error.add_note(f"seed {seed}")
        raise
    if counts is not None:
        counts.update(world.counts)


def test_a_generation_has_one_set_of_weights_and_no_acknowledged_change_is_lost() -> None:
    counts: Counter[str] = Counter()
    for seed in range(NUM_HISTORIES):
        live(seed, counts)
    # All kinds of events must have happened; otherwise, the histories prove little.
    assert counts.keys() >= {
        *("Register", "Pin", "Unload", "Merge", "Unmerge", "joined", "expelled"),
        *("Rollback", "SetAlias", "DeleteAlias"),
        *("replica crashed", "registry crashed", "crashed at a write"),
        *(
            "AdapterExistsError",
            "AdapterGenerationError",
            "AdapterInUseError",
            "AdapterMergedError",
        ),
        *("AdapterNotFoundError", "AdapterPinnedError", "MergeUnderWayError", "NotMergedError"),
        *("StorageFullError", "Unload: AdapterBusyError", "Unload: AdapterInUseError"),
        *("Merge: InvalidRequestError", "Merge: UnavailableError"),
    }, counts


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(
    script=st.lists(st.integers(0, 2**16), max_size=300),
    num_replicas=st.sampled_from([2, 3]),
    stops_alone=st.booleans(),
)
def test_every_interleaving_keeps_the_guarantees(
    script: list[int], num_replicas: int, stops_alone: bool
) -> None:
    rest = iter(script)
    is_over = False

    def draw(below: int) -> int:
        nonlocal is_over
        number = next(rest, None)
        is_over = number is None
        return (number or 0) % below

    world = World(draw, num_replicas, stops_alone)
    while not is_over:
        world.act()
    world.finish()


# The histories find each of these planted mistakes.


def _acknowledge_at_once(self: FleetRegistry, revision: int, now: float) -> bool:
    return True


def _do_not_wait_for_old_leases(self: FleetRegistry, revision: int, now: float) -> bool:
    return all(r.report.applied >= revision for r in self._living.values())


def _forget_who_holds(self: FleetRegistry, uuid: str) -> int:
    return 0


def _say_it_is_applied(self: Follower, change: follower.Change) -> None:
    self._applied = self._received


def _drop_all_generations(self: FleetRegistry, alias: Alias) -> None:
    for target in alias.targets:
        before = self.state.names[target.name]
        self._change(before, dataclasses.replace(before, kept=()))


@pytest.mark.long
@pytest.mark.parametrize(
    ("where", "name", "mistake"),
    [
        (FleetRegistry, "_is_applied", _acknowledge_at_once),
        (FleetRegistry, "_is_applied", _do_not_wait_for_old_leases),
        (FleetRegistry, "_held", _forget_who_holds),
        (FleetRegistry, "_is_held", lambda self, key: False),
        (Follower, "done", _say_it_is_applied),
        (registry, "CLOCK_SLACK", 0.5),
        (registry, "_check_same", lambda saved, expected: None),
        (FleetRegistry, "_check_not_needed", lambda self, saved: None),
        (registry, "kept_generations", lambda name, current, replaced, keep, aliases: ()),
        (registry, "check_no_target", lambda name, aliases: None),
        (FleetRegistry, "_drop_surplus", _drop_all_generations),
    ],
)
def test_planted_mistakes_are_found(
    where: object, name: str, mistake: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, name, mistake)
    with pytest.raises(AssertionError):
        live_many(8 * NUM_HISTORIES)
