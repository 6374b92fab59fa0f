"""What a fleet agrees on, and the messages by which its replicas and its registry do so.

No I/O, no clock, no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from turret.server.adapters.adapter import AdapterFacts, Source
from turret.server.adapters.state_dir import SavedRegistration
from turret.server.errors import TurretError

Precision = Literal["NF4", "BF16"]
Residency = Literal["disk", "host", "device"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """An adapter of a merge, with its name at that time."""

    name: str
    uuid: str
    generation: int
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MergePlan:
    """A mix that becomes part of the base.

    Attributes:
        uuid: Identifies this plan.
        members: In the request's order.
        precision: How every replica stores the merged weights.
        time: Unix seconds.
    """

    uuid: str
    members: tuple[Member, ...]
    precision: Precision
    time: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The base's generation, and the merge that it is the result of, or None."""

    generation: int = 1
    merge: MergePlan | None = None


@dataclass(frozen=True, slots=True)
class NameEntry:
    """From a revision on, a name stands for this registration, or for nothing.

    Attributes:
        is_forced: None if the name takes requests. Otherwise it is being unloaded, and this says
            whether running requests are ended.
    """

    name: str
    saved: SavedRegistration | None = None
    is_forced: bool | None = None


@dataclass(frozen=True, slots=True)
class BaseEntry:
    """From a revision on, this is the base, and a merge is being prepared beside it, or none."""

    base: Base
    preparing: MergePlan | None = None


Entry = NameEntry | BaseEntry


@dataclass(slots=True)
class FleetState:
    """Everything that replicas must agree on, which is also the content of a snapshot.

    Attributes:
        names: What each name stands for.
        closed: Names that take no new requests, and whether running ones are ended.
        preparing: The merge under way, or None.
        base: The base that is served.
    """

    names: dict[str, SavedRegistration] = field(default_factory=dict)
    closed: dict[str, bool] = field(default_factory=dict)
    preparing: MergePlan | None = None
    base: Base = Base()

    def copy(self) -> FleetState:
        return FleetState(dict(self.names), dict(self.closed), self.preparing, self.base)

    def entries(self) -> Iterator[Entry]:
        """Entries that make an empty state this one; the base comes last, as it needs names."""
        for name, saved in self.names.items():
            yield NameEntry(name, saved, self.closed.get(name))
        yield BaseEntry(self.base, self.preparing)

    def apply(self, entry: Entry) -> None:
        if isinstance(entry, BaseEntry):
            self.base, self.preparing = entry.base, entry.preparing
            return
        self.names.pop(entry.name, None)
        self.closed.pop(entry.name, None)
        if entry.saved is not None:
            self.names[entry.name] = entry.saved
        if entry.is_forced is not None:
            self.closed[entry.name] = entry.is_forced


def key_of(saved: SavedRegistration) -> str:
    """The key of one generation, as ``Adapter.key`` makes it."""
    return f"{saved.uuid}.{saved.generation}"


# A replica and the registry


class NotJoinedError(Exception):
    """The registry does not count the replica as living: it must join (again)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """A replica asks for the whole state.

    Attributes:
        replica: Its name, another one after a restart.
        base_name, base_digest: The model that it has loaded.
    """

    replica: str
    base_name: str
    base_digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """The registry's answer to ``Join``.

    Attributes:
        session: Identifies this joining; revisions count within one run of the registry.
        revision: Of the snapshot.
        state: The snapshot.
        lease_seconds: How long the replica counts as living, from when it asked.
    """

    session: str
    revision: int
    state: FleetState
    lease_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterUsage:
    """One replica's use of one adapter."""

    in_flight: int = 0
    residency: Residency = "disk"
    bytes_host: int = 0
    bytes_device: int = 0
    last_used_time: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A replica's state, and a request for news; each report renews its lease.

    Attributes:
        replica: Its name.
        session: Since which joining.
        received: The last revision that it has received.
        applied: The last revision that is true on it; read before the rest of the report is made.
        holding: By key, how many requests hold a generation that is replaced or being unloaded.
        prepared: By uuid of a merge, None when its weights are made, or why they cannot be.
        usage: By name, what is resident, in flight or was ever used; None if the last report that
            was answered said the same.
        waiting, running: Requests that wait to be computed, and that are.
    """

    replica: str
    session: str
    received: int
    applied: int
    holding: Mapping[str, int] = field(default_factory=dict)
    prepared: Mapping[str, TurretError | None] = field(default_factory=dict)
    usage: Mapping[str, AdapterUsage] | None = None
    waiting: int = 0
    running: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """The registry's answer to ``Report``: every entry behind ``received``, in order."""

    entries: tuple[tuple[int, Entry], ...]
    lease_seconds: float


# Proposals of replicas, on behalf of a caller


@dataclass(frozen=True, slots=True, kw_only=True)
class Register:
    """Weights that the proposing replica has read and found to be good.

    Attributes:
        name: Well-formed.
        source: Where every replica can read them.
        facts: The facts that reading them found.
        pinned: Whether to pin them too.
        replaces: ``(uuid, generation)`` that they take the place of; None: the name must be free,
            or stand for the same content.
        is_staged: The source is an upload that is to be moved to its place.
    """

    name: str
    source: Source
    facts: AdapterFacts
    pinned: bool = False
    replaces: tuple[str, int] | None = None
    is_staged: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """Keep a name in memory and registered, or no longer."""

    name: str
    pinned: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Unload:
    """Remove a name once no request on any replica holds it."""

    name: str
    is_forced: bool
    timeout_seconds: float | None
    expected_generation: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """Merge a mix into the base, on every replica or on none."""

    members: tuple[Member, ...]
    precision: Precision
    time: float


@dataclass(frozen=True, slots=True)
class Unmerge:
    """Restore the base's own weights."""


Proposal = Register | Pin | Unload | Merge | Unmerge


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a proposal: the registration or base that now holds everywhere."""

    saved: SavedRegistration | None = None
    base: Base | None = None


# For an operator


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatus:
    """One living replica."""

    name: str
    revision: int
    lease_seconds: float
    running: int
    waiting: int
    num_host: int
    num_device: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetStatus:
    """The whole fleet."""

    revision: int
    num_adapters: int
    base: Base
    replicas: tuple[ReplicaStatus, ...]
