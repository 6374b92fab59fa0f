"""The state that a fleet agrees on, and the messages between its replicas and its registry.

This module uses no I/O, no clock and no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from turret.server.adapters.adapter import AdapterFacts, Alias, AliasTarget, Source
from turret.server.adapters.state_dir import SavedGeneration, SavedRegistration
from turret.server.errors import TurretError

Precision = Literal["NF4", "BF16"]
Residency = Literal["disk", "host", "device"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeMember:
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
        members: The members, in the request's order.
        precision: How every replica stores the merged weights.
        time: When the merge was requested, in Unix seconds.
    """

    uuid: str
    members: tuple[MergeMember, ...]
    precision: Precision
    time: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetBase:
    """The base's generation, and the merge that led to it, or None."""

    generation: int = 1
    merge: MergePlan | None = None


@dataclass(frozen=True, slots=True)
class NameEntry:
    """The registration of a name from a revision on; ``saved`` is None if the name is free.

    Attributes:
        is_forced: None if the name takes requests. Otherwise it is being unloaded, and the value is
            whether running requests are ended.
    """

    name: str
    saved: SavedRegistration | None = None
    is_forced: bool | None = None


@dataclass(frozen=True, slots=True)
class AliasEntry:
    """The alias of a name from a revision on; ``alias`` is None if the name is free."""

    name: str
    alias: Alias | None = None


@dataclass(frozen=True, slots=True)
class BaseEntry:
    """The base from a revision on, and the merge that is being prepared, if any."""

    base: FleetBase
    preparing: MergePlan | None = None


Entry = NameEntry | AliasEntry | BaseEntry


@dataclass(slots=True)
class FleetState:
    """Everything that replicas must agree on, which is also the content of a snapshot.

    Attributes:
        names: The registration of each name.
        aliases: The alias of each name; its targets are registered and keep their generations.
        closed: Names that take no new requests, and whether running ones are ended.
        preparing: The merge under way, or None.
        base: The base that is served.
    """

    names: dict[str, SavedRegistration] = field(default_factory=dict)
    aliases: dict[str, Alias] = field(default_factory=dict)
    closed: dict[str, bool] = field(default_factory=dict)
    preparing: MergePlan | None = None
    base: FleetBase = FleetBase()

    def copy(self) -> FleetState:
        return FleetState(
            dict(self.names), dict(self.aliases), dict(self.closed), self.preparing, self.base
        )

    def entries(self) -> Iterator[Entry]:
        """The entries that turn an empty state into this one.

        Names come first, because aliases and the base refer to them.
        """
        for name, saved in self.names.items():
            yield NameEntry(name, saved, self.closed.get(name))
        for name, alias in self.aliases.items():
            yield AliasEntry(name, alias)
        yield BaseEntry(self.base, self.preparing)

    def apply(self, entry: Entry) -> None:
        if isinstance(entry, BaseEntry):
            self.base, self.preparing = entry.base, entry.preparing
            return
        if isinstance(entry, AliasEntry):
            self.aliases.pop(entry.name, None)
            if entry.alias is not None:
                self.aliases[entry.name] = entry.alias
            return
        self.names.pop(entry.name, None)
        self.closed.pop(entry.name, None)
        if entry.saved is not None:
            self.names[entry.name] = entry.saved
        if entry.is_forced is not None:
            self.closed[entry.name] = entry.is_forced


def key_of(saved: SavedRegistration, generation: int | None = None) -> str:
    """The key of one generation, by default the current one, as ``Adapter.key`` makes it."""
    return f"{saved.uuid}.{saved.generation if generation is None else generation}"


def generations_of(saved: SavedRegistration) -> tuple[SavedGeneration, ...]:
    """The generations that requests may name; the current one is first."""
    current = SavedGeneration(generation=saved.generation, source=saved.source, facts=saved.facts)
    return (current, *saved.kept)


# Messages between a replica and the registry.


class NotJoinedError(Exception):
    """The registry does not count the replica as living, so the replica must join (again)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """A replica's request for the whole state.

    Attributes:
        replica: The replica's name; a restarted replica has a new one.
        base_name, base_digest: The model that it has loaded.
        keep_generations: How many replaced generations of a name the fleet keeps. All replicas have
            the same settings, so the last one to join decides.
    """

    replica: str
    base_name: str
    base_digest: str
    keep_generations: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """The registry's answer to ``Join``.

    Attributes:
        session: Identifies this join; revisions count within one run of the registry.
        revision: The revision of the snapshot.
        state: The snapshot.
        lease_seconds: How long the replica counts as living after its request.
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
        session: The session of its last join.
        received: The last revision that it has received.
        applied: The last revision that it has applied; read before the rest of the report is made.
        holding: The number of requests on each generation that is replaced or being unloaded, by
            key.
        prepared: The result of each merge's preparation, by uuid: None for ready weights, else the
            error.
        usage: Adapters that are resident, in use or were ever used, by name; None if nothing has
            changed since the last answered report.
        waiting, running: The numbers of waiting and of running requests.
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
    """The registry's answer to ``Report``: every entry after ``received``, in order."""

    entries: tuple[tuple[int, Entry], ...]
    lease_seconds: float


# Proposals that a replica sends on behalf of a caller.


@dataclass(frozen=True, slots=True, kw_only=True)
class Register:
    """Weights that the proposing replica has read and validated.

    Attributes:
        name: A valid name.
        source: A source that every replica can read.
        facts: The facts from reading the weights.
        pinned: Whether to pin the adapter as well.
        replaces: The ``(uuid, generation)`` that the weights replace. If None, the name must be
            free or already have the same content.
        is_staged: Whether the source is an upload that must still be moved to its place.
    """

    name: str
    source: Source
    facts: AdapterFacts
    pinned: bool = False
    replaces: tuple[str, int] | None = None
    is_staged: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollback:
    """Make a kept generation current, in place of ``(uuid, generation)``."""

    name: str
    generation: int
    replaces: tuple[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class SetAlias:
    """Make a name stand for these generations, of which there is at least one."""

    name: str
    targets: tuple[AliasTarget, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteAlias:
    """Free the name of an alias."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """Pin or unpin a name."""

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

    members: tuple[MergeMember, ...]
    precision: Precision
    time: float


@dataclass(frozen=True, slots=True)
class Unmerge:
    """Restore the base's own weights."""


Proposal = Register | Rollback | SetAlias | DeleteAlias | Pin | Unload | Merge | Unmerge


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a proposal: the registration, alias or base that now holds everywhere."""

    saved: SavedRegistration | None = None
    alias: Alias | None = None
    base: FleetBase | None = None


# The state of the replicas, for an operator.


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
    base: FleetBase
    replicas: tuple[ReplicaStatus, ...]
