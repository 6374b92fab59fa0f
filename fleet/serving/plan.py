"""What ``turret cluster serve`` is told: how many replicas, where, and what they cannot be told."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turret.server.basics.address import is_local_address, split_address
from turret.server.config import Config
from turret.server.models.sources.hub_model import hub_model_id

DEFAULT_HTTP_PORT = 8080
_PLAIN_TEXT = "Ray Serve listens in plain text; let TLS end in front of it, and see docs/fleet.md"
# Settings of ``turret serve`` that a fleet rejects → what to do instead.
REFUSED: Mapping[str, str] = {
    "preload": (
        "a fleet takes none; load adapters once (`turret adapters load`, from --adapter-root), and"
        " it keeps them"
    ),
    "admin_address": "a fleet has one address; tokens say who may change it",
    "tls_cert": _PLAIN_TEXT,
    "tls_key": _PLAIN_TEXT,
    "tls_client_ca": _PLAIN_TEXT,
}
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
            raise ValueError(f"--min-replicas must be at least 1, not {self.min_replicas}")
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"--max-replicas must be at least --min-replicas ({self.max_replicas} <"
                f" {self.min_replicas})"
            )
        if not self.lease_seconds >= 1.0:
            raise ValueError(f"--lease-seconds must be at least 1, not {self.lease_seconds}")


def check_ray_address(address: str | None) -> None:
    """Raises ValueError if it is no address of a Ray cluster; None is one of this command's own."""
    if address in (None, _OF_THIS_MACHINE):
        return
    try:
        split_address(address)
    except ValueError:
        raise ValueError(
            f"--ray-address: {address!r} is not HOST:PORT, as `ray start --head` prints it (port"
            f" 6379), nor {_OF_THIS_MACHINE}, which is the cluster of this machine"
        ) from None


def why_refused(given: Mapping[str, object]) -> str:
    """Why a fleet rejects one of these settings, or "". Call it before building a configuration.

    What ``turret serve`` asks for beside one of them would be refused next.
    """
    for name, why in REFUSED.items():
        if given.get(name) not in (None, ()):
            return f"--{name.replace('_', '-')}: {why}"
    for name in ("address", "http_address"):
        address = given.get(name)
        if isinstance(address, str) and not given.get("insecure") and _is_exposed(address):
            return (
                f"--{name.replace('_', '-')}: {address} is reachable from other machines, and a"
                " fleet listens in plain text: say --insecure, and let TLS end in front of it"
                " (docs/fleet.md)"
            )
    return ""


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
        raise ValueError(
            "--token-file: on a Ray cluster that it joins, a fleet's replicas can be reached from"
            " other machines, whatever --address says: set it, or say --insecure"
        )
    if config.adapters.state_dir is None:
        raise ValueError("a fleet needs --state-dir: what adapters there are is written down there")
    if listen.address.startswith("unix:"):
        raise ValueError("--address: a fleet listens on HOST:PORT")
    host, port = split_address(listen.address)
    http = listen.http_address or f"{listen.address.rpartition(':')[0]}:{DEFAULT_HTTP_PORT}"
    http_host, http_port = split_address(http)
    if http_host != host:
        raise ValueError(f"--http-address: a fleet listens on one host, that of --address ({host})")
    if 0 in (port, http_port) or port == http_port:
        raise ValueError("--address and --http-address need a port each, and not the same")
    return dataclasses.replace(
        config,
        listen=dataclasses.replace(listen, http_address=http),
        adapters=dataclasses.replace(
            config.adapters,
            # Replicas run in other working directories.
            state_dir=config.adapters.state_dir.absolute(),
            adapter_root=_absolute(config.adapters.adapter_root),
        ),
        model=dataclasses.replace(config.model, model=_found_anywhere(config.model.model)),
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
