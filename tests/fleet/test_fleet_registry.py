"""Rules of the registry that random histories rarely reach."""

from __future__ import annotations

import dataclasses

import pytest
from builders.facts import facts_of
from fleets.parts import Disk, Replica

from turret.fleet import protocol as m
from turret.fleet.protocol import generations_of
from turret.fleet.registry import FleetRegistry
from turret.server import errors
from turret.server.adapters.adapter import AliasTarget, Source


def register(name: str, digest: str, **fields: object) -> m.Register:
    return m.Register(name=name, source=Source(digest), facts=facts_of(digest), **fields)  # type: ignore[arg-type]


def beat(registry: FleetRegistry, replica: Replica, now: float) -> None:
    """Send a report, take in the answer, and apply all changes."""
    follower, question = replica.follower, replica.follower.next_call()
    if isinstance(question, m.Join):
        follower.joined(registry.join(question, now), now)
    else:
        try:
            follower.take_news(question, registry.report(question, now), now)
        except m.NotJoinedError:
            follower.must_join()
    while (change := follower.next_change()) is not None:
        follower.apply(change)
        follower.done(change)


def fleet(disk: Disk | None = None) -> tuple[FleetRegistry, list[Replica]]:
    registry = FleetRegistry(disk or Disk(), now=0.0)
    replicas = [Replica(f"r{i}", 1.0, stops_alone=True) for i in range(2)]
    for replica in replicas:
        beat(registry, replica, 0.0)
        beat(registry, replica, 0.0)
    return registry, replicas


def test_a_registry_rejects_operations_of_its_previous_incarnation() -> None:
    disk = Disk()
    registry, _ = fleet(disk=disk)
    operation = registry.submit(register("a", "d1"), 1.0)
    other = FleetRegistry(disk, now=1.0, is_first=False)
    other.submit(register("b", "d2"), 1.0)
    with pytest.raises(errors.UnavailableError):
        other.outcome(operation, 1.0)


def test_a_replacement_must_name_the_generation_it_replaces() -> None:
    registry, _ = fleet()
    registry.submit(register("a", "d1"), 1.0)
    with pytest.raises(errors.AdapterExistsError):
        registry.submit(register("a", "d2"), 1.0)
    uuid = registry.state.names["a"].uuid
    registry.submit(register("a", "d2", replaces=(uuid, 1)), 1.0)
    assert registry.state.names["a"].generation == 2
    now = {"adapter": "a", "generation": "2"}
    with pytest.raises(errors.AdapterGenerationError) as refused:
        registry.submit(register("a", "d3", replaces=(uuid, 1)), 1.0)
    assert refused.value.metadata == {**now, "expected": "1"}
    with pytest.raises(errors.AdapterGenerationError) as refused:
        registry.submit(register("a", "d3", replaces=("other", 2)), 1.0)
    assert refused.value.metadata == now


def test_an_unload_waits_for_requests_on_every_replica_until_its_timeout() -> None:
    registry, (first, second) = fleet()
    registry.submit(register("a", "d1"), 1.0)
    for replica in (first, second):
        beat(registry, replica, 1.0)
    saved = second.resolve("a")
    assert saved is not None
    second.requests.append(saved)
    operation = registry.submit(m.Unload(name="a", is_forced=False, timeout_seconds=2.0), 1.0)
    for now in (1.5, 2.0, 2.9):
        for replica in (first, second):
            beat(registry, replica, now)
        assert first.resolve("a") is None, "new requests are refused from the start"
        assert registry.outcome(operation, now) is None
    with pytest.raises(errors.AdapterBusyError) as refused:
        registry.outcome(operation, 3.0)
    assert refused.value.metadata["requests"] == "1"
    beat(registry, first, 3.0)
    assert first.resolve("a") == saved
    forced = registry.submit(m.Unload(name="a", is_forced=True, timeout_seconds=2.0), 3.0)
    for now in (3.1, 3.2, 3.3, 3.4):
        for replica in (first, second):
            beat(registry, replica, now)
    assert registry.outcome(forced, 3.5) is not None
    assert "a" not in first.state.names


def test_a_replica_with_another_base_is_refused() -> None:
    registry, _ = fleet()
    with pytest.raises(AssertionError):
        registry.join(m.Join(replica="x", base_name="other", base_digest="other"), 1.0)


def test_usage_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    registry, (first, _) = fleet()
    used = {"a": m.AdapterUsage(in_flight=1), "b": m.AdapterUsage(residency="host")}
    monkeypatch.setattr(first, "usage", lambda: used)
    beat(registry, first, 1.0)
    question = first.follower.next_call()
    assert isinstance(question, m.Report)
    assert question.usage is None
    beat(registry, first, 1.5)
    assert registry.usage(1.5)["r0"] == used
    # Another run of the registry gets the usage again.
    other = FleetRegistry(Disk(), now=2.0, is_first=False)
    for _ in range(3):
        beat(other, first, 2.0)
    assert other.usage(2.0) == {"r0": used}


def test_a_replica_that_is_far_behind_takes_a_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turret.fleet.registry._LOG_ENTRIES", 2)
    registry, (first, _) = fleet()
    for number in range(3):
        registry.submit(register(f"a{number}", f"d{number}"), 1.0)
    question = first.follower.next_call()
    assert isinstance(question, m.Report)
    with pytest.raises(m.NotJoinedError):
        registry.report(question, 1.0)
    beat(registry, first, 1.0)
    beat(registry, first, 1.0)
    assert first.state == registry.state


def test_a_merge_whose_member_was_changed_by_another_server_is_not_restored() -> None:
    disk = Disk()
    registry, replicas = fleet(disk=disk)
    registry.submit(register("a", "d1"), 1.0)
    saved = registry.state.names["a"]
    member = m.MergeMember(name="a", uuid=saved.uuid, generation=1, weight=1.0)
    registry.submit(m.Merge(members=(member,), precision="BF16", time=1.0), 1.0)
    plan = registry.state.preparing
    assert plan is not None
    for replica in (*replicas, *replicas):
        replica.made[plan.uuid] = None
        beat(registry, replica, 1.0)
    assert disk.base == m.FleetBase(generation=2, merge=plan)
    assert FleetRegistry(disk, now=2.0).state.base == disk.base
    disk.names["a"] = dataclasses.replace(saved, generation=2)
    assert FleetRegistry(disk, now=3.0).state.base == m.FleetBase(generation=3)


def test_reports_of_an_earlier_session_are_ignored() -> None:
    registry, (first, _) = fleet()
    question = first.follower.next_call()
    assert isinstance(question, m.Report)
    registry.submit(register("a", "d1"), 1.0)
    registry.submit(register("b", "d2"), 1.0)
    late = registry.report(question, 1.0)
    first.follower.take_news(question, registry.report(question, 1.0), 1.0)
    change = first.follower.next_change()
    assert change is not None
    # The registry restarts, and numbers its changes from the beginning.
    other = FleetRegistry(Disk(), now=2.0, is_first=False)
    first.follower.must_join()
    first.follower.joined(other.join(first.follower.next_call(), 2.0), 2.0)  # type: ignore[arg-type]
    first.follower.take_news(question, late, 1.0)
    first.follower.done(change)
    report = first.follower.next_call()
    assert isinstance(report, m.Report)
    assert (report.received, report.applied) == (0, -1)


def test_a_name_stays_closed_while_another_unload_waits() -> None:
    registry, (first, _) = fleet()
    registry.submit(register("a", "d1"), 1.0)
    beat(registry, first, 1.0)
    saved = first.resolve("a")
    assert saved is not None
    first.requests.append(saved)
    soon, late = (
        registry.submit(m.Unload(name="a", is_forced=False, timeout_seconds=seconds), 1.0)
        for seconds in (1.0, 3.0)
    )
    beat(registry, first, 2.0)
    with pytest.raises(errors.AdapterBusyError):
        registry.outcome(soon, 2.0)
    assert "a" in registry.state.closed
    with pytest.raises(errors.AdapterBusyError):
        registry.outcome(late, 4.0)
    assert "a" not in registry.state.closed


def test_a_kept_generation_stays_while_it_is_in_the_base() -> None:
    disk = Disk()
    registry, replicas = fleet(disk=disk)

    def submit(proposal: m.Proposal) -> None:
        registry.submit(proposal, 1.0)
        for replica in (*replicas, *replicas):
            plan = registry.state.preparing
            replica.made = {} if plan is None else {plan.uuid: None}
            beat(registry, replica, 1.0)

    submit(register("a", "d1"))
    uuid = registry.state.names["a"].uuid
    target = AliasTarget(name="a", uuid=uuid, generation=1)
    submit(m.SetAlias(name="prod", targets=(target,)))
    for generation in (1, 2):
        submit(register("a", f"d{generation + 1}", replaces=(uuid, generation)))
    gone = m.MergeMember(name="a", uuid=uuid, generation=4, weight=1.0)
    with pytest.raises(errors.AdapterGenerationError):
        submit(m.Merge(members=(gone,), precision="BF16", time=1.0))
    member = dataclasses.replace(gone, generation=1)
    submit(m.Merge(members=(member,), precision="BF16", time=1.0))
    assert disk.base.merge is not None
    assert disk.base.merge.members == (member,)
    # Apart from the base, only the alias keeps the first generation.
    submit(m.DeleteAlias(name="prod"))
    kept = [each.generation for each in generations_of(disk.names["a"])]
    assert kept == [3, 1, 2]
    with pytest.raises(errors.AdapterMergedError):
        submit(m.Rollback(name="a", generation=2, replaces=(uuid, 3)))
    assert FleetRegistry(disk, now=2.0).state.base == disk.base
    submit(m.Unmerge())
    submit(register("a", "d4", replaces=(uuid, 3)))
    assert [each.generation for each in generations_of(disk.names["a"])] == [4, 3]
