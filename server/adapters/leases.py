"""Leases on adapters in host memory, the queue of waiting mixes, and the reads for them.

A mix is granted all its adapters at once, or waits and holds none, so two mixes never wait for each
other. Grants are first come, first served, and tenants take turns. A mix whose adapters are all
resident may overtake waiting ones, but only until the first in line has waited
``PATIENCE_SECONDS``. So popular adapters cannot keep an adapter on disk out of memory forever. Long
requests cannot do so either, because the engine hands the memory of granted mixes over to a mix
that waits.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from turret.server.adapters.adapter import Adapter, HostResult, Mix, OnHost, Source
from turret.server.adapters.loader import LoadedAdapter
from turret.server.basics.work import turret_error
from turret.server.errors import BudgetExceededError, TurretError, UnavailableError
from turret.server.metrics import Metrics
from turret.server.words import say


class HostMemory:
    """The adapters in host memory, within a byte budget. Evicts the least recently granted first.

    Only this class sets ``Adapter.operators`` and ``Adapter.pinned``.

    From ``enter`` to ``leave``, an adapter's bytes are reserved, and the adapter is either resident
    or being read. Not thread-safe: ``Leases`` calls every method under its lock.

    Args:
        budget_bytes: Maximum number of bytes of all resident adapters and those being read. It is
            exceeded only if an adapter is larger than recorded and no others can be evicted.
        metrics: Receives residency, bytes and evictions.

    Attributes:
        used_bytes: Bytes of all resident adapters and those being read.
    """

    def __init__(self, budget_bytes: int, metrics: Metrics) -> None:
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
        """The maximum number of bytes for all unpinned adapters together."""
        return self._budget_bytes - self._pinned_bytes

    def enter(self, adapter: Adapter) -> None:
        """Reserves the bytes of an adapter. The caller must have made room for the adapter."""
        self._entries[adapter.key] = adapter
        self.used_bytes += adapter.host_bytes_needed

    def fill(self, adapter: Adapter, loaded: LoadedAdapter) -> None:
        """Stores the operators of an adapter whose bytes are reserved."""
        self._correct_size(adapter, loaded.operators.num_bytes)
        adapter.operators = loaded.operators
        adapter.base_generation = loaded.base_generation

    def touch(self, adapter: Adapter) -> None:
        """Moves the adapter to the end of the eviction order."""
        self._entries.move_to_end(adapter.key)

    def leave(self, adapter: Adapter, reason: str | None = None) -> None:
        """Frees the bytes of an adapter. With a ``reason``, this counts as an eviction."""
        del self._entries[adapter.key]
        self.used_bytes -= adapter.host_bytes_needed
        adapter.operators = None
        if reason is not None:
            self._metrics.evictions.labels("host", reason).inc()

    def make_room_for(self, adapters: Iterable[Adapter]) -> bool:
        """Evicts other adapters until all of ``adapters`` fit; if they cannot fit, evicts nothing.

        Returns:
            Whether they fit.
        """
        adapters = tuple(adapters)
        needed = sum(adapter.host_bytes_needed for adapter in adapters if adapter not in self)
        return self._make_room(needed, {adapter.key for adapter in adapters})

    def set_pinned(self, adapter: Adapter, pinned: bool) -> None:
        """Pins an adapter whose bytes are reserved, or unpins one."""
        if adapter.pinned == pinned:
            return
        assert adapter in self or not pinned, adapter
        adapter.pinned = pinned
        self._pinned_bytes += adapter.host_bytes_needed if pinned else -adapter.host_bytes_needed

    def change_base(self, generation: int) -> list[Adapter]:
        """Discards all operators that were computed from other base weights.

        Returns:
            The adapters that lost their operators. Their bytes stay reserved.
        """
        self._base_generation = generation
        stale = [
            adapter
            for adapter in self._entries.values()
            if adapter.is_resident and self.is_stale(adapter.base_generation)
        ]
        for adapter in stale:
            adapter.operators = None
            self._metrics.evictions.labels("host", "base").inc()
        return stale

    def is_stale(self, base_generation: int | None) -> bool:
        """Whether operators of this base generation are stale; those with None never are."""
        return base_generation not in (None, self._base_generation)

    def report(self, adapter: Adapter) -> None:
        """Reports the adapter's tier and the used memory to the metrics."""
        if not adapter.is_retired:
            self._metrics.adapter_residency(adapter.name, adapter.residency)
        self._metrics.adapter_bytes.labels("host").set(self.used_bytes)

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


PATIENCE_SECONDS = 1.0
# Maximum number of adapters that are read at once.
_LOAD_THREADS = 2
_log = logging.getLogger(__name__)

Reload = Callable[[str, Source, str], LoadedAdapter]
# Calls of mixes' callbacks (``OnHost``), to be made once the change is complete.
_Callbacks = list[Callable[[], None]]


@dataclass(eq=False, slots=True)
class _Lease:
    """A mix's claim on its adapters."""

    mix: Mix
    adapters: tuple[Adapter, ...]
    callback: OnHost | None = None
    is_granted: bool = False
    waiting_since: float = 0.0
    pending: set[str] = field(default_factory=set)
    load_seconds: dict[str, float] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class _Load:
    """A running read. ``is_abandoned`` means that nothing will use its result."""

    adapter: Adapter
    leases: list[_Lease] = field(default_factory=list)
    is_abandoned: bool = False


class Leases:
    """The leases of mixes. Thread-safe.

    Only this class sets ``Adapter.holds``, the number of granted leases on an adapter. The registry
    sets ``Adapter.in_flight``, which also counts the leases that wait.

    Every method that may free memory also grants waiting mixes, where possible, before it returns.
    The callbacks of these mixes may run under a lock that the caller holds.

    Args:
        host_bytes: The budget; see ``HostMemory``.
        reload: ``(name, source, digest) → adapter``; runs on this object's threads, without the
            lock.
        lock: The registry's lock, re-entrant; every method takes it.
        metrics: Receives residency, bytes, loads and evictions.
    """

    def __init__(
        self,
        host_bytes: int,
        reload: Reload,
        *,
        lock: threading.RLock,
        metrics: Metrics,
    ) -> None:
        self._memory = HostMemory(host_bytes, metrics)
        self._reload = reload
        self._lock = lock
        self._metrics = metrics
        self._loads: dict[str, _Load] = {}
        self._leases: dict[Mix, _Lease] = {}
        self._line: deque[_Lease] = deque()
        self._executor = ThreadPoolExecutor(_LOAD_THREADS, thread_name_prefix="adapter-load")
        self._is_closed = False

    @property
    def used_bytes(self) -> int:
        """Bytes of all resident adapters and those being read."""
        return self._memory.used_bytes

    def insert(self, adapter: Adapter, loaded: LoadedAdapter) -> bool:
        """Stores freshly lowered operators, if possible.

        Returns:
            Whether the operators are stored; if not, the adapter stays on disk.
        """
        with self._lock:
            # Waiting mixes take precedence over an adapter that no request has asked for yet.
            if self._line or self._memory.is_stale(loaded.base_generation):
                return False
            if not self._memory.make_room_for([adapter]):
                return False
            self._memory.enter(adapter)
            self._memory.fill(adapter, loaded)
            self._memory.report(adapter)
            return True

    def change_base(self, generation: int) -> frozenset[str]:
        """Reacts to new weights of the base: operators computed from the old ones are stale.

        A stale adapter that is pinned or held by a mix is read again at once, into the memory that
        is reserved for it. Mixes with this adapter must wait for the read: call ``ensure_host`` for
        them again. Other stale adapters are dropped.

        Returns:
            Keys of the adapters whose operators were dropped.
        """
        with self._change():
            stale = self._memory.change_base(generation)
            for adapter in stale:
                if adapter.holds or adapter.pinned:
                    self._read_again(adapter)
                else:
                    self._memory.leave(adapter)
                self._memory.report(adapter)
            return frozenset(adapter.key for adapter in stale)

    def forget(self, adapter: Adapter, reason: str) -> None:
        """Drops an adapter that no mix holds or will hold again."""
        with self._change():
            assert adapter.in_flight == 0, adapter
            self._memory.set_pinned(adapter, False)
            load = self._loads.get(adapter.key)
            if load is not None:
                load.is_abandoned = True
            elif adapter in self._memory:
                self._memory.leave(adapter, reason)
                self._metrics.adapter_bytes.labels("host").set(self._memory.used_bytes)

    def set_pinned(self, adapter: Adapter, pinned: bool) -> None:
        """Pins an adapter that is in memory or being read into it, or unpins one."""
        with self._change():
            self._memory.set_pinned(adapter, pinned)

    def open_lease(self, mix: Mix) -> None:
        """Starts a mix's claim.

        The claim is granted at once if every adapter is resident and no mix has waited too long.
        """
        with self._lock:
            adapters = tuple(adapter for adapter, _ in mix.members)
            lease = self._leases[mix] = _Lease(mix, adapters)
            if lease.mix.is_resident and not self._must_wait(lease):
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
            if self._must_wait(lease) or not self._memory.make_room_for(lease.adapters):
                self._join_line(lease)
                return False
            self._grant(lease)
            if lease.pending:
                return False
            lease.callback = None
            return True

    def wanting(self) -> frozenset[Mix]:
        """The mixes that wait for memory, or behind others that do."""
        if not self._line:
            return frozenset()
        with self._lock:
            return frozenset(lease.mix for lease in self._line)

    def hand_over(self, mixes: Iterable[Mix], to: Mix) -> None:
        """Takes the grants of ``mixes`` away, and grants ``to`` before all others that wait.

        ``to`` keeps waiting, as the first in line, if the freed memory is not enough. If ``to`` is
        not waiting, nothing happens. Call ``ensure_host`` for ``mixes`` again.
        """
        with self._change():
            lease = self._leases[to]
            if lease in self._line:
                self._line.remove(lease)
                self._line.appendleft(lease)
                for mix in mixes:
                    self._withdraw(self._leases[mix])

    def close_lease(self, mix: Mix) -> None:
        """Ends a mix's claim, whatever its state. Unknown mixes are ignored."""
        with self._change():
            lease = self._leases.pop(mix, None)
            if lease is not None:
                self._withdraw(lease)

    def shutdown(self) -> None:
        """Stops reading and fails all waiting mixes. Blocks until running reads end."""
        with self._change() as callbacks:
            self._is_closed = True
            waiting = [lease for lease in self._leases.values() if lease.callback is not None]
            for lease in waiting:
                self._fail(lease, _shutting_down(), callbacks)
        self._executor.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            # Reads that never began have not released the memory reserved for them.
            for load in self._loads.values():
                self._memory.leave(load.adapter)
            self._loads.clear()

    @contextlib.contextmanager
    def _change(self) -> Iterator[_Callbacks]:
        """Holds the lock, then grants leases in order where possible, and calls their callbacks.

        Yields:
            The list for callbacks that result from the change itself.
        """
        callbacks: _Callbacks = []
        with self._lock:
            yield callbacks
            self._serve_line(callbacks)
        for callback in callbacks:
            try:
                callback()
            except Exception:
                _log.exception("an adapter callback failed")

    # The methods below run under the lock.

    def _serve_line(self, callbacks: _Callbacks) -> None:
        while self._line and not self._is_closed:
            lease = self._line[0]
            error = self._infeasible(lease)
            if error is not None:
                self._fail(lease, error, callbacks)
            elif self._memory.make_room_for(lease.adapters):
                self._line.popleft()
                self._grant(lease)
                self._notify_if_ready(lease, callbacks)
            else:
                break

    def _join_line(self, lease: _Lease) -> None:
        """Puts a lease in line, so that the tenants' leases are granted in turn."""
        turn = sum(each.mix.tenant == lease.mix.tenant for each in self._line)
        seen = Counter[bytes]()
        for place, each in enumerate(self._line):
            if seen[each.mix.tenant] > turn:
                self._line.insert(place, lease)
                return
            seen[each.mix.tenant] += 1
        self._line.append(lease)

    def _infeasible(self, lease: _Lease) -> BudgetExceededError | None:
        needed = sum(a.host_bytes_needed for a in lease.adapters if not a.pinned)
        free = self._memory.unpinned_bytes
        if needed <= free:
            return None
        names = " + ".join(a.name for a in lease.adapters if not a.pinned)
        text = say("PINNED_LEAVE_NO_ROOM", adapters=names, bytes=needed, free_bytes=free)
        return BudgetExceededError(text)

    def _must_wait(self, lease: _Lease) -> bool:
        if not self._line:
            return False
        waited = time.monotonic() - self._line[0].waiting_since
        return not lease.mix.is_resident or waited > PATIENCE_SECONDS

    def _grant(self, lease: _Lease) -> None:
        """Holds the lease's adapters and starts the missing reads. The caller has made room."""
        lease.is_granted = True
        for adapter in lease.adapters:
            adapter.holds += 1
            if adapter not in self._memory:
                self._memory.enter(adapter)
                self._start_read(adapter)
            self._memory.touch(adapter)
            load = self._loads.get(adapter.key)
            if load is not None:
                load.leases.append(lease)
                lease.pending.add(adapter.key)

    def _start_read(self, adapter: Adapter) -> _Load:
        load = self._loads[adapter.key] = _Load(adapter)
        self._executor.submit(self._read, adapter)
        return load

    def _read_again(self, adapter: Adapter) -> None:
        load = self._start_read(adapter)
        for lease in self._leases.values():
            if lease.is_granted and adapter in lease.adapters:
                load.leases.append(lease)
                lease.pending.add(adapter.key)

    def _withdraw(self, lease: _Lease) -> None:
        """Withdraws a lease's holds or its wait; its callback will not be called."""
        lease.callback = None
        lease.pending.clear()
        lease.load_seconds.clear()
        if lease in self._line:
            self._line.remove(lease)
        if lease.is_granted:
            lease.is_granted = False
            for adapter in lease.adapters:
                adapter.holds -= 1
                load = self._loads.get(adapter.key)
                if load is not None:
                    load.leases.remove(lease)

    def _fail(self, lease: _Lease, error: TurretError, callbacks: _Callbacks) -> None:
        callback, result = lease.callback, HostResult(lease.mix, error)
        self._withdraw(lease)
        if callback is not None:
            callbacks.append(lambda: callback(result))

    def _notify_if_ready(self, lease: _Lease, callbacks: _Callbacks) -> None:
        callback = lease.callback
        if lease.pending or callback is None:
            return
        lease.callback = None
        result = HostResult(lease.mix, None, dict(lease.load_seconds))
        callbacks.append(lambda: callback(result))

    # ``_read`` runs on a loader thread. It takes the lock once the file is read.

    def _read(self, adapter: Adapter) -> None:
        start = time.monotonic()
        while True:
            outcome = self._try_reload(adapter)
            seconds = time.monotonic() - start
            with self._change() as callbacks:
                # If the base has changed during the read, read again.
                if not (
                    isinstance(outcome, LoadedAdapter)
                    and self._memory.is_stale(outcome.base_generation)
                ):
                    self._finish_load(adapter, outcome, seconds, callbacks)
                    return

    def _try_reload(self, adapter: Adapter) -> LoadedAdapter | TurretError:
        try:
            return self._reload(adapter.name, adapter.source, adapter.digest)
        except TurretError as error:
            return error
        except Exception as error:
            _log.exception("reading adapter %r failed", adapter.name)
            return turret_error(error, f"reading adapter {adapter.name!r} failed")

    def _finish_load(
        self,
        adapter: Adapter,
        outcome: LoadedAdapter | TurretError,
        seconds: float,
        callbacks: _Callbacks,
    ) -> None:
        load = self._loads.pop(adapter.key)
        self._metrics.load_seconds.labels("read").observe(seconds)
        is_error = isinstance(outcome, TurretError)
        self._metrics.loads.labels("error" if is_error else "ok").inc()
        if isinstance(outcome, TurretError) or load.is_abandoned:
            self._give_up(load, outcome, callbacks)
        else:
            self._memory.fill(adapter, outcome)
            for lease in load.leases:
                lease.pending.discard(adapter.key)
                lease.load_seconds[adapter.key] = seconds
                self._notify_if_ready(lease, callbacks)
        if load.is_abandoned:
            self._metrics.adapter_bytes.labels("host").set(self._memory.used_bytes)
        else:
            self._memory.report(adapter)

    def _give_up(
        self, load: _Load, outcome: LoadedAdapter | TurretError, callbacks: _Callbacks
    ) -> None:
        adapter = load.adapter
        if adapter.pinned:
            # The adapter could not be read again for a new base, so it cannot stay pinned.
            _log.error("adapter %r is no longer pinned: %s", adapter.name, outcome)
            self._memory.set_pinned(adapter, False)
        self._memory.leave(adapter)
        for lease in load.leases:
            assert isinstance(outcome, TurretError), "an abandoned adapter has no leases"
            self._fail(lease, outcome, callbacks)


def _shutting_down() -> UnavailableError:
    return UnavailableError(say("SHUTTING_DOWN"))
