"""A mix's claim on host memory, and the reads it waits for; both belong to ``HostCache``."""

from __future__ import annotations

from dataclasses import dataclass, field

from turret.server.adapters.adapter import Adapter
from turret.server.adapters.mix import Mix, OnHost


@dataclass(eq=False, slots=True)
class Lease:
    """A mix's claim on its adapters."""

    mix: Mix
    adapters: tuple[Adapter, ...]
    callback: OnHost | None = None
    is_granted: bool = False
    waiting_since: float = 0.0
    pending: set[str] = field(default_factory=set)
    load_seconds: dict[str, float] = field(default_factory=dict)

    @property
    def is_resident(self) -> bool:
        return all(adapter.is_resident for adapter in self.adapters)


@dataclass(eq=False, slots=True)
class Load:
    """A read under way. ``is_abandoned``: nobody will use the adapter any more."""

    adapter: Adapter
    leases: list[Lease] = field(default_factory=list)
    is_abandoned: bool = False
