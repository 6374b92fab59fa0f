"""What is true in the whole fleet, and the entries that change it.

An entry says how things are from a revision on, not what to do, so that applying it twice, or
after later ones, harms nobody. No I/O, no clock, no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from turret.server.adapters.state.saved_registration import SavedRegistration

Precision = Literal["NF4", "BF16"]


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
        uuid: Names this plan and no other.
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
class Registered:
    """The name now refers to these weights, and takes requests."""

    saved: SavedRegistration


@dataclass(frozen=True, slots=True)
class Closed:
    """The name takes no new requests; with ``is_forced`` running ones are ended."""

    name: str
    uuid: str
    is_forced: bool


@dataclass(frozen=True, slots=True)
class Removed:
    """The name no longer refers to anything."""

    name: str
    uuid: str


@dataclass(frozen=True, slots=True)
class Preparing:
    """Every replica prepares the merged weights beside the current ones; None stops that."""

    plan: MergePlan | None


@dataclass(frozen=True, slots=True)
class BaseChanged:
    """The base has changed to this one."""

    base: Base


Entry = Registered | Closed | Removed | Preparing | BaseChanged


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

    def apply(self, entry: Entry) -> None:
        match entry:
            case Registered(saved):
                self.names[saved.name] = saved
                self.closed.pop(saved.name, None)
            case Closed(name, uuid, is_forced):
                if name in self.names and self.names[name].uuid == uuid:
                    self.closed[name] = is_forced
            case Removed(name, uuid):
                if name in self.names and self.names[name].uuid == uuid:
                    del self.names[name]
                    self.closed.pop(name, None)
            case Preparing(plan):
                self.preparing = plan
            case BaseChanged(base):
                self.base, self.preparing = base, None

    # Dependencies between names.

    def holders_of(self, digest: str, but: str) -> Iterator[str]:
        """Open names that refer to weights with a digest, except one."""
        for name, saved in self.names.items():
            if name != but and saved.facts.digest == digest and name not in self.closed:
                yield name

    def fusions_of(self, digest: str, but: str) -> list[str]:
        """Names of fusions built from the adapter with a digest, except one."""
        return [
            name
            for name, saved in self.names.items()
            if name != but and digest in saved.facts.components
        ]

    def merged_names(self) -> Mapping[str, MergePlan]:
        """The names whose weights are in the base, or are being merged into it."""
        plans = [plan for plan in (self.base.merge, self.preparing) if plan is not None]
        return {member.name: plan for plan in plans for member in plan.members}


def key_of(saved: SavedRegistration) -> str:
    """The key of one generation, as ``Adapter.key`` makes it."""
    return f"{saved.uuid}.{saved.generation}"


def usable_base(base: Base, names: Mapping[str, SavedRegistration]) -> Base:
    """The saved base, without a merge whose members another server has changed since."""
    merge = base.merge
    if merge is None:
        return base
    for member in merge.members:
        saved = names.get(member.name)
        if saved is None or (saved.uuid, saved.generation) != (member.uuid, member.generation):
            return Base(generation=base.generation + 1)
    return base
