"""Names to adapters: load, resolve, unload."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

import pytest
from builders.adapters import edit_tensors
from builders.registries import (
    WAIT_SECONDS,
    Gate,
    Registries,
    Waiter,
    adapter_bytes,
    in_thread,
    refs,
    until,
)
from said import says

from turret.server.adapters import name_table
from turret.server.adapters.adapter import BASE_MIX, AdapterRef
from turret.server.adapters.checkpoint import AdapterCheckpoint
from turret.server.adapters.loader import LoadedAdapter
from turret.server.basics.names import closest
from turret.server.errors import (
    AdapterCheckpointError,
    AdapterExistsError,
    AdapterInUseError,
    AdapterNotFoundError,
    BudgetExceededError,
    InvalidRequestError,
)

# Loading


def test_a_record_describes_what_was_loaded(make: Registries) -> None:
    record = make().load("sql-1.0_x", "a")
    assert (record.name, record.generation, record.facts.method) == ("sql-1.0_x", 1, "lora")
    assert record.facts.ranks == (4,)
    assert record.facts.target_modules == ("q_proj", "v_proj")
    assert record.bytes_host == adapter_bytes()
    assert record.facts.bytes_disk == sum(
        (make.root / "a" / f).stat().st_size
        for f in ("adapter_config.json", "adapter_model.safetensors")
    )
    assert (record.residency, record.state, record.pinned) == ("host", "ACTIVE", False)
    assert (record.in_flight, record.last_used_time) == (0, None)


@pytest.mark.parametrize("name", ["", "-a", "a-", "/a", "a/", "a+b", "a b", "ä", "x" * 129, "a\n"])
def test_malformed_names_are_refused(make: Registries, name: str) -> None:
    with pytest.raises(InvalidRequestError):
        make().load(name, "a")


@pytest.mark.parametrize("name", ["a", "A", "0", "a.b_c-d", "Org/a/b", "x" * 128])
def test_the_longest_and_shortest_names_are_accepted(make: Registries, name: str) -> None:
    assert make().load(name, "a").name == name


def test_the_same_content_is_idempotent_and_other_content_is_not(make: Registries) -> None:
    registry = make()
    first = registry.load("x", "a")
    shutil.copytree(make.root / "a", make.root / "copy")
    assert registry.load("x", "copy").uuid == first.uuid
    with pytest.raises(AdapterExistsError):
        registry.load("x", "b")
    assert registry.get("x").facts.digest == first.facts.digest
    # The adapter is reloaded from the newest path with the same content.
    shutil.rmtree(make.root / "a")
    registry._leases._memory.leave(registry._table.find("x").current)
    assert Waiter(registry.acquire(refs("x"))).wait().error is None


def test_concurrent_loads_of_a_name_register_once(make: Registries) -> None:
    registry = make()
    lower = registry._loader.lower
    lowered: list[str] = []

    def slow_lower(checkpoint: AdapterCheckpoint) -> LoadedAdapter:
        lowered.append(checkpoint.path)
        time.sleep(0.05)  # long enough for the others to arrive
        return lower(checkpoint)

    registry._loader.lower = slow_lower
    with ThreadPoolExecutor(8) as pool:
        records = list(pool.map(lambda _: registry.load("x", "a"), range(16)))
    assert lowered == ["a"]
    assert len({record.uuid for record in records}) == 1
    assert len(registry.list()) == 1


def test_a_failed_load_leaves_nothing(make: Registries) -> None:
    registry = make()
    edit_tensors(make.root / "a", lambda tensors: tensors.popitem() and None)
    with pytest.raises(AdapterCheckpointError):
        registry.load("x", "a")
    assert registry.list() == []
    assert registry.host_bytes_used == 0
    assert registry.load("x", "b").name == "x"


def test_one_adapter_over_the_budget_is_refused(make: Registries) -> None:
    registry = make(1.5, load="a")
    with pytest.raises(BudgetExceededError):
        registry.load("big", "big")
    assert [record.name for record in registry.list()] == ["a"]


# Resolving


def test_acquire_takes_all_or_none_and_names_every_missing_adapter(make: Registries) -> None:
    registry = make(load="ab")
    with pytest.raises(AdapterNotFoundError) as caught:
        registry.acquire([*refs("axy"), AdapterRef(name="b", generation=2)])
    assert caught.value.metadata["adapters"] == "x,y,b"
    assert [record.in_flight for record in registry.list()] == [0, 0]


def test_only_one_missing_name_is_compared_with_others(make: Registries) -> None:
    """A comparison takes milliseconds under the registry's lock, and a mix has up to 64 names."""
    registry = make(load="a")
    registry.load("customer", "b")
    with patch.object(name_table, "closest", wraps=closest) as compared:
        one = refs(["a", "custome"])
        assert registry.find(one[1]) is None
        assert registry.tokenizers.find(one)[0] is None
        with pytest.raises(AdapterNotFoundError):
            registry.acquire([*one, *refs("xy")])
        assert not any(names for _, names in (call.args for call in compared.call_args_list))
        with pytest.raises(
            AdapterNotFoundError, check=says("ADAPTER_NOT_FOUND", closest="customer")
        ):
            registry.acquire(one)


def test_a_repeated_name_is_invalid(make: Registries) -> None:
    registry = make(load="ab")
    with pytest.raises(InvalidRequestError, check=says("DUPLICATE", value="a")):
        registry.acquire(refs("aba"))
    assert registry.get("a").in_flight == 0


def test_a_mix_keeps_order_weights_and_identity(make: Registries) -> None:
    registry = make(load="ab")
    before = time.time()
    mix = registry.acquire(
        [AdapterRef(name="b", weight=-0.5), AdapterRef(name="a", generation=1, weight=0.0)]
    )
    uuids = {name: registry.get(name).uuid for name in "ab"}
    assert [(a.name, w) for a, w in mix.members] == [("b", -0.5), ("a", 0.0)]
    assert mix.key == ((uuids["b"], 1, -0.5), (uuids["a"], 1, 0.0))
    assert not mix.is_base
    assert registry.get("a").in_flight == 1
    assert (registry.get("a").last_used_time or 0) >= before
    registry.release(mix)
    registry.release(mix)
    assert registry.get("a").in_flight == 0


def test_a_request_without_adapters_uses_the_base(make: Registries) -> None:
    registry = make()
    mix = registry.acquire([])
    assert mix is BASE_MIX
    assert mix.is_base
    assert mix.key == ()
    assert Waiter(mix).was_resident
    registry.release(mix)


# Unloading


def test_unload_frees_the_name_and_the_bytes(make: Registries) -> None:
    registry = make(load="ab")
    gone: list[str] = []
    registry.on_unloaded = gone.append
    uuid = registry.get("a").uuid
    registry.unload("a")
    assert gone == [f"{uuid}.1"]
    registry.unload("b")
    assert registry.host_bytes_used == 0
    with pytest.raises(AdapterNotFoundError):
        registry.unload("a")
    assert registry.load("a", "b").uuid != uuid


def test_a_drain_refuses_new_requests_and_waits_for_running_ones(make: Registries) -> None:
    registry = make(load="a")
    mix = registry.acquire(refs("a"))
    thread, results = in_thread(lambda: registry.unload("a", "DRAIN", WAIT_SECONDS))
    until(lambda: registry.get("a").state == "DELETING")
    with pytest.raises(AdapterNotFoundError, check=says("BEING_UNLOADED")):
        registry.acquire(refs("a"))
    with pytest.raises(AdapterInUseError, check=says("BEING_UNLOADED")):
        registry.load("a", "a")
    with pytest.raises(AdapterInUseError, check=says("BEING_UNLOADED")):
        registry.pin("a")
    assert thread.is_alive()
    assert mix.members[0][0].operators is not None
    registry.release(mix)
    thread.join(WAIT_SECONDS)
    assert results == [None]
    assert registry.list() == []


def test_a_drain_that_times_out_resumes_serving(make: Registries) -> None:
    registry = make(load="a")
    mix = registry.acquire(refs("a"))
    with pytest.raises(AdapterInUseError, check=says("ADAPTER_HELD", requests=1)):
        registry.unload("a", "DRAIN", 0.01)
    assert registry.get("a").state == "ACTIVE"
    registry.release(registry.acquire(refs("a")))
    registry.release(mix)
    registry.unload("a", "DRAIN", 0.0)


def test_a_forced_unload_ends_running_requests(make: Registries) -> None:
    registry = make(load="ab")
    mixes = {registry.get(name).uuid: registry.acquire(refs(name)) for name in "ab"}
    registry.on_force_unload.append(lambda uuid: registry.release(mixes[uuid]))
    registry.unload("a", "FORCE", WAIT_SECONDS)
    assert [(r.name, r.in_flight) for r in registry.list()] == [("b", 1)]


def test_a_forced_unload_also_ends_requests_that_the_engine_has_not_seen(make: Registries) -> None:
    registry = make(load="a")
    mix = registry.acquire(refs("a"))
    told: list[str] = []

    def end(uuid: str) -> None:
        # At the first attempt, the request has not yet reached the engine, which could end it.
        told.append(uuid)
        if len(told) == 2:
            registry.release(mix)

    registry.on_force_unload.append(end)
    registry.unload("a", mode="FORCE", timeout_seconds=10)
    assert len(told) == 2


def test_a_forced_unload_overtakes_a_drain(make: Registries) -> None:
    registry = make(load="a")
    mix = registry.acquire(refs("a"))
    thread, results = in_thread(lambda: registry.unload("a", "DRAIN", None))
    until(lambda: registry.get("a").state == "DELETING")
    registry.on_force_unload.append(lambda uuid: registry.release(mix))
    registry.unload("a", "FORCE", WAIT_SECONDS)
    thread.join(WAIT_SECONDS)
    assert results == [None]


def test_an_unload_that_times_out_does_not_affect_another_one(make: Registries) -> None:
    registry = make(load="a")
    mix = registry.acquire(refs("a"))
    thread, results = in_thread(lambda: registry.unload("a", "DRAIN", WAIT_SECONDS))
    until(lambda: registry.get("a").state == "DELETING")
    with pytest.raises(AdapterInUseError):
        registry.unload("a", "DRAIN", 0.0)
    assert registry.get("a").state == "DELETING"
    registry.release(mix)
    thread.join(WAIT_SECONDS)
    assert results == [None]


def test_an_unload_during_a_read_discards_the_result(make: Registries) -> None:
    registry = make(1, load="ab")
    gate = Gate(registry)
    waiter = Waiter(registry.acquire(refs("a")))
    gate.entered.acquire()
    registry.release(waiter.mix)
    registry.unload("a", "DRAIN", 0.0)
    gate.open()
    registry.close()
    assert not waiter.is_answered
    assert registry.host_bytes_used == 0


def test_an_unknown_mode_is_invalid(make: Registries) -> None:
    registry = make(load="a")
    with pytest.raises(InvalidRequestError, check=says("INVALID_VALUE", value="SOON")):
        registry.unload("a", "SOON")  # type: ignore[arg-type]
    assert registry.get("a").state == "ACTIVE"
