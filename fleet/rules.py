"""Whether the fleet's state allows a change; raises the errors of a single server."""

from __future__ import annotations

from turret.fleet.fleet_state import FleetState, Member
from turret.fleet.messages import Unload
from turret.server.adapters.facts import AdapterFacts
from turret.server.adapters.state.saved_registration import SavedRegistration
from turret.server.basics.counted import counted
from turret.server.errors import (
    AdapterBusyError,
    AdapterComponentError,
    AdapterExistsError,
    AdapterGenerationError,
    AdapterInUseError,
    AdapterMergedError,
    AdapterNotFoundError,
    AdapterPinnedError,
    MergeActiveError,
    MergeUnderWayError,
)


def registered(state: FleetState, name: str) -> SavedRegistration:
    """The registration of a name.

    Raises:
        AdapterNotFoundError: Nothing.
    """
    if name not in state.names:
        raise AdapterNotFoundError(f"adapter not found: {name}", metadata={"adapters": name})
    return state.names[name]


def check_open(state: FleetState, name: str) -> None:
    """Raises AdapterInUseError if the name is being unloaded."""
    if name in state.closed:
        raise _in_use(name, "is being unloaded")


def check_generation(saved: SavedRegistration, expected: int | None) -> None:
    """Raises AdapterGenerationError if the name has another generation; None accepts any."""
    if expected is not None and saved.generation != expected:
        raise AdapterGenerationError(
            f"adapter {saved.name!r} has generation {saved.generation}, not {expected}: it was"
            " replaced meanwhile; look at what it is now before it is replaced or unloaded",
            metadata={"adapter": saved.name, "generation": str(saved.generation)},
        )


def check_same(saved: SavedRegistration, expected: tuple[str, int]) -> None:
    """Raises AdapterGenerationError if another caller changed the name meanwhile."""
    if saved.uuid != expected[0]:
        raise AdapterGenerationError(
            f"adapter {saved.name!r} was unloaded and loaded again meanwhile",
            metadata={"adapter": saved.name, "generation": str(saved.generation)},
        )
    check_generation(saved, expected[1])


def check_free(saved: SavedRegistration, facts: AdapterFacts) -> None:
    """Raises AdapterExistsError if the name refers to other weights."""
    if saved.facts.digest != facts.digest:
        raise AdapterExistsError(
            f"adapter name {saved.name!r} is taken by other weights",
            metadata={"adapter": saved.name, "digest": saved.facts.digest},
        )


def check_components(state: FleetState, name: str, facts: AdapterFacts) -> None:
    """Raises AdapterComponentError if an adapter that it is built from is not registered."""
    for digest in facts.components:
        if next(state.holders_of(digest, name), None) is None:
            raise AdapterComponentError(
                f"component with digest {digest} is not registered, or does not stay",
                metadata={"digest": digest},
            )


def check_not_needed(state: FleetState, saved: SavedRegistration) -> None:
    """Raises AdapterInUseError if a fusion or a merge needs the weights that a name has.

    A replica that starts while a merge is active makes the merged weights from its members' files,
    so that they have to stay.
    """
    digest, name = saved.facts.digest, saved.name
    if name in state.merged_names():
        raise _in_use(name, "is merged into the base", AdapterMergedError)
    fusions = state.fusions_of(digest, name)
    if fusions and next(state.holders_of(digest, name), None) is None:
        which = ", ".join(map(repr, fusions))
        raise _in_use(name, f"is a component of {which}; unload that first")


def check_unpinned(saved: SavedRegistration) -> None:
    if saved.pinned:
        raise _in_use(saved.name, "is pinned", AdapterPinnedError)


def check_no_merge(state: FleetState) -> None:
    if state.preparing is not None:
        raise MergeUnderWayError("another merge or unmerge is under way")
    if state.base.merge is not None:
        raise MergeActiveError("a merge is active")


def check_members(state: FleetState, members: tuple[Member, ...]) -> None:
    """Raises AdapterGenerationError if a member is no longer what was asked to be merged."""
    for member in members:
        saved = registered(state, member.name)
        check_open(state, member.name)
        check_same(saved, (member.uuid, member.generation))


def still_held(saved: SavedRegistration, count: int, unload: Unload) -> AdapterInUseError:
    """The error of an unload that timed out."""
    why = f"is still held by {counted(count, 'request')} after {unload.timeout_seconds} s"
    return _in_use(saved.name, why, AdapterInUseError if unload.is_forced else AdapterBusyError)


def _in_use(
    name: str, why: str, kind: type[AdapterInUseError] = AdapterInUseError
) -> AdapterInUseError:
    return kind(f"adapter {name!r} {why}", metadata={"adapter": name})
