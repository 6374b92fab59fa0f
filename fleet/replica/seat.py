"""A replica's place in a fleet: what it is built with instead of a single server's parts."""

from __future__ import annotations

from collections.abc import Callable

from turret.fleet.messages import Join
from turret.fleet.replica.channel import Channel
from turret.fleet.replica.link import ReplicaLink
from turret.fleet.replica.merger import ReplicaMerger
from turret.fleet.replica.registry import ReplicaRegistry
from turret.fleet.replica.state import ReplicaState
from turret.server.adapters.allowed import Allowed
from turret.server.adapters.base import BaseModel, Precision
from turret.server.adapters.merge.merger import ChangeBase, Edit, MergeMetrics
from turret.server.adapters.residency.metrics import AdapterMetrics
from turret.server.adapters.state.shared_state_dir import SharedStateDir
from turret.server.config import AdapterConfig
from turret.server.hub.adapters import AdapterHub


class Seat:
    """Makes the parts, in this order: registry, merger, link.

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
        """The replica's base."""
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
        """What keeps them true; start it when the engine runs, and close it first."""
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
