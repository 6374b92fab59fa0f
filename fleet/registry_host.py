"""The registry with a clock and threads, for use in a process or an actor."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from turret.fleet import messages as m
from turret.fleet.fleet_registry import FleetRegistry, Store
from turret.server.errors import TurretError

_TICK_SECONDS = 0.2
_T = TypeVar("_T")


class RegistryHost:
    """Thread-safe; a channel for replicas of the same process, too (see ``Channel``).

    Args:
        store: What survives.
        lease_seconds: How long a silent replica is waited for.
        is_first: See ``FleetRegistry``.
    """

    def __init__(self, store: Store, *, lease_seconds: float = 5.0, is_first: bool = True) -> None:
        self._changed = threading.Condition()
        self._registry = FleetRegistry(
            store, now=time.monotonic(), lease_seconds=lease_seconds, is_first=is_first
        )
        self._is_closed = False
        threading.Thread(target=self._tick, name="fleet-registry", daemon=True).start()

    def close(self) -> None:
        """Ends the clock."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def join(self, join: m.Join) -> m.Joined:
        """See ``FleetRegistry``."""
        with self._changed:
            return self._registry.join(join, time.monotonic())

    def report(self, report: m.Report, wait_seconds: float) -> m.News:
        """As ``FleetRegistry.report``, but waits until there is news, up to a time limit."""
        end = time.monotonic() + wait_seconds
        with self._changed:
            while True:
                news = self._registry.report(report, time.monotonic())
                # The report may contain what other callers wait for.
                self._changed.notify_all()
                left = end - time.monotonic()
                if news.entries or left <= 0 or self._is_closed:
                    return news
                revision = self._registry.revision
                self._changed.wait_for(
                    lambda seen=revision: self._registry.revision > seen or self._is_closed, left
                )

    def submit(self, proposal: m.Proposal) -> str:
        """See ``FleetRegistry``."""
        return self._now(lambda now: self._registry.submit(proposal, now))

    def outcome(self, operation: str, wait_seconds: float) -> m.Outcome | None:
        """As ``FleetRegistry.outcome``, but waits up to a time limit before it returns None."""
        end = time.monotonic() + wait_seconds
        with self._changed:
            while True:
                outcome = self._registry.outcome(operation, time.monotonic())
                left = end - time.monotonic()
                if outcome is not None or left <= 0 or self._is_closed:
                    return outcome
                self._changed.wait(left)

    def cancel(self, operation: str, error: TurretError) -> None:
        """See ``FleetRegistry``."""
        self._now(lambda now: self._registry.cancel(operation, error, now))

    def leave(self, replica: str) -> None:
        """See ``FleetRegistry``."""
        self._now(lambda now: self._registry.leave(replica, now))

    def usage(self, name: str = "") -> Mapping[str, Mapping[str, m.Usage]]:
        """See ``FleetRegistry``."""
        with self._changed:
            return self._registry.usage(name)

    def status(self) -> m.FleetStatus:
        """See ``FleetRegistry``."""
        return self._now(lambda now: self._registry.status(now))

    def _now(self, call: Callable[[float], _T]) -> _T:
        with self._changed:
            try:
                return call(time.monotonic())
            finally:
                self._changed.notify_all()

    def _tick(self) -> None:
        with self._changed:
            while not self._is_closed:
                self._registry.tick(time.monotonic())
                self._changed.notify_all()
                self._changed.wait(_TICK_SECONDS)
