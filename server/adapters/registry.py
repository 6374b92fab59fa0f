"""Names to adapters: load, resolve for requests, pin, unload; every method is thread-safe.

The registry's lock guards who is registered and who is in flight; ``HostCache`` shares it and
guards what is in memory. Files are read and callbacks run without the lock.
"""

from __future__ import annotations

import re
import threading
import time
import uuid as uuids
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from turret.server.adapters.adapter import Adapter
from turret.server.adapters.adapter_metrics import AdapterMetrics, NoAdapterMetrics
from turret.server.adapters.base import BaseModel
from turret.server.adapters.host_cache import HostCache
from turret.server.adapters.loader import AdapterLoader
from turret.server.adapters.mix import BASE_MIX, HostResult, Mix, MixRef
from turret.server.adapters.record import AdapterRecord
from turret.server.errors import (
    AdapterExistsError,
    AdapterInUseError,
    AdapterNotFoundError,
    BudgetExceededError,
    InvalidRequestError,
)

NAME_PATTERN = re.compile(r"[a-z0-9]([a-z0-9._-]{0,126}[a-z0-9])?")
PIN_TIMEOUT_SECONDS = 60.0
RETRY_SECONDS = 1.0

UnloadMode = Literal["DRAIN", "FORCE"]


def _not_found(missing: Sequence[str]) -> AdapterNotFoundError:
    return AdapterNotFoundError(
        f"adapter not found: {', '.join(missing)}", metadata={"adapters": ",".join(missing)}
    )


def _in_use(name: str, why: str) -> AdapterInUseError:
    return AdapterInUseError(f"adapter {name!r} {why}", metadata={"adapter": name})


class AdapterRegistry:
    """All adapters of one base model.

    Args:
        root: Directory adapters are loaded from; nothing outside it is ever opened. None: nothing
            is loaded at all.
        base: The base model as served.
        host_bytes: Budget for operators in host memory, all adapters together.
        max_rank: Largest rank served.
        metrics: Receives counts; see ``AdapterMetrics``.
        on_force_unload: Called with the uuid of an adapter whose running requests must end now;
            they still have to release their mixes. May be set later, as may ``on_unload``, called
            with the uuid of an adapter that is gone.
        on_unloaded: Called with the uuid of an adapter that is gone, so that copies of its
            operators can go too. May be set later.
        load_threads: Background reads at a time.
    """

    def __init__(
        self,
        root: Path | None,
        base: BaseModel,
        host_bytes: int,
        max_rank: int,
        metrics: AdapterMetrics | None = None,
        *,
        on_force_unload: Callable[[str], None] | None = None,
        on_unloaded: Callable[[str], None] | None = None,
        load_threads: int = 2,
    ) -> None:
        self._loader = AdapterLoader(root, base, host_bytes, max_rank)
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._metrics: AdapterMetrics = metrics or NoAdapterMetrics()
        self._cache = HostCache(
            host_bytes,
            self._loader.reload,
            lock=self._lock,
            metrics=self._metrics,
            load_threads=load_threads,
        )
        self.on_force_unload = on_force_unload
        self.on_unload: Callable[[str], None] | None = None
        self.on_unloaded = on_unloaded
        self._adapters: dict[str, Adapter] = {}
        self._names_loading: set[str] = set()
        self._mixes: set[Mix] = set()

    @property
    def host_bytes_used(self) -> int:
        """Bytes of operators in host memory, those being read included."""
        return self._cache.used_bytes

    def load(self, name: str, path: str, pinned: bool = False) -> AdapterRecord:
        """Reads an adapter and registers it; blocks, so call it off the engine thread.

        The same content under the same name is accepted again and changes at most the pin.

        Raises:
            InvalidRequestError: Malformed name.
            AdapterExistsError: The name has other content.
            AdapterInUseError: The name is being unloaded.
            AdapterCheckpointError, AdapterMismatchError: See ``AdapterLoader``.
            BudgetExceededError: Rank or bytes over the limits, or no room for a pinned adapter.
        """
        if NAME_PATTERN.fullmatch(name) is None:
            raise InvalidRequestError.of("name", f"must match {NAME_PATTERN.pattern}")
        start = time.monotonic()
        try:
            with self._only_loader_of(name):
                record = self._load(name, path, pinned)
        except Exception:
            self._metrics.adapter_loaded("error")
            raise
        self._metrics.adapter_loaded("ok")
        self._metrics.adapter_load("read", time.monotonic() - start)
        return record

    def _load(self, name: str, path: str, pinned: bool) -> AdapterRecord:
        checkpoint = self._loader.read(path)
        with self._lock:
            existing = self._adapters.get(name)
            if existing is not None:
                if existing.digest != checkpoint.digest:
                    raise AdapterExistsError(
                        f"adapter name {name!r} is taken by other weights; unload it first",
                        metadata={"adapter": name, "digest": existing.digest},
                    )
                self._check_active(existing)
                existing.path = path  # known to hold the content; the old path may be gone
        if existing is not None:
            return self.pin(name) if pinned else self.get(name)
        loaded = self._loader.lower(checkpoint)
        adapter = Adapter(name, uuids.uuid4().hex, path, loaded)
        with self._lock:
            self._metrics.adapter_registered(name)
            is_resident = self._cache.insert(adapter, loaded.lowered.operators)
            if pinned and not is_resident:
                self._metrics.adapter_removed(name)
                raise self._no_room(adapter)
            if pinned:
                self._cache.set_pinned(adapter, True)
            self._adapters[name] = adapter
            record = adapter.record()
        self._cache.pump()
        return record

    @contextmanager
    def _only_loader_of(self, name: str) -> Iterator[None]:
        """One load per name at a time: the second finds what the first registered."""
        with self._changed:
            self._changed.wait_for(lambda: name not in self._names_loading)
            self._names_loading.add(name)
        try:
            yield
        finally:
            with self._changed:
                self._names_loading.discard(name)
                self._changed.notify_all()

    def get(self, name: str) -> AdapterRecord:
        """A snapshot of one adapter.

        Raises:
            AdapterNotFoundError: Not registered.
        """
        with self._lock:
            return self._find(name).record()

    def list(self) -> list[AdapterRecord]:
        """Snapshots of all adapters, by name."""
        with self._lock:
            return [self._adapters[name].record() for name in sorted(self._adapters)]

    def pin(self, name: str) -> AdapterRecord:
        """Keeps an adapter in host memory and registered; reads it first if it is on disk.

        Raises:
            AdapterNotFoundError: Not registered.
            AdapterInUseError: Being unloaded.
            AdapterCheckpointError: Its files changed.
            BudgetExceededError: No room within ``PIN_TIMEOUT_SECONDS``.
        """
        with self._lock:
            adapter = self._find(name)
            self._check_active(adapter)
            mix = self._open([(adapter, 1.0)])
        try:
            answered = threading.Event()
            results: list[HostResult] = []

            def on_host(result: HostResult) -> None:
                results.append(result)
                answered.set()

            if not mix.ensure_host(on_host):
                if not answered.wait(PIN_TIMEOUT_SECONDS):
                    raise self._no_room(adapter)
                if results[0].error is not None:
                    raise results[0].error
            with self._lock:
                self._check_active(adapter)
                self._cache.set_pinned(adapter, True)
                return adapter.record()
        finally:
            self.release(mix)

    def unpin(self, name: str) -> AdapterRecord:
        """Lets an adapter be evicted and unloaded again.

        Raises:
            AdapterNotFoundError: Not registered.
        """
        with self._lock:
            adapter = self._find(name)
            self._cache.set_pinned(adapter, False)
            record = adapter.record()
        self._cache.pump()
        return record

    def unload(
        self, name: str, mode: UnloadMode = "DRAIN", timeout_seconds: float | None = 30.0
    ) -> None:
        """Removes an adapter once no request holds it; blocks until then.

        New requests are refused from the start. ``DRAIN`` lets running ones finish; ``FORCE`` has
        them ended. After the timeout (None: never) the adapter serves again.

        Raises:
            AdapterNotFoundError: Not registered.
            AdapterInUseError: Pinned, or still held after the timeout.
            InvalidRequestError: Unknown mode.
        """
        if mode not in ("DRAIN", "FORCE"):
            raise InvalidRequestError.of("mode", "must be DRAIN or FORCE")
        with self._lock:
            adapter = self._find(name)
            if adapter.pinned:
                raise _in_use(name, "is pinned; unpin it first")
            adapter.state = "DELETING"
            adapter.unloaders += 1
            is_held = adapter.in_flight > 0
        try:
            if mode == "FORCE" and is_held and self.on_force_unload is not None:
                self.on_force_unload(adapter.uuid)
            with self._changed:
                self._changed.wait_for(lambda: adapter.in_flight == 0, timeout_seconds)
        finally:
            self._end_unload(adapter, mode, timeout_seconds)

    def _end_unload(self, adapter: Adapter, mode: str, timeout_seconds: float | None) -> None:
        with self._lock:
            adapter.unloaders -= 1
            if self._adapters.get(adapter.name) is not adapter:
                return  # another unload got there first
            if adapter.in_flight:
                if adapter.unloaders == 0:
                    adapter.state = "ACTIVE"
                raise _in_use(
                    adapter.name,
                    f"is still held by {adapter.in_flight} requests after {timeout_seconds} seconds"
                    + ("" if mode == "FORCE" else "; FORCE ends them"),
                )
            del self._adapters[adapter.name]
            self._cache.forget(adapter)
            self._metrics.adapter_removed(adapter.name)
        self._cache.pump()
        if self.on_unloaded is not None:
            self.on_unloaded(adapter.uuid)

    def acquire(self, refs: Sequence[MixRef]) -> Mix:
        """Resolves a request's adapters, all or none, and counts them in flight.

        The mix must be given to ``release`` once. Before the operators are used,
        ``Mix.ensure_host`` must have said that they are resident.

        Raises:
            InvalidRequestError: A name appears twice.
            AdapterNotFoundError: Unknown names, other generations, or names being unloaded;
                lists all of them.
        """
        if not refs:
            return BASE_MIX
        repeated = [name for name, count in Counter(r.name for r in refs).items() if count > 1]
        if repeated:
            raise InvalidRequestError(
                f"adapters: named more than once: {', '.join(repeated)}",
                violations=[("adapters", f"{name!r} is named more than once") for name in repeated],
            )
        with self._lock:
            found = [self._adapters.get(ref.name) for ref in refs]
            components: list[tuple[Adapter, float]] = []
            missing: list[str] = []
            for ref, adapter in zip(refs, found, strict=True):
                why = _why_missing(ref, adapter)
                if why is not None or adapter is None:
                    missing.append(ref.name + (why or ""))
                else:
                    components.append((adapter, ref.weight))
            if missing:
                raise _not_found(missing)
            now = time.time()
            for adapter, _ in components:
                adapter.last_used_time = now
            return self._open(components)

    def _open(self, components: Sequence[tuple[Adapter, float]]) -> Mix:
        for adapter, _ in components:
            adapter.in_flight += 1
        mix = Mix(tuple(components), self._cache.ensure_host)
        self._mixes.add(mix)
        self._cache.open(mix)
        return mix

    def release(self, mix: Mix) -> None:
        """Ends a request's use of its adapters. Releasing twice, or ``BASE_MIX``, is harmless."""
        with self._lock:
            if mix not in self._mixes:
                return
            self._mixes.remove(mix)
        # First the hold, then the count: who sees 0 in flight may forget the adapter.
        self._cache.close_lease(mix)
        with self._changed:
            for adapter, _ in mix.components:
                adapter.in_flight -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """Stops background reads; mixes waiting for one are told UnavailableError."""
        self._cache.shutdown()

    def _find(self, name: str) -> Adapter:
        adapter = self._adapters.get(name)
        if adapter is None:
            raise _not_found([name])
        return adapter

    def _check_active(self, adapter: Adapter) -> None:
        if adapter.state != "ACTIVE":
            raise _in_use(adapter.name, "is being unloaded")

    def _no_room(self, adapter: Adapter) -> BudgetExceededError:
        return BudgetExceededError(
            f"no room in host memory to pin adapter {adapter.name!r}"
            f" ({adapter.host_bytes_needed} bytes)",
            metadata={"adapter": adapter.name, "bytes": str(adapter.host_bytes_needed)},
            retry_after_seconds=RETRY_SECONDS,
        )


def _why_missing(ref: MixRef, adapter: Adapter | None) -> str | None:
    """None if the ref resolves; else what to say behind its name."""
    if adapter is None:
        return ""
    if adapter.state != "ACTIVE":
        return " (being unloaded)"
    if ref.generation is not None and ref.generation != adapter.generation:
        return f" (generation {ref.generation}; the current one is {adapter.generation})"
    return None
