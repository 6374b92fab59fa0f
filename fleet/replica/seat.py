"""A replica's place in a fleet: what it is built with instead of a single server's parts."""

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
from turret.fleet.messages import Join, Usage
from turret.fleet.replica.channel import Channel
from turret.fleet.replica.link import ReplicaLink
from turret.fleet.replica.merger import ReplicaMerger
from turret.fleet.replica.registry import ReplicaRegistry
from turret.server.adapters.allowed import Allowed
from turret.server.adapters.base import BaseModel, Precision
from turret.server.adapters.merge.merger import ChangeBase, Edit, MergeMetrics
from turret.server.adapters.residency.metrics import AdapterMetrics
from turret.server.adapters.state.shared_state_dir import SharedStateDir
from turret.server.config import AdapterConfig
from turret.server.errors import TurretError
from turret.server.hub.adapters import AdapterHub


class Seat:
    """Makes the registry, the merger and the link, in this order.

    Args:
        name: The replica's; no other has had it.
        channel: To the fleet's registry.
        stops_alone: Serve nothing while the registry is away; see ``Follower``.
    """

    def __init__(self, name: str, channel: Channel, *, stops_alone: bool = False) -> None:
        self.name = name
        self._channel = channel
        self._stops_alone = stops_alone
        self._registry: ReplicaRegistry | None = None
        self._merger: ReplicaMerger | None = None

    def registry(
        self, config: AdapterConfig, base: BaseModel, metrics: AdapterMetrics
    ) -> ReplicaRegistry:
        """The replica's adapters.

        Raises:
            ValueError: There is no state directory.
        """
        if config.state_dir is None:
            raise ValueError("a fleet needs --state-dir, which all replicas can read")
        self._registry = ReplicaRegistry(
            config.adapter_root,
            base,
            config.adapter_host_bytes,
            config.max_rank,
            metrics,
            state=SharedStateDir(config.state_dir, config.max_upload_bytes),
            channel=self._channel,
            replica=self.name,
            allowed=Allowed(config.allow_other_base, config.allow_dense_adapters),
            hub=AdapterHub(config.adapter_hub, config.max_upload_bytes),
        )
        return self._registry

    def merger(
        self,
        *,
        edit: Callable[[Precision], Edit],
        describe: Callable[[int], BaseModel],
        change_base: ChangeBase,
        metrics: MergeMetrics,
    ) -> ReplicaMerger:
        """The merger of the replica's base."""
        assert self._registry is not None
        self._merger = ReplicaMerger(
            self._registry,
            edit=edit,
            describe=describe,
            change_base=change_base,
            metrics=metrics,
            channel=self._channel,
        )
        return self._merger

    def link(self, num_requests: Callable[[], tuple[int, int]]) -> ReplicaLink:
        """The link that keeps both up to date; start it when the engine runs, close it first."""
        assert self._registry is not None
        assert self._merger is not None
        base = self._registry.base
        link = ReplicaLink(
            Join(replica=self.name, base_name=base.name, base_digest=base.digest),
            ReplicaState(self._registry, self._merger, num_requests),
            self._channel,
            stops_alone=self._stops_alone,
        )
        self._merger.on_prepared = link.report_soon
        return link


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
        """Replaces the whole state by a snapshot; names come first, because a merge needs them."""
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
        """Applies an entry."""
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
