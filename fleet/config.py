"""The settings of ``turret cluster serve``: those of each replica, and the number of replicas."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator
from pydantic.dataclasses import dataclass

from turret.fleet.words import say
from turret.server.basics.settings import (
    TABLE,
    Checked,
    Seconds,
    Switch,
    Violation,
    Whole,
    fields_of,
    is_local_address,
    is_path,
    setting,
    split_address,
    tables_of,
)
from turret.server.config import Config
from turret.server.models.sources.model_directory import hub_model_id

DEFAULT_HTTP_PORT = 8080
_LOCAL_CLUSTER = "auto"
REFUSED = {
    "preload": say("FLEET_NO_PRELOAD"),
    "admin_address": say("FLEET_ONE_ADDRESS"),
    "training": say("FLEET_NO_TRAINING"),
    **dict.fromkeys(("tls_cert", "tls_key", "tls_client_ca"), say("FLEET_NO_TLS")),
}
"""Settings of ``turret serve`` that a fleet rejects, with the refusals."""


def as_ray_address(value: str) -> str:
    """The address of a Ray cluster.

    Raises:
        ValueError: The value is neither ``HOST:PORT`` nor ``auto``.
    """
    if value != _LOCAL_CLUSTER:
        try:
            split_address(value)
        except ValueError:
            raise ValueError(say("NOT_A_RAY_ADDRESS", value=value)) from None
    return value


@dataclass(frozen=True, slots=True, kw_only=True, config=TABLE)
class FleetConfig(Checked):
    """The number of replicas, and the machines on which they run."""

    replicas: Whole | None = setting(None, "number of replicas (default: 2)", ge=1)
    min_replicas: Whole | None = setting(
        None, "minimum number of replicas, if the number follows the load", ge=1
    )
    max_replicas: Whole | None = setting(
        None,
        "maximum number of replicas; one is added while more than four sequences per replica wait",
        ge=1,
    )
    ray_address: Annotated[str, AfterValidator(as_ray_address)] | None = setting(
        None,
        "Ray cluster to join: HOST:PORT, or auto for this machine's (default: start one)",
        shown="ADDRESS",
    )
    lease_seconds: Seconds = setting(
        5.0, "how long changes to adapters wait for a replica that does not respond", ge=1
    )
    stop_without_registry: Switch = setting(
        False, "answer UNAVAILABLE while the registry cannot be reached, instead of serving"
    )

    def faults(self) -> Iterator[Violation]:
        least, most = self.min_replicas, self.max_replicas
        if (least is None) != (most is None):
            given, other = ("max", "min") if least is None else ("min", "max")
            text = say("NEEDS_FIELD", other=f"--{other}-replicas")
            yield Violation(f"fleet.{given}_replicas", text)
        if least is not None and self.replicas is not None:
            text = say("CONFLICTS_WITH", other="--min-replicas")
            yield Violation("fleet.replicas", text)
        if least is not None and most is not None and most < least:
            text = say("BELOW_OTHER", other="--min-replicas", value=most, least=least)
            yield Violation("fleet.max_replicas", text)

    @property
    def fewest(self) -> int:
        """The minimum number of replicas."""
        return self.min_replicas or self.replicas or 2

    @property
    def most(self) -> int:
        """The maximum number of replicas, reached under load."""
        return self.max_replicas or self.fewest


@dataclass(frozen=True, slots=True, kw_only=True, config=TABLE)
class ClusterConfig(Config):
    """The settings of a whole fleet. The tables other than ``fleet`` apply to every replica."""

    fleet: FleetConfig = FleetConfig()

    def faults(self) -> Iterator[Violation]:
        yield from (*self._refused(), *self._exposed(), *self._addresses())

    def _refused(self) -> Iterator[Violation]:
        for table in ("listen", "security", "adapters"):
            for name, text in REFUSED.items():
                if getattr(getattr(self, table), name, None):
                    yield Violation(f"{table}.{name}", text)
        if self.adapters.state_dir is None:
            yield Violation("adapters.state_dir", say("FLEET_NEEDS_STATE"))

    def _exposed(self) -> Iterator[Violation]:
        if self.security.insecure:
            return
        for name in ("address", "http_address"):
            value = getattr(self.listen, name)
            if value is not None and not is_local_address(value):
                yield Violation(f"listen.{name}", say("FLEET_EXPOSED", address=value))
        if self.fleet.ray_address is not None and self.security.token_file is None:
            yield Violation("security.token_file", say("FLEET_NEEDS_TOKENS"))

    def _addresses(self) -> Iterator[Violation]:
        if self.listen.address.startswith("unix:"):
            yield Violation("listen.address", say("FLEET_NEEDS_PORT"))
            return
        (host, port), (http_host, http_port) = map(split_address, (self.listen.address, self.http))
        if http_host != host:
            yield Violation("listen.http_address", say("FLEET_ONE_HOST", host=host))
        if 0 in (port, http_port) or port == http_port:
            yield Violation("listen.http_address", say("FLEET_TWO_PORTS"))

    @property
    def http(self) -> str:
        """``HOST:PORT`` of the HTTP server."""
        host = self.listen.address.rpartition(":")[0]
        return self.listen.http_address or f"{host}:{DEFAULT_HTTP_PORT}"

    @property
    def state_dir(self) -> Path:
        """The directory that all replicas share."""
        assert self.adapters.state_dir is not None
        return self.adapters.state_dir

    def for_replicas(self) -> Self:
        """These settings with absolute paths, because replicas run in other working directories."""
        tables: dict[str, Any] = {}
        for name, kind in tables_of(type(self)).items():
            table = getattr(self, name)
            paths = {n: getattr(table, n) for n, info in fields_of(kind).items() if is_path(info)}
            if name == "model" and table.model is not None and hub_model_id(table.model):
                del paths["model"]
            absolute = {key: path.absolute() for key, path in paths.items() if path is not None}
            tables[name] = dataclasses.replace(table, **absolute)
        tables["listen"] = dataclasses.replace(tables["listen"], http_address=self.http)
        return dataclasses.replace(self, **tables)


# The number of replicas for a load.

# Metrics that replicas report to Ray Serve, which passes the latest values to ``policy``.
WAITING = "waiting"
RUNNING = "running"
# Add a replica if more sequences than this wait per replica on average.
MOST_WAITING = 4
# Remove a replica if the others would have fewer sequences than this on average.
FEW = 4


def wanted(num_replicas: int, waiting: float, running: float) -> int:
    """The number of replicas for a load; it changes by at most one at a time.

    The use of the processor does not matter, because a replica with a single sequence already uses
    all of it. Replicas with little to do may also be removed while sequences wait: a new sequence
    always waits for the end of the current step.

    Args:
        num_replicas: The current number of replicas.
        waiting: Waiting sequences, on all replicas together.
        running: Running sequences, on all replicas together.
    """
    if waiting > MOST_WAITING * num_replicas:
        return num_replicas + 1
    if waiting + running < FEW * (num_replicas - 1):
        return num_replicas - 1
    return num_replicas


def policy(context: Any) -> tuple[int, dict[str, Any]]:
    """Ray Serve's autoscaling policy: applies ``wanted`` to Serve's ``AutoscalingContext``.

    Returns:
        The number of replicas, and the policy's state, which Serve keeps.
    """
    reported = context.aggregated_metrics or {}
    waiting = sum((reported.get(WAITING) or {}).values())
    running = sum((reported.get(RUNNING) or {}).values())
    number = wanted(max(context.current_num_replicas, 1), waiting, running)
    least, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    return max(least, min(most, number)), {WAITING: waiting, RUNNING: running}
