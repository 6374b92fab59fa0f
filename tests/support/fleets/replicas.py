"""Replicas with real adapters but without engines, and a registry in the same process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from builders.registries import Waiter, tiny_base

from turret.fleet.follower import Channel, ReplicaLink
from turret.fleet.registry_host import FleetStore, RegistryHost
from turret.fleet.replica import ReplicaParts, ReplicaRegistry
from turret.server.adapters.adapter import Mix
from turret.server.adapters.base import BaseModel, ChangedBase, Precision
from turret.server.adapters.merger import Edit
from turret.server.config import AdapterConfig
from turret.server.errors import UnavailableError
from turret.server.metrics import Metrics

LEASE_SECONDS = 1.0


class Wire(Channel):
    """A channel that can be cut."""

    def __init__(self, host: Callable[[], RegistryHost | None]) -> None:
        self._host = host
        self.is_cut = False

    def call(self, wait_seconds: float, method: str, *arguments: Any) -> Any:
        host = self._host()
        if self.is_cut or host is None:
            raise UnavailableError("the fleet's registry cannot be reached")
        return host.call(wait_seconds, method, *arguments)


class Started:
    """One replica."""

    def __init__(self, replica: ReplicaParts, wire: Wire, config: AdapterConfig) -> None:
        self.wire = wire
        self.registry: ReplicaRegistry = replica.registry(
            config, tiny_base(), Metrics(), lambda _: None
        )
        replica.merger(
            edit=_no_edit, describe=_no_base, change_base=_change_at_once, metrics=Metrics()
        )
        self.link: ReplicaLink = replica.link(lambda: (0, 0))
        self.link.start(10.0)

    def close(self) -> None:
        self.link.close()
        self.registry.close()


def _no_edit(precision: Precision) -> Edit:
    raise AssertionError("nothing is merged here")


def _no_base(generation: int) -> BaseModel:
    raise AssertionError("nothing is merged here")


def _change_at_once(change: Callable[[], ChangedBase]) -> Future[None]:
    raise AssertionError("nothing is merged here")


class Fleet:
    """A registry, and the started replicas."""

    def __init__(self, state_dir: Path, root: Path, **settings: Any) -> None:
        self.state_dir = state_dir
        self._config = AdapterConfig(adapter_root=root, state_dir=state_dir, **settings)
        self._replicas: list[Started] = []
        self._store: FleetStore | None = None
        self._host: RegistryHost | None = None
        self.start_registry(is_first=True)

    @property
    def host(self) -> RegistryHost:
        assert self._host is not None
        return self._host

    def start_registry(self, *, is_first: bool) -> None:
        self._store = FleetStore(self.state_dir)
        self._host = RegistryHost(self._store, lease_seconds=LEASE_SECONDS, is_first=is_first)

    def stop_registry(self) -> None:
        host, self._host = self._host, None
        if host is not None and self._store is not None:
            host.close()
            self._store.close()

    def start(self) -> Started:
        wire = Wire(lambda: self._host)
        replica = Started(ReplicaParts(f"r{len(self._replicas)}", wire), wire, self._config)
        self._replicas.append(replica)
        return replica

    def wait_resident(self, mix: Mix) -> None:
        """Wait until a mix's adapters are resident; raises the error if they cannot be."""
        waiter = Waiter(mix)
        if not waiter.was_resident and (error := waiter.wait().error) is not None:
            raise error

    def close(self) -> None:
        for replica in self._replicas:
            replica.close()
        self._replicas.clear()
        self.stop_registry()
