"""One registered adapter: fixed identity, moving residency."""

from __future__ import annotations

from typing import Final

from turret.server.adapters.loader import LoadedAdapter
from turret.server.adapters.operators import AdapterOperators
from turret.server.adapters.record import AdapterRecord, Residency, State


class Adapter:
    """A generation of a registered name.

    The identity never changes. Everything else belongs to the registry and changes under its
    lock; reading single attributes without the lock is safe.

    Attributes:
        name: Registered name.
        uuid: Of the registration.
        generation: From 1.
        digest: SHA-256 over config and weights, hex.
        operators: By module path; None while on disk. While a mix that was granted residency (see
            ``Mix.ensure_host``) holds the adapter, it stays as it is.
        num_soft_tokens: Soft tokens it puts before the prompt.
        num_prefix_positions: Positions before the prompt whose keys and values it brings.
        in_flight: Mixes that hold the adapter.
        holds: Those of them that were granted residency; an adapter with holds is not evicted.
        pinned: Never evicted.
        state: ``ACTIVE`` or ``DELETING``.
        bytes_device: Set by whoever copies the operators to a device.
    """

    def __init__(self, name: str, uuid: str, path: str, loaded: LoadedAdapter) -> None:
        self.name: Final = name
        self.uuid: Final = uuid
        self.generation: Final = 1
        self.digest: Final = loaded.digest
        self.method: Final = loaded.method
        self.ranks: Final = loaded.lowered.ranks
        self.target_modules: Final = loaded.lowered.target_modules
        self.base_model: Final = loaded.lowered.base_model
        self.warnings: Final = loaded.lowered.warnings
        self.num_soft_tokens: Final = loaded.lowered.num_soft_tokens
        self.num_prefix_positions: Final = loaded.lowered.num_prefix_positions
        self.bytes_disk: Final = loaded.bytes_disk
        # What it takes in host memory when it is there.
        self.host_bytes_needed: Final = loaded.lowered.num_bytes
        self.path = path
        self.operators: AdapterOperators | None = None
        self.in_flight = 0
        self.holds = 0
        self.pinned = False
        self.state: State = "ACTIVE"
        self.unloaders = 0
        self.bytes_device = 0
        self.last_used_time: float | None = None

    def __repr__(self) -> str:
        return f"Adapter({self.name!r}, generation={self.generation}, uuid={self.uuid!r})"

    @property
    def is_resident(self) -> bool:
        return self.operators is not None

    @property
    def residency(self) -> Residency:
        if self.bytes_device:
            return "device"
        return "host" if self.is_resident else "disk"

    def record(self) -> AdapterRecord:
        return AdapterRecord(
            name=self.name,
            uuid=self.uuid,
            generation=self.generation,
            digest=self.digest,
            method=self.method,
            ranks=self.ranks,
            target_modules=self.target_modules,
            bytes_disk=self.bytes_disk,
            bytes_host=self.host_bytes_needed if self.is_resident else 0,
            bytes_device=self.bytes_device,
            residency=self.residency,
            pinned=self.pinned,
            in_flight=self.in_flight,
            last_used_time=self.last_used_time,
            base_model=self.base_model,
            warnings=self.warnings,
            state=self.state,
        )
