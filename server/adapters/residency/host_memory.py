"""The adapters in host memory: a byte budget, and who leaves when it is spent."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterable

from turret.server.adapters.adapter import Adapter
from turret.server.adapters.residency.loader import LoadedAdapter
from turret.server.adapters.residency.metrics import AdapterMetrics


class HostMemory:
    """Least recently granted leaves first. Owns ``Adapter.operators`` and ``pinned``.

    An adapter that has entered has its bytes reserved, and is either resident or being read. Not
    thread-safe: ``Leases`` calls every method under its lock.

    Args:
        budget_bytes: Resident and arriving adapters never exceed it.
        metrics: Receives residency, bytes and evictions.

    Attributes:
        used_bytes: Bytes that resident and arriving adapters take.
    """

    def __init__(self, budget_bytes: int, metrics: AdapterMetrics) -> None:
        self.used_bytes = 0
        self._budget_bytes = budget_bytes
        self._metrics = metrics
        self._pinned_bytes = 0
        self._entries: OrderedDict[str, Adapter] = OrderedDict()
        self._base_generation = 1

    def __contains__(self, adapter: Adapter) -> bool:
        return adapter.key in self._entries

    @property
    def unpinned_bytes(self) -> int:
        """Most bytes that all unpinned adapters together can have."""
        return self._budget_bytes - self._pinned_bytes

    def enter(self, adapter: Adapter) -> None:
        """Reserves the bytes of an adapter; there is room."""
        self._entries[adapter.key] = adapter
        self.used_bytes += adapter.host_bytes_needed

    def fill(self, adapter: Adapter, loaded: LoadedAdapter) -> None:
        """Gives an adapter that has entered its operators."""
        self._correct_size(adapter, loaded.operators.num_bytes)
        adapter.operators = loaded.operators
        adapter.base_generation = loaded.base_generation

    def touch(self, adapter: Adapter) -> None:
        """Moves the adapter to the end of the eviction order."""
        self._entries.move_to_end(adapter.key)

    def leave(self, adapter: Adapter, reason: str | None = None) -> None:
        """Frees the bytes of an adapter that has entered; ``reason`` counts it as an eviction."""
        del self._entries[adapter.key]
        self.used_bytes -= adapter.host_bytes_needed
        adapter.operators = None
        if reason is not None:
            self._metrics.adapter_evicted("host", reason)

    def make_room_for(self, adapters: Iterable[Adapter]) -> bool:
        """Evicts adapters until those of these that are not in memory fit, or evicts none.

        None of ``adapters`` themselves is evicted.
        """
        adapters = tuple(adapters)
        needed = sum(adapter.host_bytes_needed for adapter in adapters if adapter not in self)
        return self._make_room(needed, {adapter.key for adapter in adapters})

    def set_pinned(self, adapter: Adapter, pinned: bool) -> None:
        """Pins an adapter that has entered, or unpins one."""
        if adapter.pinned == pinned:
            return
        assert adapter in self or not pinned, adapter
        adapter.pinned = pinned
        self._pinned_bytes += adapter.host_bytes_needed if pinned else -adapter.host_bytes_needed

    def change_base(self, generation: int) -> list[Adapter]:
        """Takes the operators from adapters that were computed from other base weights.

        Returns:
            These adapters; they have their bytes still.
        """
        self._base_generation = generation
        stale = [
            adapter
            for adapter in self._entries.values()
            if adapter.is_resident and self.is_stale(adapter.base_generation)
        ]
        for adapter in stale:
            adapter.operators = None
            self._metrics.adapter_evicted("host", "base")
        return stale

    def is_stale(self, base_generation: int | None) -> bool:
        """Whether operators of this generation (None: of any) do not fit the base."""
        return base_generation not in (None, self._base_generation)

    def report(self, adapter: Adapter) -> None:
        """Reports to the metrics where the adapter is and how much memory is used."""
        if not adapter.is_retired:
            self._metrics.adapter_residency(adapter.name, adapter.residency)
        self._metrics.adapter_bytes(host=self.used_bytes)

    def _make_room(self, needed: int, keep: Container[str]) -> bool:
        over = self.used_bytes + needed - self._budget_bytes
        victims: list[Adapter] = []
        for adapter in self._entries.values():
            if over <= 0:
                break
            is_busy = adapter.holds or adapter.pinned or not adapter.is_resident
            if not is_busy and adapter.key not in keep:
                victims.append(adapter)
                over -= adapter.host_bytes_needed
        if over > 0:
            return False
        for adapter in victims:
            self.leave(adapter, "budget")
            self.report(adapter)
        return True

    def _correct_size(self, adapter: Adapter, num_bytes: int) -> None:
        """Corrects a size that an earlier process measured, perhaps with another ``--dtype``."""
        difference = num_bytes - adapter.host_bytes_needed
        if difference:
            adapter.host_bytes_needed = num_bytes
            self.used_bytes += difference
            self._pinned_bytes += difference if adapter.pinned else 0
            self._make_room(0, {adapter.key})
