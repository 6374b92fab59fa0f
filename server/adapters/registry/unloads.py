"""Takes names off the registry once nobody uses them, or makes their users end."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Literal

from turret.server.adapters.adapter import Adapter
from turret.server.adapters.peft_format.config.rules import invalid
from turret.server.adapters.registry.name_locks import NameLocks
from turret.server.adapters.registry.name_table import NameTable
from turret.server.adapters.registry.registration import Registration
from turret.server.adapters.state.no_state_dir import NoStateDir
from turret.server.adapters.state.state_dir import StateDir
from turret.server.errors import (
    AdapterBusyError,
    AdapterInUseError,
    AdapterPinnedError,
    InvalidRequestError,
)
from turret.server.words import say

UnloadMode = Literal["DRAIN", "FORCE"]

_FORCE_AGAIN_SECONDS = 0.25


class Unloads:
    """Thread-safe.

    Args:
        lock: The registry's.
        table: Who is registered and in flight.
        names: One change of a name at a time.
        state: Forgets names, removes files.
        end_users: Called with the uuid of an adapter whose users must end now; they still have to
            release their mixes.
        on_gone: Called with a generation that no request will use any more.
    """

    def __init__(
        self,
        lock: threading.RLock,
        table: NameTable,
        names: NameLocks,
        state: StateDir | NoStateDir,
        *,
        end_users: Callable[[str], None],
        on_gone: Callable[[Adapter], None],
    ) -> None:
        self._lock = lock
        self._table = table
        self._names = names
        self._state = state
        self._end_users = end_users
        self._on_gone = on_gone

    def unload(
        self,
        name: str,
        mode: UnloadMode,
        timeout_seconds: float | None,
        expected_generation: int | None,
    ) -> None:
        """See ``AdapterRegistry.unload``."""
        if mode not in ("DRAIN", "FORCE"):
            raise InvalidRequestError.of("mode", invalid(mode, "DRAIN or FORCE"))
        with self._lock:
            registration = self._table.find(name)
            self._table.check_generation(name, expected_generation)
            if registration.current.pinned:
                raise AdapterPinnedError(say("ADAPTER_PINNED", adapter=name))
            self._table.check_not_component(registration)
            registration.state = "DELETING"
            registration.unloaders += 1
        try:
            self._wait_until_unheld(registration, mode, timeout_seconds)
            with self._names.only(name):
                self._finish(registration, mode, timeout_seconds)
        finally:
            with self._lock:
                registration.unloaders -= 1
                if registration.unloaders == 0:
                    registration.state = "ACTIVE"

    def _wait_until_unheld(
        self, registration: Registration, mode: str, timeout_seconds: float | None
    ) -> None:
        end = math.inf if timeout_seconds is None else time.monotonic() + timeout_seconds
        while mode == "FORCE" and registration.in_flight:
            # Repeat this: a request that acquired its adapters just before the name was closed may
            # reach the engine after the first call.
            self._end_users(registration.uuid)
            left = end - time.monotonic()
            self._table.wait_until_unheld(registration, max(min(left, _FORCE_AGAIN_SECONDS), 0.0))
            if left <= 0:
                return
        self._table.wait_until_unheld(registration, timeout_seconds)

    def _finish(self, registration: Registration, mode: str, timeout_seconds: float | None) -> None:
        name = registration.name
        with self._lock:
            if self._table.get(name) is not registration:
                return  # another unload was faster
            if registration.in_flight:
                kind = AdapterInUseError if mode == "FORCE" else AdapterBusyError
                count, waited = registration.in_flight, timeout_seconds
                raise kind(say("ADAPTER_HELD", adapter=name, requests=count, seconds=waited))
            if registration.current.pinned:
                raise AdapterPinnedError(say("ADAPTER_PINNED", adapter=name))
        # No request can acquire the adapter now: it is being deleted, and changes of the name wait.
        self._state.remove(name)
        self._table.remove(registration)
        self._on_gone(registration.current)
        self._state.discard(registration.current.source)
