"""Adapters in host memory: eviction, cold reads, pins, metrics."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from builders.registries import (
    NAMES,
    WAIT_SECONDS,
    Gate,
    Registries,
    Waiter,
    adapter_bytes,
    in_thread,
    refs,
    resident,
)
from said import says

from turret.server.adapters import installer, leases
from turret.server.adapters.adapter import AdapterRef, HostResult, Source
from turret.server.adapters.loader import LoadedAdapter
from turret.server.errors import (
    AdapterChangedError,
    AdapterCheckpointError,
    AdapterInUseError,
    BudgetExceededError,
    OutOfMemoryError,
    UnavailableError,
)
from turret.server.metrics import Metrics

# Residency


def test_the_least_recently_used_is_evicted(make: Registries) -> None:
    registry = make(2.5, load="ab")
    registry.release(registry.acquire(refs("a")))
    registry.load("c", "c")
    assert resident(registry) == "ac"
    assert registry.host_bytes_used == 2 * adapter_bytes()
    assert registry.get("b").bytes_host == 0


def test_a_mix_does_not_evict_its_own_members(make: Registries) -> None:
    registry = make(2, load="bac")
    assert resident(registry) == "ac"
    assert Waiter(registry.acquire(refs("ab"))).wait().error is None
    assert resident(registry) == "ab"
    assert registry.host_bytes_used == 2 * adapter_bytes()


def test_an_adapter_being_read_is_not_evicted(make: Registries) -> None:
    registry = make(1, load="ab")
    gate = Gate(registry)
    abandoned = Waiter(registry.acquire(refs("a")))
    gate.entered.acquire()
    registry.release(abandoned.mix)
    waiting = Waiter(registry.acquire(refs("b")))
    assert registry.host_bytes_used == adapter_bytes()
    gate.open()
    assert waiting.wait().error is None
    assert resident(registry) == "b"
    assert registry.host_bytes_used == adapter_bytes()


def test_adapters_in_flight_are_not_evicted(make: Registries) -> None:
    registry = make(2, load="ab")
    mix = registry.acquire(refs("a"))
    registry.load("c", "c")
    registry.load("d", "d")
    assert mix.members[0][0].operators is not None
    other = registry.acquire(refs("b"))
    assert Waiter(other).wait().error is None
    assert resident(registry) == "ab"
    # Both places are taken, so a new adapter is registered but stays on disk.
    registry.load("big2", "c")
    assert resident(registry) == "ab"


def test_changed_files_fail_the_request_and_no_other(make: Registries) -> None:
    registry = make(2, load="abc")
    shutil.move(make.root / "a", make.root / "original")
    shutil.copytree(make.root / "d", make.root / "a")
    other = registry.acquire(refs("b"))
    waiter = Waiter(registry.acquire(refs("a")))
    error = waiter.wait().error
    assert isinstance(error, AdapterChangedError)
    assert says("FILES_CHANGED", adapter="a", path="a")(error)
    assert other.members[0][0].operators is not None
    registry.release(waiter.mix)
    shutil.rmtree(make.root / "a")
    missing = Waiter(registry.acquire(refs("a")))
    error = missing.wait().error
    assert isinstance(error, AdapterChangedError)
    assert says("FILES_LOST", adapter="a", path="a")(error)
    assert str(make.root) not in str(error)
    assert not error.violations
    registry.release(missing.mix)
    shutil.move(make.root / "original", make.root / "a")
    again = Waiter(registry.acquire(refs("a")))
    assert again.wait().error is None


def test_an_unexpected_failure_of_a_read_is_reported(
    make: Registries, caplog: pytest.LogCaptureFixture
) -> None:
    registry = make(1, load="ab")

    def explode(name: str, source: Source, digest: str) -> LoadedAdapter:
        raise MemoryError(source.path)

    registry._leases._reload = explode
    error = Waiter(registry.acquire(refs("a"))).wait().error
    assert type(error) is OutOfMemoryError
    assert "MemoryError" in caplog.text
    assert registry.host_bytes_used == 0


def test_two_mixes_do_not_deadlock(make: Registries) -> None:
    registry = make(2, load="abcd")
    gate = Gate(registry)
    gate.open()
    first = Waiter(registry.acquire(refs("ab")))
    second = Waiter(registry.acquire(refs("cd")))
    third = Waiter(registry.acquire(refs("bc")))
    for waiter in (first, second, third):
        if not waiter.was_resident:
            assert waiter.wait().error is None
        assert all(adapter.operators is not None for adapter, _ in waiter.mix.members)
        registry.release(waiter.mix)


def test_a_mix_that_can_never_fit_is_refused_at_once(make: Registries) -> None:
    registry = make(2, load="abc")
    mix = registry.acquire(refs("abc"))
    with pytest.raises(BudgetExceededError):
        Waiter(mix)
    registry.release(mix)


def test_popular_adapters_do_not_starve_a_cold_one(
    make: Registries, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = make(1, load="ab")
    now = 100.0
    monkeypatch.setattr(leases.time, "monotonic", lambda: now)
    running = registry.acquire(refs("b"))
    cold = Waiter(registry.acquire(refs("a")))
    # Requests for resident adapters may overtake for a second; then they queue behind.
    overtaking = registry.acquire(refs("b"))
    assert Waiter(overtaking).was_resident
    now += leases.PATIENCE_SECONDS + 0.1
    late = Waiter(registry.acquire(refs("b")))
    assert not late.was_resident
    registry.release(running)
    assert not cold.is_answered
    registry.release(overtaking)
    assert cold.wait().error is None
    assert not late.is_answered
    registry.release(cold.mix)
    assert late.wait().error is None


def test_tenants_get_memory_in_turn(make: Registries) -> None:
    registry = make(1, load="abcd")
    first = registry.acquire(refs("d"))
    # The first tenant waits for many adapters before the second one asks for its own.
    waiting = [Waiter(registry.acquire(refs(name), b"greedy")) for name in "aba"]
    other = Waiter(registry.acquire(refs("c"), b"other"))
    last = Waiter(registry.acquire(refs("b"), b"other"))
    registry.release(first)
    for waiter in (waiting[0], other, waiting[1], last, waiting[2]):
        assert waiter.wait().error is None
        registry.release(waiter.mix)


def test_memory_is_handed_over_to_a_mix_that_is_not_the_first_in_line(make: Registries) -> None:
    registry = make(2, load="abcd")
    holding = Waiter(registry.acquire(refs("cd")))
    first = Waiter(registry.acquire(refs("ad")))
    second = Waiter(registry.acquire(refs("b")))
    assert registry.wanting() == {first.mix, second.mix}
    registry.hand_over([holding.mix], second.mix)
    assert second.wait().error is None
    # The mix that yielded waits again, behind the others.
    again = Waiter(holding.mix)
    assert registry.wanting() == {first.mix, holding.mix}
    # Handing over to a mix that no longer waits takes nothing.
    registry.hand_over([second.mix], second.mix)
    assert second.mix.is_resident
    for waiter in (second, first, again):
        assert waiter.wait().error is None
        assert waiter.mix.is_resident
        registry.release(waiter.mix)
    assert registry.wanting() == set()


def test_a_released_mix_is_never_called_back(make: Registries) -> None:
    registry = make(1, load="ab")
    gate = Gate(registry)
    loading = Waiter(registry.acquire(refs("a")))
    queued = Waiter(registry.acquire(refs("b")))
    gate.entered.acquire()
    registry.release(queued.mix)
    registry.release(loading.mix)
    gate.open()
    registry.close()
    assert not loading.is_answered
    assert not queued.is_answered


def test_a_failing_callback_does_not_affect_others(
    make: Registries, caplog: pytest.LogCaptureFixture
) -> None:
    registry = make(1, load="ab")
    gate = Gate(registry)

    def explode(result: HostResult) -> None:
        raise RuntimeError("callback")

    assert not registry.acquire(refs("a")).ensure_host(explode)
    waiter = Waiter(registry.acquire(refs("a")))
    gate.open()
    assert waiter.wait().error is None
    assert "an adapter callback failed" in caplog.text


def test_close_fails_every_waiting_request(make: Registries) -> None:
    registry = make(1, load="ab")
    gate = Gate(registry)
    loading = Waiter(registry.acquire(refs("a")))
    queued = Waiter(registry.acquire(refs("b")))
    gate.entered.acquire()
    thread, _ = in_thread(registry.close)
    assert isinstance(loading.wait().error, UnavailableError)
    assert isinstance(queued.wait().error, UnavailableError)
    gate.open()
    thread.join(WAIT_SECONDS)
    assert not thread.is_alive()


def test_close_frees_the_memory_of_pending_reads(make: Registries) -> None:
    registry = make(2, load="abcd")
    size = registry.host_bytes_used // 2
    registry._leases._executor = ThreadPoolExecutor(1)
    gate = Gate(registry)
    waiters = [Waiter(registry.acquire(refs(name))) for name in "ab"]
    gate.entered.acquire()
    registry.release(waiters[1].mix)
    registry.unload("b", "DRAIN", 0.0)
    assert registry.host_bytes_used == 2 * size
    thread, _ = in_thread(registry.close)
    assert isinstance(waiters[0].wait().error, UnavailableError)
    gate.open()
    thread.join(WAIT_SECONDS)
    assert registry.host_bytes_used == size


# Pinning


def test_pinned_adapters_stay(make: Registries) -> None:
    registry = make(2)
    assert registry.load("a", "a", pinned=True).pinned
    for name in "bcd":
        registry.load(name, name)
    assert resident(registry) == "ad"
    with pytest.raises(AdapterInUseError, check=says("ADAPTER_PINNED")):
        registry.unload("a", "FORCE")
    assert not registry.unpin("a").pinned
    registry.unload("a")
    assert resident(registry) == "d"


def test_pin_reads_a_cold_adapter(make: Registries) -> None:
    registry = make(1, load="ab")
    record = registry.pin("a")
    assert (record.pinned, record.residency) == (True, "host")
    assert registry.pin("a").pinned
    assert registry.get("a").in_flight == 0


def test_pins_that_leave_no_room_are_refused(
    make: Registries, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = make(1, load="ab")
    registry.pin("b")
    with pytest.raises(BudgetExceededError):
        registry.pin("a")
    with pytest.raises(BudgetExceededError):
        registry.load("c", "c", pinned=True)
    assert [record.name for record in registry.list()] == ["a", "b"]
    mix = registry.acquire(refs("a"))
    with pytest.raises(BudgetExceededError):
        Waiter(mix)
    registry.release(mix)
    registry.unpin("b")
    busy = registry.acquire(refs("b"))
    monkeypatch.setattr(installer, "PIN_TIMEOUT_SECONDS", 0.05)
    with pytest.raises(BudgetExceededError, check=says("NO_ROOM_TO_PIN")):
        registry.pin("a")
    registry.release(busy)
    assert registry.pin("a").pinned


def test_a_pin_that_takes_the_last_memory_fails_waiting_requests(make: Registries) -> None:
    registry = make(1, load="ab")
    running = registry.acquire(refs("b"))
    waiting = Waiter(registry.acquire(refs("a")))
    registry.pin("b")
    assert isinstance(waiting.wait().error, BudgetExceededError)
    registry.release(running)


# Metrics and load


def test_residency_updates_the_servers_metrics(make: Registries) -> None:
    metrics = Metrics()
    registry = make(2, load="ab", metrics=metrics)

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(name, labels)

    assert value("turret_adapter_bytes", tier="host") == 2 * adapter_bytes()
    assert value("turret_adapter_residency", adapter="a", tier="host") == 1
    registry.load("c", "c")
    assert value("turret_adapter_residency", adapter="a", tier="disk") == 1
    assert value("turret_adapter_evictions_total", tier="host", reason="budget") == 1
    mix = registry.acquire(refs("a"))
    Waiter(mix).wait()
    registry.release(mix)
    assert value("turret_adapter_loads_total", result="ok") == 4
    assert value("turret_adapter_load_seconds_count", stage="read") == 4
    with pytest.raises(AdapterCheckpointError):
        registry.load("x", "nowhere")
    assert value("turret_adapter_loads_total", result="error") == 1
    for name in "abc":
        registry.unload(name)
    assert value("turret_adapter_bytes", tier="host") == 0
    assert value("turret_adapter_residency", adapter="a", tier="host") is None


def test_many_threads_lose_no_request_and_leak_no_byte(make: Registries) -> None:
    registry = make(2.5, load="abcd")
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        choice = torch.Generator().manual_seed(seed)
        try:
            for _ in range(25):
                picked = torch.randperm(4, generator=choice)[: 1 + seed % 2].tolist()
                mix = registry.acquire([AdapterRef(name=NAMES[i]) for i in picked])
                waiter = Waiter(mix)
                if not waiter.was_resident:
                    assert waiter.wait().error is None
                assert all(adapter.operators is not None for adapter, _ in mix.members)
                registry.release(mix)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert [record.in_flight for record in registry.list()] == [0] * 4
    for name in NAMES:
        registry.unload(name, "DRAIN", 0.0)
    assert registry.host_bytes_used == 0
