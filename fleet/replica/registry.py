"""The adapters of one replica: what changes them is said by the registry of the fleet.

Callers' changes are read and checked here, proposed there, and true on every replica before they
are answered. The replica's own disk is touched for reading alone.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from turret.fleet import messages as m
from turret.fleet.replica.channel import Channel, propose
from turret.server import log
from turret.server.adapters.adapter import Adapter
from turret.server.adapters.adapter_info import AdapterInfo
from turret.server.adapters.allowed import NOTHING_SPECIAL, Allowed
from turret.server.adapters.base import BaseModel
from turret.server.adapters.registry.registration import Registration
from turret.server.adapters.registry.registry import AdapterRegistry
from turret.server.adapters.registry.unloads import UnloadMode
from turret.server.adapters.residency.metrics import AdapterMetrics
from turret.server.adapters.state.saved_registration import SavedRegistration
from turret.server.adapters.state.shared_state_dir import SharedStateDir
from turret.server.adapters.state.staged_upload import StagedUpload
from turret.server.errors import AdapterGenerationError, InvalidRequestError, TurretError
from turret.server.hub.adapters import AdapterHub

_log = logging.getLogger(__name__)

# Attempts at a replacement while other callers replace the same adapter first.
_ATTEMPTS = 5
_FORCE_AGAIN_SECONDS = 0.25
# Looking at thousands of adapters takes milliseconds, and every change goes to the registry.
_USAGE_SECONDS = 1.0
_FASTER = ("disk", "host", "device")


class ReplicaRegistry(AdapterRegistry):
    """See ``AdapterRegistry``; what differs is who decides, and that weights are read lazily.

    Args:
        root, base, host_bytes, max_rank, metrics, allowed, hub: As there.
        state: The fleet's state directory.
        channel: To the registry.
        replica: This replica's name.
    """

    def __init__(
        self,
        root: Path | None,
        base: BaseModel,
        host_bytes: int,
        max_rank: int,
        metrics: AdapterMetrics | None = None,
        *,
        state: SharedStateDir,
        channel: Channel,
        replica: str,
        allowed: Allowed = NOTHING_SPECIAL,
        hub: AdapterHub | None = None,
    ) -> None:
        super().__init__(
            root,
            base,
            host_bytes,
            max_rank,
            metrics,
            state=state,
            allowed=allowed,
            hub=hub,
        )
        self._channel = channel
        self._replica = replica
        # Registrations that get no new requests, but whose generations may still be held.
        self._leaving: set[Registration] = set()
        self._usage: Mapping[str, m.Usage] = {}
        self._usage_time = float("-inf")
        self._pinner = ThreadPoolExecutor(1, thread_name_prefix="adapter-pins")

    def restore(self) -> int:
        """Restores nothing: the registry sends what is registered; see ``follow``."""
        return 0

    def close(self) -> None:
        self._pinner.shutdown(wait=False, cancel_futures=True)
        super().close()

    # Requests of callers

    def load(
        self, name: str, path: str, pinned: bool = False, task: int | None = None
    ) -> AdapterInfo:
        """Reads an adapter and registers it on every replica; errors as in ``AdapterRegistry``.

        Raises:
            UnavailableError: The registry cannot be reached.
        """
        with self._changing(name):
            source = self._loader.find(path, task)
            facts = self._installer.inspect(source)
            return self._made(m.Register(name=name, source=source, facts=facts, pinned=pinned))

    def replace(
        self,
        name: str,
        path: str,
        expected_generation: int | None = None,
        task: int | None = None,
    ) -> AdapterInfo:
        with self._changing(name):
            self._table.check_generation(name, expected_generation)
            self._table.find(name)
            source = self._loader.find(path, task)
            facts = self._installer.inspect(source)
            proposal = m.Register(name=name, source=source, facts=facts)
            return self._replaced(proposal, expected_generation)

    def upload(
        self,
        name: str,
        staged: StagedUpload,
        pinned: bool = False,
        replace: bool = False,
        expected_generation: int | None = None,
        task: int | None = None,
    ) -> AdapterInfo:
        source = dataclasses.replace(self._state.staged_source(staged, name), task=task)
        with self._changing(name):
            self._table.check_generation(name, expected_generation)
            proposal = m.Register(
                name=name,
                source=source,
                facts=self._installer.inspect(source),
                pinned=pinned,
                is_staged=True,
            )
            if not replace:
                return self._made(proposal)
            return self._replaced(proposal, expected_generation)

    def _made(self, proposal: m.Register | m.Pin) -> AdapterInfo:
        saved = propose(self._channel, proposal).saved
        assert saved is not None
        # Wait until the adapters pinned here have been read into memory.
        self._pinner.submit(lambda: None).result()
        return self._own_record(saved)

    def _replaced(self, proposal: m.Register, expected: int | None) -> AdapterInfo:
        attempt = 1
        while True:
            current = self._table.find(proposal.name).current
            replaces = (current.uuid, current.generation)
            try:
                return self._made(dataclasses.replace(proposal, replaces=replaces))
            except AdapterGenerationError:
                # Another replacement will arrive here soon, or this replica lags behind.
                if expected is not None or attempt == _ATTEMPTS:
                    raise
                attempt += 1
                time.sleep(0.05 * attempt)

    def _own_record(self, saved: SavedRegistration) -> AdapterInfo:
        """The current record, or the record of what was made if the name has changed since."""
        registration = self._table.get(saved.name)
        if registration is not None:
            record = self._record(registration)
            if (record.uuid, record.generation) == (saved.uuid, saved.generation):
                return record
        adapter = Adapter(saved.name, saved.uuid, saved.generation, saved.source, saved.facts)
        return Registration(adapter).record()

    def pin(self, name: str) -> AdapterInfo:
        return self._pin(name, True)

    def unpin(self, name: str) -> AdapterInfo:
        return self._pin(name, False)

    def _pin(self, name: str, pinned: bool) -> AdapterInfo:
        self._table.find(name)
        return self._made(m.Pin(name=name, pinned=pinned))

    def unload(
        self,
        name: str,
        mode: UnloadMode = "DRAIN",
        timeout_seconds: float | None = 30.0,
        expected_generation: int | None = None,
    ) -> None:
        if mode not in ("DRAIN", "FORCE"):
            raise InvalidRequestError.of("mode", "must be DRAIN or FORCE")
        self._table.find(name)
        propose(
            self._channel,
            m.Unload(
                name=name,
                is_forced=mode == "FORCE",
                timeout_seconds=timeout_seconds,
                expected_generation=expected_generation,
            ),
        )

    # State, summed over replicas

    def get(self, name: str) -> AdapterInfo:
        """As in ``AdapterRegistry``, with the usage of every living replica.

        Raises:
            UnavailableError: The registry cannot be reached.
        """
        return _with_usage(super().get(name), self._elsewhere(name))

    def list(self) -> list[AdapterInfo]:
        """As in ``AdapterRegistry``, with the usage of every living replica; errors as ``get``."""
        elsewhere = self._elsewhere()
        return [_with_usage(record, elsewhere) for record in super().list()]

    def _elsewhere(self, name: str = "") -> list[Mapping[str, m.Usage]]:
        usage = self._channel.usage(name)
        return [used for replica, used in usage.items() if replica != self._replica]

    # Instructions of the registry

    def follow(self, saved: SavedRegistration) -> None:
        """Makes a name refer to this registration, and serves it."""
        adapter = Adapter(saved.name, saved.uuid, saved.generation, saved.source, saved.facts)
        with self._lock:
            registration = self._table.get(saved.name)
            if registration is not None and registration.uuid != saved.uuid:
                self._drop(registration)
                registration = None
            if registration is None:
                registration = Registration(adapter)
                self._table.add(registration)
            elif registration.current.generation != saved.generation:
                self._table.swap(registration, adapter)
                self._leaving.add(registration)
            else:
                registration.current.source = saved.source
            registration.state = "ACTIVE"
            needs_pin = saved.pinned != registration.current.pinned
        if needs_pin:
            self._pinner.submit(self._follow_pin, registration, saved)

    def _follow_pin(self, registration: Registration, saved: SavedRegistration) -> None:
        with self._lock:
            is_current = registration.current.generation == saved.generation
            if not is_current or self._table.get(saved.name) is not registration:
                return
        try:
            if saved.pinned:
                self._pins.pin(registration)
            else:
                self._pins.unpin(registration)
        except TurretError as error:
            _log.error("cannot pin", extra=log.fields(adapter=saved.name, reason=error))

    def shut(self, name: str, uuid: str, is_forced: bool) -> None:
        """Rejects new requests for a name, and ends running ones if forced."""
        with self._lock:
            registration = self._table.get(name)
            if registration is None or registration.uuid != uuid:
                return
            registration.state = "DELETING"
            self._leaving.add(registration)
        if is_forced:
            threading.Thread(
                target=self._force, args=(registration,), name="force unload", daemon=True
            ).start()

    def _force(self, registration: Registration) -> None:
        # Repeat, because a request that took its adapters just before the name was closed may reach
        # the engine only after the first attempt.
        while registration.state == "DELETING" and registration.in_flight:
            self._end_users(registration.uuid)
            self._table.wait_until_unheld(registration, _FORCE_AGAIN_SECONDS)

    def forget(self, name: str, uuid: str) -> None:
        """Removes a name."""
        with self._lock:
            registration = self._table.get(name)
            if registration is not None and registration.uuid == uuid:
                self._drop(registration)

    def _drop(self, registration: Registration) -> None:
        self._table.drop(registration)
        self._leaving.add(registration)

    def names(self) -> dict[str, str]:
        """Every name, with its uuid."""
        return {record.name: record.uuid for record in super().list()}

    def holding(self) -> dict[str, int]:
        """By key, the number of requests that hold replaced or closing generations."""
        with self._lock:
            departing = {r: found for r in self._leaving if (found := _departing(r))}
            self._leaving = set(departing)
            found = [adapter for adapters in departing.values() for adapter in adapters]
            return {adapter.key: adapter.in_flight for adapter in found if adapter.in_flight}

    def usage(self) -> Mapping[str, m.Usage]:
        """Adapters in memory or in use, by name; up to a second old."""
        now = time.monotonic()
        if now - self._usage_time >= _USAGE_SECONDS:
            self._usage_time = now
            usage = self._look()
            # Return the same object while nothing changes, so that it is not reported again.
            if usage != self._usage:
                self._usage = usage
        return self._usage

    def _look(self) -> dict[str, m.Usage]:
        return {
            record.name: m.Usage(
                in_flight=record.in_flight,
                residency=record.residency,
                bytes_host=record.bytes_host,
                bytes_device=record.bytes_device,
                last_used_time=record.last_used_time,
            )
            for record in self._table.records()
            if record.in_flight or record.residency != "disk" or record.last_used_time is not None
        }


def _departing(registration: Registration) -> list[Adapter]:
    """Generations that get no new requests."""
    if registration.state == "ACTIVE" or registration.current.is_retired:
        return list(registration.retired)
    return [registration.current, *registration.retired]


def _with_usage(record: AdapterInfo, elsewhere: Sequence[Mapping[str, m.Usage]]) -> AdapterInfo:
    """A replica's record with what the others do: bytes and requests summed, the fastest tier.

    Args:
        record: Of the replica that is asked.
        elsewhere: By name, what each other replica does.
    """
    used = [usage[record.name] for usage in elsewhere if record.name in usage]
    if not used:
        return record
    times = [each.last_used_time for each in (record, *used) if each.last_used_time is not None]
    return dataclasses.replace(
        record,
        bytes_host=record.bytes_host + sum(each.bytes_host for each in used),
        bytes_device=record.bytes_device + sum(each.bytes_device for each in used),
        residency=max((each.residency for each in (record, *used)), key=_FASTER.index),
        in_flight=record.in_flight + sum(each.in_flight for each in used),
        last_used_time=max(times, default=None),
    )
