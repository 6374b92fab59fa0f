"""What the registry says, made true on a replica: names, and the base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import assert_never

from turret.fleet.fleet_state import (
    BaseChanged,
    Closed,
    Entry,
    FleetState,
    Preparing,
    Registered,
    Removed,
)
from turret.fleet.messages import Usage
from turret.fleet.replica.merger import ReplicaMerger
from turret.fleet.replica.registry import ReplicaRegistry
from turret.server.errors import TurretError


class ReplicaState:
    """See ``Applies``.

    Args:
        registry: The replica's adapters.
        merger: The replica's base.
        num_requests: Requests that wait to be computed, and that are.
    """

    def __init__(
        self,
        registry: ReplicaRegistry,
        merger: ReplicaMerger,
        num_requests: Callable[[], tuple[int, int]],
    ) -> None:
        self._registry = registry
        self._merger = merger
        self._num_requests = num_requests

    def reset(self, state: FleetState) -> None:
        """Makes a snapshot true, whatever was true before; names first, which a merge needs."""
        for name, uuid in self._registry.names().items():
            saved = state.names.get(name)
            if saved is None or saved.uuid != uuid:
                self._registry.forget(name, uuid)
        for name, saved in state.names.items():
            self._registry.follow(saved)
            if name in state.closed:
                self._registry.shut(name, saved.uuid, state.closed[name])
        self._merger.follow(state.base)
        self._merger.prepare(state.preparing)

    def apply(self, entry: Entry) -> None:
        """Makes an entry true."""
        match entry:
            case Registered(saved):
                self._registry.follow(saved)
            case Closed(name, uuid, is_forced):
                self._registry.shut(name, uuid, is_forced)
            case Removed(name, uuid):
                self._registry.forget(name, uuid)
            case Preparing(plan):
                self._merger.prepare(plan)
            case BaseChanged(base):
                self._merger.follow(base)
            case _:
                assert_never(entry)

    def holding(self) -> Mapping[str, int]:
        return self._registry.holding()

    def prepared(self) -> Mapping[str, TurretError | None]:
        return self._merger.prepared()

    def usage(self) -> Mapping[str, Usage]:
        return self._registry.usage()

    def num_requests(self) -> tuple[int, int]:
        return self._num_requests()
