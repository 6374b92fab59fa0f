"""Brings adapters into host memory to stay."""

from __future__ import annotations

import threading

from turret.server.adapters.adapter import Adapter
from turret.server.adapters.mix import HostResult, Mix
from turret.server.adapters.registry.name_table import NameTable
from turret.server.adapters.registry.registration import Registration
from turret.server.adapters.residency.leases import Leases
from turret.server.adapters.state.no_state_dir import NoStateDir
from turret.server.adapters.state.state_dir import StateDir
from turret.server.errors import BudgetExceededError
from turret.server.words import say

PIN_TIMEOUT_SECONDS = 60.0
RETRY_SECONDS = 1.0


class Pins:
    """Call every method under the name's lock, so that the newest generation stays the newest."""

    def __init__(self, table: NameTable, leases: Leases, state: StateDir | NoStateDir) -> None:
        self._table = table
        self._leases = leases
        self._state = state

    def pin(self, registration: Registration) -> None:
        """Pins the newest generation; see ``AdapterRegistry.pin``."""
        self._table.check_active(registration)
        adapter = registration.current
        mix = self._wait_until_resident(adapter)
        try:
            self._table.check_active(registration)
            self._state.save(adapter, pinned=True)
            self._leases.set_pinned(adapter, True)
        finally:
            self._table.release(mix)

    def hold(self, adapter: Adapter) -> None:
        """Pins a generation that has no name yet, without saving the pin.

        Raises:
            BudgetExceededError: No room for it.
        """
        mix = self._wait_until_resident(adapter)
        self._leases.set_pinned(adapter, True)
        self._table.release(mix)

    def unpin(self, registration: Registration) -> None:
        """Undoes ``pin``."""
        adapter = registration.current
        if adapter.pinned:
            self._state.save(adapter, pinned=False)
            self._leases.set_pinned(adapter, False)

    def _wait_until_resident(self, adapter: Adapter) -> Mix:
        """A mix that holds the adapter in memory; the caller releases it."""
        mix = self._table.open([(adapter, 1.0)])
        answered = threading.Event()
        results: list[HostResult] = []

        def on_host(result: HostResult) -> None:
            results.append(result)
            answered.set()

        try:
            if not mix.ensure_host(on_host):
                if not answered.wait(PIN_TIMEOUT_SECONDS):
                    raise _no_room(adapter)
                if results[0].error is not None:
                    raise results[0].error
        except BaseException:
            self._table.release(mix)
            raise
        return mix


def _no_room(adapter: Adapter) -> BudgetExceededError:
    text = say("NO_ROOM_TO_PIN", adapter=adapter.name, bytes=adapter.host_bytes_needed)
    return BudgetExceededError(text, retry_after_seconds=RETRY_SECONDS)
