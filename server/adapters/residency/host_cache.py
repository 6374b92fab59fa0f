"""Which adapters are in host memory: an LRU under a byte budget, with background reads.

A mix is granted all its adapters at once or waits holding none, so two mixes can never each hold
what the other needs. Grants are first come, first served; a mix that finds everything resident may
overtake, but only until the first in line has waited ``PATIENCE_SECONDS``: popular adapters cannot
keep a cold one out for ever.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from turret.server.adapters.adapter import Adapter
from turret.server.adapters.mix import HostResult, Mix, OnHost
from turret.server.adapters.residency.leases import Lease, Load
from turret.server.adapters.residency.loader import LoadedAdapter
from turret.server.adapters.residency.metrics import AdapterMetrics
from turret.server.adapters.source import Source
from turret.server.errors import BudgetExceededError, TurretError, UnavailableError

PATIENCE_SECONDS = 1.0
_log = logging.getLogger(__name__)

Reload = Callable[[Source, str], LoadedAdapter]
# Callbacks to run once the lock is free.
Calls = list[Callable[[], None]]


class HostCache:
    """Owns ``Adapter.operators``, ``holds`` and ``pinned``.

    Args:
        host_bytes: The budget; resident and arriving adapters never exceed it.
        reload: ``(source, digest) → adapter``; runs on this cache's threads, without the lock.
        lock: The registry's lock, re-entrant; every method takes it.
        metrics: Receives residency, bytes, loads and evictions.
        load_threads: Reads at a time.
    """

    def __init__(
        self,
        host_bytes: int,
        reload: Reload,
        *,
        lock: threading.RLock,
        metrics: AdapterMetrics,
        load_threads: int = 2,
    ) -> None:
        self._host_bytes = host_bytes
        self._reload = reload
        self._lock = lock
        self._metrics = metrics
        self._used_bytes = 0
        self._pinned_bytes = 0
        # Resident and arriving adapters by key, least recently granted first.
        self._entries: OrderedDict[str, Adapter] = OrderedDict()
        self._loads: dict[str, Load] = {}
        self._leases: dict[Mix, Lease] = {}
        self._queue: deque[Lease] = deque()
        self._executor = ThreadPoolExecutor(load_threads, thread_name_prefix="adapter-load")
        self._is_closed = False
        self._base_generation = 1

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    def insert(self, adapter: Adapter, loaded: LoadedAdapter) -> bool:
        """Takes freshly lowered operators if there is room; False leaves the adapter on disk."""
        with self._lock:
            # Mixes that wait for room come before an adapter nobody has asked for yet.
            if self._queue or self._is_stale(loaded.base_generation):
                return False
            if not self._make_room(adapter.host_bytes_needed, frozenset()):
                return False
            self._enter(adapter)
            self._fill(adapter, loaded)
            self._report(adapter)
            return True

    def move_base(self, generation: int) -> frozenset[str]:
        """The base has other weights now: adapters computed from those before are stale.

        One that a mix holds or that is pinned is read again at once, into the room it has, and
        its mixes wait for it (``ensure_host`` has to be asked again); any other is dropped.

        Returns:
            Keys of the adapters whose operators are gone.
        """
        with self._lock:
            self._base_generation = generation
            stale = [
                adapter
                for adapter in self._entries.values()
                if adapter.is_resident and self._is_stale(adapter.base_generation)
            ]
            for adapter in stale:
                adapter.operators = None
                if adapter.holds or adapter.pinned:
                    self._read_again(adapter)
                else:
                    self._leave(adapter)
                self._metrics.adapter_evicted("host", "base")
                self._report(adapter)
            return frozenset(adapter.key for adapter in stale)

    def forget(self, adapter: Adapter, reason: str) -> None:
        """Drops an adapter that no mix holds or will hold again."""
        with self._lock:
            assert adapter.in_flight == 0, adapter
            self.set_pinned(adapter, False)
            load = self._loads.get(adapter.key)
            if load is not None:
                load.is_abandoned = True
            elif adapter.key in self._entries:
                self._leave(adapter)
                self._metrics.adapter_evicted("host", reason)
                self._metrics.adapter_bytes(host=self._used_bytes)

    def set_pinned(self, adapter: Adapter, pinned: bool) -> None:
        """Pins an adapter that is in memory or coming back to it, or unpins one."""
        with self._lock:
            if adapter.pinned == pinned:
                return
            assert adapter.key in self._entries or not pinned, adapter
            adapter.pinned = pinned
            sign = 1 if pinned else -1
            self._pinned_bytes += sign * adapter.host_bytes_needed

    def pump(self) -> None:
        """Serves waiting mixes after ``forget`` or ``set_pinned``; call it without the lock."""
        with self._lock:
            calls = self._pump()
        _run(calls)

    def open(self, mix: Mix) -> None:
        """Starts a mix's claim; grants it at once if everything is resident."""
        with self._lock:
            adapters = tuple(adapter for adapter, _ in mix.components)
            lease = self._leases[mix] = Lease(mix, adapters)
            if lease.is_resident and not self._must_queue(lease):
                self._grant(lease)

    def ensure_host(self, mix: Mix, callback: OnHost) -> bool:
        """See ``Mix.ensure_host``."""
        with self._lock:
            lease = self._leases.get(mix)
            assert lease is not None, "the mix was released"
            assert lease.callback is None, "ensure_host was called and has not answered"
            if lease.is_granted:
                if lease.pending:
                    lease.callback = callback
                return not lease.pending
            error = _shutting_down() if self._is_closed else self._infeasible(lease)
            if error is not None:
                raise error
            lease.callback = callback
            lease.waiting_since = time.monotonic()
            if self._must_queue(lease) or not self._make_room_for(lease):
                self._queue.append(lease)
                return False
            self._grant(lease)
            if lease.pending:
                return False
            lease.callback = None
            return True

    def close_lease(self, mix: Mix) -> None:
        """Ends a mix's claim, whatever its state. Unknown mixes are ignored."""
        with self._lock:
            lease = self._leases.pop(mix, None)
            if lease is None:
                return
            self._withdraw(lease)
        self.pump()

    def shutdown(self) -> None:
        """Stops reading; every waiting mix is told. Blocks for reads under way."""
        with self._lock:
            self._is_closed = True
            waiting = [lease for lease in self._leases.values() if lease.callback is not None]
            calls = [call for lease in waiting for call in self._fail(lease, _shutting_down())]
        _run(calls)
        self._executor.shutdown(wait=True, cancel_futures=True)

    # The methods below run under the lock.

    def _infeasible(self, lease: Lease) -> BudgetExceededError | None:
        needed = sum(a.host_bytes_needed for a in lease.adapters if not a.pinned)
        free = self._host_bytes - self._pinned_bytes
        if needed <= free:
            return None
        return BudgetExceededError(
            f"the mix needs {needed} bytes of host memory, {free} are not taken by pinned adapters",
            metadata={"bytes": str(needed), "free_bytes": str(free)},
        )

    def _must_queue(self, lease: Lease) -> bool:
        if not self._queue:
            return False
        waited = time.monotonic() - self._queue[0].waiting_since
        return not lease.is_resident or waited > PATIENCE_SECONDS

    def _make_room_for(self, lease: Lease) -> bool:
        missing = [a for a in lease.adapters if a.key not in self._entries]
        needed = sum(adapter.host_bytes_needed for adapter in missing)
        return self._make_room(needed, frozenset(a.key for a in lease.adapters))

    def _make_room(self, needed: int, keep: frozenset[str]) -> bool:
        """Evicts least recently used adapters until ``needed`` bytes fit, or evicts none."""
        over = self._used_bytes + needed - self._host_bytes
        victims: list[Adapter] = []
        for adapter in self._entries.values():
            if over <= 0:
                break
            is_busy = adapter.holds or adapter.pinned or adapter.key in self._loads
            if not is_busy and adapter.key not in keep:
                victims.append(adapter)
                over -= adapter.host_bytes_needed
        if over > 0:
            return False
        for adapter in victims:
            self._leave(adapter)
            self._metrics.adapter_evicted("host", "budget")
            self._report(adapter)
        return True

    def _enter(self, adapter: Adapter) -> None:
        self._entries[adapter.key] = adapter
        self._used_bytes += adapter.host_bytes_needed

    def _leave(self, adapter: Adapter) -> None:
        del self._entries[adapter.key]
        self._used_bytes -= adapter.host_bytes_needed
        adapter.operators = None

    def _is_stale(self, base_generation: int | None) -> bool:
        return base_generation not in (None, self._base_generation)

    def _fill(self, adapter: Adapter, loaded: LoadedAdapter) -> None:
        adapter.operators = loaded.operators
        adapter.base_generation = loaded.base_generation

    def _report(self, adapter: Adapter) -> None:
        if not adapter.is_retired:
            self._metrics.adapter_residency(adapter.name, adapter.residency)
        self._metrics.adapter_bytes(host=self._used_bytes)

    def _grant(self, lease: Lease) -> None:
        """Holds every adapter of the lease and starts the reads it needs; there is room."""
        lease.is_granted = True
        for adapter in lease.adapters:
            adapter.holds += 1
            if adapter.key not in self._entries:
                self._enter(adapter)
                self._start_read(adapter)
            self._entries.move_to_end(adapter.key)
            load = self._loads.get(adapter.key)
            if load is not None:
                load.leases.append(lease)
                lease.pending.add(adapter.key)

    def _start_read(self, adapter: Adapter) -> Load:
        load = self._loads[adapter.key] = Load(adapter)
        self._executor.submit(self._read, adapter)
        return load

    def _read_again(self, adapter: Adapter) -> None:
        load = self._start_read(adapter)
        for lease in self._leases.values():
            if lease.is_granted and adapter in lease.adapters:
                load.leases.append(lease)
                lease.pending.add(adapter.key)

    def _withdraw(self, lease: Lease) -> None:
        """Takes back what a lease holds or waits for; its callback will not be called."""
        lease.callback = None
        lease.pending.clear()
        lease.load_seconds.clear()
        if lease in self._queue:
            self._queue.remove(lease)
        if lease.is_granted:
            lease.is_granted = False
            for adapter in lease.adapters:
                adapter.holds -= 1
                load = self._loads.get(adapter.key)
                if load is not None:
                    load.leases.remove(lease)

    def _pump(self) -> Calls:
        """Grants what can be granted, in order."""
        calls: Calls = []
        while self._queue and not self._is_closed:
            lease = self._queue[0]
            error = self._infeasible(lease)
            if error is not None:
                calls += self._fail(lease, error)
            elif self._make_room_for(lease):
                self._queue.popleft()
                self._grant(lease)
                calls += self._answer_if_ready(lease)
            else:
                break
        return calls

    def _fail(self, lease: Lease, error: TurretError) -> Calls:
        callback, result = lease.callback, HostResult(lease.mix, error)
        self._withdraw(lease)
        return [lambda: callback(result)] if callback is not None else []

    def _answer_if_ready(self, lease: Lease) -> Calls:
        callback = lease.callback
        if lease.pending or callback is None:
            return []
        lease.callback = None
        result = HostResult(lease.mix, None, dict(lease.load_seconds))
        return [lambda: callback(result)]

    def _read(self, adapter: Adapter) -> None:
        """Runs on a loader thread, without the lock until the read is over."""
        start = time.monotonic()
        calls: Calls | None = None
        while calls is None:
            loaded, error = self._try_reload(adapter)
            seconds = time.monotonic() - start
            with self._lock:
                # The base may have changed under the read.
                if loaded is None or not self._is_stale(loaded.base_generation):
                    calls = self._finish_load(adapter, loaded, error, seconds)
        _run(calls)
        self.pump()

    def _try_reload(self, adapter: Adapter) -> tuple[LoadedAdapter | None, TurretError | None]:
        try:
            return self._reload(adapter.source, adapter.digest), None
        except TurretError as known:
            return None, known
        except Exception:
            _log.exception("reading adapter %r failed", adapter.name)
            return None, TurretError(f"reading adapter {adapter.name!r} failed")

    def _finish_load(
        self,
        adapter: Adapter,
        loaded: LoadedAdapter | None,
        error: TurretError | None,
        seconds: float,
    ) -> Calls:
        load = self._loads.pop(adapter.key)
        self._metrics.adapter_load("read", seconds)
        self._metrics.adapter_loaded("ok" if error is None else "error")
        calls: Calls = []
        if error is not None or load.is_abandoned:
            if adapter.pinned:
                # Pinned, read again for a new base, and its files are gone.
                _log.error("adapter %r is no longer pinned: %s", adapter.name, error)
                self.set_pinned(adapter, False)
            self._leave(adapter)
            for lease in load.leases:
                assert error is not None, "an abandoned adapter has no leases"
                calls += self._fail(lease, error)
        else:
            assert loaded is not None
            self._correct_size(adapter, loaded.operators.num_bytes)
            self._fill(adapter, loaded)
            for lease in load.leases:
                lease.pending.discard(adapter.key)
                lease.load_seconds[adapter.key] = seconds
                calls += self._answer_if_ready(lease)
        if load.is_abandoned:
            self._metrics.adapter_bytes(host=self._used_bytes)
        else:
            self._report(adapter)
        return calls

    def _correct_size(self, adapter: Adapter, num_bytes: int) -> None:
        """What an earlier process measured may differ, say with another ``--dtype``."""
        difference = num_bytes - adapter.host_bytes_needed
        if difference:
            adapter.host_bytes_needed = num_bytes
            self._used_bytes += difference
            self._pinned_bytes += difference if adapter.pinned else 0
            self._make_room(0, frozenset({adapter.key}))


def _shutting_down() -> UnavailableError:
    return UnavailableError("the server is shutting down")


def _run(calls: Calls) -> None:
    for call in calls:
        try:
            call()
        except Exception:
            _log.exception("an adapter callback failed")
