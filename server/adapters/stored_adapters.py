"""Which adapters a store holds, and which of them leave when it needs room."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Generic, Protocol, TypeVar

from turret.server.adapters.adapter_store import OnMoved, Resident
from turret.server.adapters.operators import AdapterOperators
from turret.server.adapters.unstacked import Unstacked
from turret.server.adapters.vocabulary_step import VocabularyChange


class Entry(Protocol):
    """An adapter in a store."""

    @property
    def adapter(self) -> Resident: ...

    last_step: int


E = TypeVar("E", bound=Entry)


class StoredAdapters(ABC, Generic[E]):
    """The bookkeeping that all stores share; see ``AdapterStore``.

    Adapters that left the batch keep their place until it is needed, so a popular adapter is stored
    once.

    Args:
        max_bytes: Budget of what is in the store. The scheduler keeps what runs together within
            it; idle adapters give way.
        unstacked: Holds the operators that are no low-rank products.
        on_moved: Told of every adapter that entered or left.
    """

    def __init__(self, max_bytes: int, unstacked: Unstacked, on_moved: OnMoved) -> None:
        self.max_bytes = max_bytes
        self._unstacked = unstacked
        self._on_moved = on_moved
        self._entries: dict[str, E] = {}
        self._step = 0

    @property
    def adapter_bytes(self) -> int:
        return sum(entry.adapter.bytes_device for entry in self._entries.values())

    @abstractmethod
    def stored_bytes(self, operators: AdapterOperators) -> int: ...

    @abstractmethod
    def _store(self, adapter: Resident, operators: AdapterOperators) -> None:
        """Make the adapter's entry; there is room for it."""

    def _operators(self, adapter: Resident) -> AdapterOperators:
        """What goes into the store."""
        assert adapter.operators is not None, "an adapter is resident while it is in use"
        return adapter.operators

    def unserved(self, operators: AdapterOperators) -> str | None:
        return None

    def prepare(self, adapters: Iterable[Resident]) -> None:
        self._step += 1
        missing = []
        for adapter in adapters:
            entry = self._entries.get(adapter.key)
            if entry is not None and self._is_current(entry):
                entry.last_step = self._step
            else:
                missing.append(adapter)
        for adapter in missing:
            self._insert(adapter)

    def drop(self, key: str) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            entry.adapter.bytes_device = 0
            self._unstacked.remove(key)
            self._on_moved(entry.adapter)

    def vocabulary(self, key: str) -> VocabularyChange | None:
        return self._unstacked.vocabulary(key)

    def _is_current(self, entry: E) -> bool:
        """Whether an entry can be used as it is."""
        return True

    def _insert(self, adapter: Resident) -> None:
        operators = self._operators(adapter)
        num_bytes = self.stored_bytes(operators)
        while self.adapter_bytes + num_bytes > self.max_bytes and self._drop_idle():
            pass
        self._store(adapter, operators)
        self._unstacked.insert(adapter.key, operators)
        adapter.bytes_device = num_bytes
        self._on_moved(adapter)

    def _drop_idle(self) -> bool:
        """Forget the adapter that was used longest ago and not in this step, if there is one."""
        idle = [e for e in self._entries.values() if e.last_step < self._step]
        if idle:
            self.drop(min(idle, key=lambda e: e.last_step).adapter.key)
        return bool(idle)
