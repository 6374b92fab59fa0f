"""New generations: the requests that use them, the end of old ones, and failures."""

from __future__ import annotations

import dataclasses
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from builders.registries import (
    WAIT_SECONDS,
    Gate,
    Registries,
    Waiter,
    adapter_bytes,
    in_thread,
    refs,
    resident,
    until,
)
from said import says

from turret.server.adapters import installer
from turret.server.adapters.adapter import AdapterRef
from turret.server.errors import (
    AdapterCheckpointError,
    AdapterGenerationError,
    AdapterInUseError,
    AdapterNotFoundError,
    BudgetExceededError,
    InvalidRequestError,
)
from turret.server.metrics import Metrics


def test_later_requests_get_the_new_generation_and_running_ones_keep_theirs(
    make: Registries,
) -> None:
    registry = make(load="a")
    before = registry.get("a")
    gone: list[str] = []
    registry.on_unloaded = gone.append
    running = registry.acquire(refs("a"))
    after = registry.replace("a", "b")
    assert (after.uuid, after.generation) == (before.uuid, 2)
    assert after.facts.digest == make(load="b").get("b").facts.digest
    later = registry.acquire(refs("a"))
    assert running.key == ((before.uuid, 1, 1.0),)
    assert later.key == ((before.uuid, 2, 1.0),)
    assert running.members[0][0].operators is not None
    assert registry.get("a").in_flight == 2
    assert registry.host_bytes_used == 2 * adapter_bytes()
    assert gone == []
    registry.release(running)
    assert gone == [f"{before.uuid}.1"]
    assert registry.host_bytes_used == adapter_bytes()
    registry.release(later)
    assert gone == [f"{before.uuid}.1"]
    assert registry.get("a").in_flight == 0


def test_the_same_content_creates_no_generation(make: Registries) -> None:
    registry = make(load="a")
    before = registry.get("a")
    shutil.copytree(make.root / "a", make.root / "copy")
    assert registry.replace("a", "copy") == dataclasses.replace(before, source="copy")
    shutil.rmtree(make.root / "a")
    registry._leases._memory.leave(registry._table.find("a").current)
    assert Waiter(registry.acquire(refs("a"))).wait().error is None


def test_an_older_generation_is_not_found(make: Registries) -> None:
    registry = make(load="a")
    running = registry.acquire(refs("a"))
    registry.replace("a", "b")
    with pytest.raises(AdapterNotFoundError, check=says("OTHER_GENERATION", generation=1)):
        registry.acquire([AdapterRef(name="a", generation=1)])
    registry.release(registry.acquire([AdapterRef(name="a", generation=2)]))
    registry.release(running)


def test_replacements_that_are_rejected(make: Registries) -> None:
    registry = make(1.5, load="a")
    before = registry.get("a")
    with pytest.raises(AdapterNotFoundError):
        registry.replace("nobody", "b")
    with pytest.raises(InvalidRequestError):
        registry.replace("a+", "b")
    with pytest.raises(AdapterCheckpointError):
        registry.replace("a", "nowhere")
    with pytest.raises(BudgetExceededError):
        registry.replace("a", "big")
    assert registry.get("a") == before
    assert resident(registry) == "a"
    mix = registry.acquire(refs("a"))
    thread, _ = in_thread(lambda: registry.unload("a", "DRAIN", WAIT_SECONDS))
    until(lambda: registry.get("a").state == "DELETING")
    with pytest.raises(AdapterInUseError, check=says("BEING_UNLOADED")):
        registry.replace("a", "b")
    registry.release(mix)
    thread.join(WAIT_SECONDS)


def test_only_one_of_two_replacements_of_the_same_generation_succeeds(make: Registries) -> None:
    registry = make(3, load="a")
    with ThreadPoolExecutor(4) as pool:
        tries = [pool.submit(registry.replace, "a", path, 1) for path in ("b", "c")]
    failures = [done.exception() for done in tries]
    assert [type(failure) for failure in failures if failure] == [AdapterGenerationError]
    assert registry.get("a").generation == 2
    for refused in (
        lambda: registry.replace("a", "b", 1),
        lambda: registry.unload("a", expected_generation=3),
    ):
        with pytest.raises(AdapterGenerationError, check=says("ADAPTER_GENERATION", generation=2)):
            refused()
    with pytest.raises(AdapterNotFoundError):
        registry.replace("nobody", "b", 1)
    # A rejection changes nothing: the adapter is still served.
    registry.release(registry.acquire(refs("a")))
    registry.unload("a", expected_generation=2)
    assert not list(registry.list())


def test_without_room_the_new_generation_waits_on_disk(make: Registries) -> None:
    registry = make(1, load="a")
    running = registry.acquire(refs("a"))
    assert registry.replace("a", "b").residency == "disk"
    later = Waiter(registry.acquire(refs("a")))
    assert not later.is_answered
    assert running.members[0][0].operators is not None
    registry.release(running)
    assert later.wait().error is None
    assert registry.host_bytes_used == adapter_bytes()


def test_a_replacement_during_a_read_discards_the_result(make: Registries) -> None:
    registry = make(1, load="ab")
    gate = Gate(registry)
    waiting = Waiter(registry.acquire(refs("a")))
    gate.entered.acquire()
    registry.replace("a", "c")
    registry.release(waiting.mix)
    gate.open()
    registry.close()
    assert registry.host_bytes_used == 0


def test_a_pin_moves_to_the_new_generation(make: Registries) -> None:
    registry = make(2.5)
    registry.load("a", "a", pinned=True)
    assert registry.replace("a", "b").pinned
    assert registry.host_bytes_used == adapter_bytes()
    for name in "bcd":
        registry.load(name, name)
    assert "a" in resident(registry)
    with pytest.raises(AdapterInUseError, check=says("ADAPTER_PINNED")):
        registry.unload("a")
    registry.unpin("a")
    registry.unload("a")


def test_a_replaced_generation_is_no_longer_pinned(make: Registries) -> None:
    registry = make(2.2)
    registry.load("a", "a", pinned=True)
    registry.load("c", "c")
    running = registry.acquire(refs("a"))
    registry.replace("a", "b")
    # The adapter fits as soon as the running request ends, so the request waits instead of failing.
    waiting = Waiter(registry.acquire(refs("c")))
    assert not waiting.is_answered
    registry.release(running)
    assert waiting.wait().error is None


def test_a_pinned_adapter_is_not_replaced_without_room_for_both_generations(
    make: Registries, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = make(1.5)
    before = registry.load("a", "a", pinned=True)
    with pytest.raises(BudgetExceededError):
        registry.replace("a", "b")
    assert registry.get("a") == before
    registry.unpin("a")
    registry.load("c", "c", pinned=True)
    registry.unpin("c")
    assert registry.host_bytes_used == adapter_bytes()


def test_unload_waits_for_every_generation(make: Registries) -> None:
    registry = make(load="a")
    mixes = []
    for path in "bcd":
        mixes.append(registry.acquire(refs("a")))
        registry.replace("a", path)
    with pytest.raises(AdapterInUseError, check=says("ADAPTER_HELD", requests=3)):
        registry.unload("a", "DRAIN", 0.0)
    for mix in mixes:
        registry.release(mix)
    assert registry.host_bytes_used == adapter_bytes()
    registry.unload("a", "DRAIN", 0.0)
    assert registry.host_bytes_used == 0


def test_a_forced_unload_ends_the_requests_of_every_generation(make: Registries) -> None:
    registry = make(load="a")
    mixes = [registry.acquire(refs("a"))]
    registry.replace("a", "b")
    mixes.append(registry.acquire(refs("a")))

    def end(uuid: str) -> None:
        for mix in mixes:
            assert mix.key[0][0] == uuid
            registry.release(mix)

    registry.on_force_unload.append(end)
    registry.unload("a", "FORCE", WAIT_SECONDS)
    assert registry.host_bytes_used == 0


def test_metrics_follow_the_name(make: Registries) -> None:
    metrics = Metrics()
    registry = make(3, load="a", metrics=metrics)

    def tier(name: str) -> float | None:
        return metrics.registry.get_sample_value(
            "turret_adapter_residency", {"adapter": "a", "tier": name}
        )

    running = registry.acquire(refs("a"))
    registry.replace("a", "b")
    registry.release(running)
    assert tier("host") == 1
    evicted = metrics.registry.get_sample_value(
        "turret_adapter_evictions_total", {"tier": "host", "reason": "replace"}
    )
    assert evicted == 1
    registry.unload("a")
    assert tier("host") is None


def test_a_pin_that_times_out_leaves_nothing_behind(
    make: Registries, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installer, "PIN_TIMEOUT_SECONDS", 0.05)
    registry = make(2, load="ab")
    busy = registry.acquire(refs("ab"))
    with pytest.raises(BudgetExceededError, check=says("NO_ROOM_TO_PIN")):
        registry.load("c", "c", pinned=True)
    assert [record.name for record in registry.list()] == ["a", "b"]
    registry.release(busy)
    assert registry.load("c", "c", pinned=True).pinned
