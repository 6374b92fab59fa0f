"""What ``turret cluster serve`` is told: how many replicas, where, and what they cannot be told."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turret.fleet.words import say
from turret.server.basics.address import is_local_address, split_address
from turret.server.config import Config
from turret.server.models.sources.hub_model import hub_model_id
from turret.server.words import Text

DEFAULT_HTTP_PORT = 8080
# Settings of ``turret serve`` that a fleet rejects.
REFUSED = ("preload", "admin_address", "tls_cert", "tls_key", "tls_client_ca")
_OF_THIS_MACHINE = "auto"
# Metrics that replicas report to Serve, which passes the latest values to ``policy``.
WAITING = "waiting"
RUNNING = "running"
# Add a replica if more sequences than this wait per replica on average.
MOST_WAITING = 4
# Remove a replica if the others would have fewer sequences than this on average.
FEW = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPlan:
    """The number of replicas and where they run.

    Attributes:
        ray_address: A Ray cluster to join (``auto``, ``HOST:PORT``); None starts one, which ends
            with this process.
        min_replicas, max_replicas: The same unless the number follows the load.
        lease_seconds: How long a silent replica is waited for.
        stops_alone: Replicas serve nothing while they cannot reach the registry.

    Raises:
        ValueError: They make no sense; names the flag.
    """

    ray_address: str | None = None
    min_replicas: int = 1
    max_replicas: int = 1
    lease_seconds: float = 5.0
    stops_alone: bool = False

    def __post_init__(self) -> None:
        check_ray_address(self.ray_address)
        if self.min_replicas < 1:
            raise ValueError(too_small("min-replicas", self.min_replicas))
        if self.max_replicas < self.min_replicas:
            counts = {"most": self.max_replicas, "fewest": self.min_replicas}
            raise ValueError(say("REPLICAS_CROSSED", **counts))
        if not self.lease_seconds >= 1.0:
            raise ValueError(too_small("lease-seconds", self.lease_seconds))


def too_small(flag: str, found: float) -> Text:
    """The error of a flag that must be at least 1."""
    return say("FLAG_TOO_SMALL", flag=flag, least=1, found=found)


def check_ray_address(address: str | None) -> None:
    """Raises ValueError if it is no address of a Ray cluster; None is one of this command's own."""
    if address in (None, _OF_THIS_MACHINE):
        return
    try:
        split_address(address)
    except ValueError:
        raise ValueError(say("NOT_A_RAY_ADDRESS", address=address)) from None


def why_refused(given: Mapping[str, object]) -> Text | None:
    """Why a fleet rejects one of these settings, or None. Call it before building a configuration.

    What ``turret serve`` asks for beside one of them would be refused next.
    """
    for name in (*REFUSED, "address", "http_address"):
        value, flag = given.get(name), name.replace("_", "-")
        if name == "preload" and value not in (None, ()):
            return say("FLEET_NO_PRELOAD", flag=flag)
        if name == "admin_address" and value is not None:
            return say("FLEET_ONE_ADDRESS", flag=flag)
        if name.startswith("tls_") and value is not None:
            return say("FLEET_NO_TLS", flag=flag)
        is_open = name in ("address", "http_address") and not given.get("insecure")
        if is_open and isinstance(value, str) and _is_exposed(value):
            return say("FLEET_EXPOSED", flag=flag, address=value)
    return None


def _is_exposed(address: str) -> bool:
    try:
        return not is_local_address(address)
    except ValueError:
        # This is not an address; a later check reports that.
        return False


def fleet_config(config: Config, *, joins: bool = False) -> Config:
    """The configuration of every replica.

    Args:
        config: As it was given.
        joins: Whether the fleet runs on a Ray cluster that was there before.

    Raises:
        ValueError: A flag that a fleet cannot take; says what to do instead.
    """
    listen, security = config.listen, config.security
    parts = (listen, security, config.adapters)
    if why := why_refused({n: getattr(p, n) for p in parts for n in REFUSED if hasattr(p, n)}):
        raise ValueError(why)
    if joins and security.token_file is None and not security.insecure:
        raise ValueError(say("FLEET_NEEDS_TOKENS"))
    if config.adapters.state_dir is None:
        raise ValueError(say("FLEET_NEEDS_STATE"))
    if listen.address.startswith("unix:"):
        raise ValueError(say("FLEET_NEEDS_PORT"))
    host, port = split_address(listen.address)
    http = listen.http_address or f"{listen.address.rpartition(':')[0]}:{DEFAULT_HTTP_PORT}"
    http_host, http_port = split_address(http)
    if http_host != host:
        raise ValueError(say("FLEET_ONE_HOST", host=host))
    if 0 in (port, http_port) or port == http_port:
        raise ValueError(say("FLEET_TWO_PORTS"))
    return dataclasses.replace(
        config,
        listen=dataclasses.replace(listen, http_address=http),
        adapters=dataclasses.replace(
            config.adapters,
            # Replicas run in other working directories.
            state_dir=config.adapters.state_dir.absolute(),
            adapter_root=_absolute(config.adapters.adapter_root),
        ),
        model=dataclasses.replace(
            config.model,
            model=_found_anywhere(config.model.model),
            chat_template=_absolute(config.model.chat_template),
        ),
        security=dataclasses.replace(security, token_file=_absolute(security.token_file)),
    )


def _found_anywhere(model: Path | None) -> Path | None:
    """A path on this machine made absolute; the id of a model on the hub is unchanged."""
    return model if model is not None and hub_model_id(model) is not None else _absolute(model)


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.absolute()


def wanted(num_replicas: int, waiting: float, running: float) -> int:
    """The number of replicas for a load; it changes by at most one at a time.

    Never by the processor's use: a replica that computes one sequence uses all of it. Some
    sequence waits in many a moment, for the step that is computed when it comes: that no line is
    ever seen is too much to ask of replicas that have little to do.

    Args:
        num_replicas: There are now.
        waiting: Sequences that wait, on all of them.
        running: Sequences that run, on all of them.
    """
    if waiting > MOST_WAITING * num_replicas:
        return num_replicas + 1
    if waiting + running < FEW * (num_replicas - 1):
        return num_replicas - 1
    return num_replicas


def policy(context: Any) -> tuple[int, dict[str, Any]]:
    """Serve's form of ``wanted`` (``ray.serve.config.AutoscalingContext``)."""
    reported = context.aggregated_metrics or {}
    waiting = sum((reported.get(WAITING) or {}).values())
    running = sum((reported.get(RUNNING) or {}).values())
    number = wanted(max(context.current_num_replicas, 1), waiting, running)
    least, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    return max(least, min(most, number)), {WAITING: waiting, RUNNING: running}
