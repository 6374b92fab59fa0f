"""Random sequences of acquire, ensure_host, release, load, unload, pin and evict."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path

import pytest
from builders.adapters import base_of, lora_config, save_peft_adapter, tiny_llama
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from turret.server.adapters.adapter import AdapterRef, HostResult, Mix
from turret.server.adapters.registry import installer
from turret.server.adapters.registry.registry import AdapterRegistry, UnloadMode
from turret.server.errors import AdapterInUseError, AdapterNotFoundError, BudgetExceededError

RANKS = {"a": 1, "b": 2, "c": 3, "d": 4}
WAIT_SECONDS = 10.0
BASE = base_of(tiny_llama())
_directory = tempfile.TemporaryDirectory()
ROOT = Path(_directory.name)


@pytest.fixture(scope="module", autouse=True)
def _checkpoints():
    for name, rank in RANKS.items():
        save_peft_adapter(tiny_llama(), lora_config(r=rank), ROOT / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(installer, "PIN_TIMEOUT_SECONDS", 0.05)
        yield
    _directory.cleanup()


class Held:
    """A mix of the test, and the answers that it received."""

    def __init__(self, mix: Mix, names: list[str]) -> None:
        self.mix, self.names = mix, names
        self.has_asked = False
        self.is_ready = False
        self.result: HostResult | None = None
        self.answered = threading.Event()

    def answer(self, result: HostResult) -> None:
        assert self.result is None
        self.result = result
        self.is_ready = result.error is None
        self.answered.set()


class RegistryMachine(RuleBasedStateMachine):
    """The budget is a total rank of 6: most pairs fit, most triples do not."""

    def __init__(self) -> None:
        super().__init__()
        unit = AdapterRegistry(ROOT, BASE, 1 << 30, 64)
        self.unit = unit.load("a", "a").bytes_host
        unit.close()
        self.budget = 6 * self.unit
        self.registry = AdapterRegistry(ROOT, BASE, self.budget, 64)
        self.held: list[Held] = []
        self.registered: set[str] = set()
        self.pinned: set[str] = set()

    def in_flight(self, name: str) -> int:
        return sum(name in held.names for held in self.held)

    @rule(name=st.sampled_from(list(RANKS)))
    def load(self, name: str) -> None:
        self.registry.load(name, name)
        self.registered.add(name)

    @rule(names=st.lists(st.sampled_from(list(RANKS)), min_size=1, max_size=3, unique=True))
    def acquire(self, names: list[str]) -> None:
        refs = [AdapterRef(name=name) for name in names]
        if set(names) <= self.registered:
            self.held.append(Held(self.registry.acquire(refs), names))
            return
        with pytest.raises(AdapterNotFoundError) as caught:
            self.registry.acquire(refs)
        missing = ",".join(name for name in names if name not in self.registered)
        assert caught.value.metadata["adapters"] == missing

    @precondition(lambda self: any(not held.has_asked for held in self.held))
    @rule(index=st.integers(0, 100))
    def ensure_host(self, index: int) -> None:
        fresh = [held for held in self.held if not held.has_asked]
        held = fresh[index % len(fresh)]
        pinned = sum(RANKS[name] for name in self.pinned)
        needed = sum(RANKS[name] for name in held.names if name not in self.pinned)
        try:
            resident = held.mix.ensure_host(held.answer)
        except BudgetExceededError:
            assert needed + pinned > 6
            return
        held.has_asked = True
        held.is_ready = held.is_ready or resident
        # Pins that were set after a mix was granted may have made it too large.
        assert resident or needed + pinned <= 6

    @precondition(lambda self: bool(self.held))
    @rule(index=st.integers(0, 100))
    def release(self, index: int) -> None:
        self.registry.release(self.held.pop(index % len(self.held)).mix)

    @precondition(lambda self: bool(self.registered))
    @rule(index=st.integers(0, 3), mode=st.sampled_from(["DRAIN", "FORCE"]))
    def unload(self, index: int, mode: UnloadMode) -> None:
        name = sorted(self.registered)[index % len(self.registered)]
        if name in self.pinned or self.in_flight(name):
            with pytest.raises(AdapterInUseError):
                self.registry.unload(name, mode, 0.0)
            assert self.registry.get(name).state == "ACTIVE"
        else:
            self.registry.unload(name, mode, 0.0)
            self.registered.discard(name)

    @precondition(lambda self: bool(self.registered))
    @rule(index=st.integers(0, 3))
    def pin(self, index: int) -> None:
        name = sorted(self.registered)[index % len(self.registered)]
        try:
            self.registry.pin(name)
        except BudgetExceededError:
            return
        self.pinned.add(name)

    @precondition(lambda self: bool(self.pinned))
    @rule(index=st.integers(0, 3))
    def unpin(self, index: int) -> None:
        name = sorted(self.pinned)[index % len(self.pinned)]
        self.registry.unpin(name)
        self.pinned.discard(name)

    @invariant()
    def the_budget_holds(self) -> None:
        records = self.registry.list()
        assert sum(record.bytes_host for record in records) <= self.registry.host_bytes_used
        assert self.registry.host_bytes_used <= self.budget

    @invariant()
    def names_pins_and_references_are_as_expected(self) -> None:
        records = {record.name: record for record in self.registry.list()}
        assert records.keys() == self.registered
        for name, record in records.items():
            assert record.in_flight == self.in_flight(name)
            assert record.pinned == (name in self.pinned)
            assert record.residency == "host" or not record.pinned

    @invariant()
    def what_was_granted_stays_resident(self) -> None:
        for held in self.held:
            if held.is_ready:
                assert all(adapter.operators is not None for adapter, _ in held.mix.members)

    def teardown(self) -> None:
        for name in self.pinned:
            self.registry.unpin(name)
        # Every waiting mix is answered once earlier ones release theirs.
        for held in [h for h in self.held if h.is_ready or not h.has_asked]:
            self.held.remove(held)
            self.registry.release(held.mix)
        while self.held:
            answered = next((h for h in self.held if h.answered.is_set()), None)
            held = answered or next(h for h in self.held if self._is_next(h))
            assert held.answered.wait(WAIT_SECONDS), "a waiting mix was forgotten"
            self.held.remove(held)
            self.registry.release(held.mix)
        for name in self.registered:
            self.registry.unload(name, "DRAIN", 0.0)
        self.registry.close()
        assert self.registry.host_bytes_used == 0

    def _is_next(self, held: Held) -> bool:
        """Whether reads for the mix are running, or it is first in the queue."""
        queue = self.registry._leases._line
        return all(lease.mix is not held.mix for lease in queue) or queue[0].mix is held.mix


TestRegistryMachine = RegistryMachine.TestCase
TestRegistryMachine.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
