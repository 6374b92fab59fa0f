"""Messages between replicas and the registry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from turret.fleet.fleet_state import Base, Entry, FleetState, Member, Precision
from turret.server.adapters.facts import AdapterFacts
from turret.server.adapters.source import Source
from turret.server.adapters.state.saved_registration import SavedRegistration
from turret.server.errors import TurretError

Residency = Literal["disk", "host", "device"]


class NotJoinedError(Exception):
    """The registry does not count the replica as living: it must join (again)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """One replica's use of one adapter."""

    in_flight: int = 0
    residency: Residency = "disk"
    bytes_host: int = 0
    bytes_device: int = 0
    last_used_time: float | None = None


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
        incarnation: Of the registry; revisions count within one.
        session: Of the replica, within the incarnation: another one each time that it joins.
        revision: Of the snapshot.
        state: The snapshot.
        lease_seconds: How long the replica counts as living, from when it asked.
    """

    incarnation: str
    session: int
    revision: int
    state: FleetState
    lease_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A replica's state, and a request for news; each report renews its lease.

    Attributes:
        replica: Who says it.
        incarnation: Whose entries it follows.
        session: Since which joining.
        received: The last revision that it has got.
        applied: The last revision that is true on it; read before the rest of the report is made.
        holding: By key, how many requests hold a generation that is replaced or being unloaded.
        prepared: By uuid of a merge, None when its weights are made, or why they cannot be.
        usage: By name, what is resident, in flight or was ever used; None if the registry has been
            told the same.
        waiting, running: Requests that wait to be computed, and that are.
    """

    replica: str
    incarnation: str
    session: int
    received: int
    applied: int
    holding: Mapping[str, int] = field(default_factory=dict)
    prepared: Mapping[str, TurretError | None] = field(default_factory=dict)
    usage: Mapping[str, Usage] | None = None
    waiting: int = 0
    running: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """The registry's answer to ``Report``: every entry behind ``received``, in order."""

    entries: tuple[tuple[int, Entry], ...]
    lease_seconds: float


# Proposals of replicas, on behalf of a caller.


@dataclass(frozen=True, slots=True, kw_only=True)
class Register:
    """Weights that the proposing replica has read and found to be good.

    Attributes:
        name: Well-formed.
        source: Where every replica can read them.
        facts: What reading told.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatus:
    """One living replica, for an operator."""

    name: str
    revision: int
    lease_seconds: float
    running: int
    waiting: int
    num_host: int
    num_device: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetStatus:
    """The whole fleet, for an operator."""

    incarnation: str
    revision: int
    num_adapters: int
    base: Base
    replicas: tuple[ReplicaStatus, ...]
