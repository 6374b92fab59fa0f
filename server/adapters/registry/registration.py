"""A registered name, its newest generation and those that running requests still use."""

from __future__ import annotations

from turret.server.adapters.adapter import Adapter
from turret.server.adapters.adapter_info import AdapterInfo, State


class Registration:
    """Belongs to the registry and changes under its lock.

    Attributes:
        name: As requests use it.
        uuid: Identifies this registration; a name that is loaded again has another one.
        current: The generation that new requests get.
        retired: Earlier generations that mixes still hold.
        state: ``DELETING`` refuses new requests.
        unloaders: Calls that wait to unload it.
        is_replacing: Other content is on its way in.
        last_used_time: Unix seconds of the last request, or None.
    """

    __slots__ = (
        "current",
        "is_replacing",
        "last_used_time",
        "name",
        "retired",
        "state",
        "unloaders",
        "uuid",
    )

    def __init__(self, adapter: Adapter) -> None:
        self.name = adapter.name
        self.uuid = adapter.uuid
        self.current = adapter
        self.retired: tuple[Adapter, ...] = ()
        self.state: State = "ACTIVE"
        self.unloaders = 0
        self.is_replacing = False
        self.last_used_time: float | None = None

    @property
    def in_flight(self) -> int:
        """Mixes that hold any generation."""
        return self.current.in_flight + sum(adapter.in_flight for adapter in self.retired)

    @property
    def is_staying(self) -> bool:
        """Whether the newest generation is neither being unloaded nor replaced."""
        return self.state == "ACTIVE" and not self.is_replacing

    def is_built_from(self, digest: str) -> bool:
        """Whether a generation in use needs the adapter with this digest."""
        return any(digest in a.facts.components for a in (self.current, *self.retired))

    def record(self) -> AdapterInfo:
        """A snapshot of the name and its newest generation."""
        adapter = self.current
        return AdapterInfo(
            name=self.name,
            uuid=self.uuid,
            generation=adapter.generation,
            facts=adapter.facts,
            bytes_host=adapter.host_bytes_needed if adapter.is_resident else 0,
            bytes_device=adapter.bytes_device,
            residency=adapter.residency,
            pinned=adapter.pinned,
            in_flight=self.in_flight,
            last_used_time=self.last_used_time,
            state=self.state,
            source="" if adapter.source.is_upload else adapter.source.path,
        )
