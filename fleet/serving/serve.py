"""Starts a fleet, waits, and stops it; shows the state of a running fleet."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.table import Table
from rich.text import Text

from turret.clients.verbs.tables import terminal
from turret.fleet.config import ClusterConfig
from turret.fleet.protocol import FleetStatus
from turret.fleet.serving import ingress
from turret.fleet.serving.ray_cluster import STOPPING, RayCluster, cause
from turret.fleet.words import say
from turret.server import log
from turret.server.api.access import NOTHING_TO_RELOAD
from turret.server.basics.machine import available_cpus
from turret.server.basics.settings import split_address
from turret.server.command.entry import Hangup
from turret.server.command.start_lines import refuse
from turret.server.config import Config
from turret.server.errors import UnavailableError
from turret.words import counted

_log = logging.getLogger(__name__)

APPLICATION = "turret"
_SERVICES = (
    "turret.v1.inference_pb2_grpc.add_InferenceServicer_to_server",
    "turret.v1.adapters_pb2_grpc.add_AdaptersServicer_to_server",
    "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server",
)
_START_SECONDS = 600.0
_POLL_SECONDS = 1.0
_WATCH_SECONDS = 0.5


def run(config: ClusterConfig) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit code."""
    stop = threading.Event()
    listen = functools.partial(_listen, config, stop, Hangup())
    listen()
    try:
        with _deferring(listen):
            host, _ = split_address(config.listen.address)
            cluster = RayCluster.open(config.fleet, host, config.state_dir, stop.is_set)
    except UnavailableError as error:
        return _refuse(config, error)
    is_over = threading.Event()
    watch = functools.partial(_end_with_ray, cluster, config.state_dir, is_over)
    threading.Thread(target=watch, name="ray-watch", daemon=True).start()
    try:
        return 0 if stop.is_set() else _serve(config, cluster, stop)
    except (UnavailableError, RuntimeError, ValueError) as error:
        return _refuse(config, error)
    finally:
        is_over.set()
        cluster.close(config.state_dir)
        _log.info("stopped")


def _end_with_ray(cluster: RayCluster, state_dir: Path, is_over: threading.Event) -> None:
    """Ends the fleet if Ray's GCS or raylet dies, because nothing restarts them.

    Otherwise, the replicas would continue for a minute and the ingress even longer. The main thread
    cannot do this, because it may wait for that long in a call of Ray's.
    """
    while not is_over.wait(_WATCH_SECONDS):
        if dead := cluster.dead_process():
            _log.error("a Ray process has died; stopping the fleet", extra=log.fields(process=dead))
            cluster.kill(state_dir)
            os._exit(1)


def _refuse(config: Config, error: Exception) -> int:
    """Report on one line why the fleet does not start; returns the exit code."""
    text = str(error)
    why = cause(text)
    if why != text:
        _log.debug("all output of Ray", extra=log.fields(text=text))
        why += "" if config.log.verbose else " (--verbose logs all output of Ray)"
    refuse([("", why)], is_json=config.log.log_format == "json", command="turret cluster serve")
    return 1


@contextlib.contextmanager
def _deferring(listen: Callable[[], None]) -> Iterator[None]:
    """Defers signals to the end of the block, when handlers are installed again.

    Ray's core installs its own handlers when it connects: a signal at that time would print a stack
    and end this process in the middle of its start. Threads made inside the block get no signals.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        listen()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def _listen(config: Config, stop: threading.Event, hangup: Hangup) -> None:
    for kind in STOPPING:
        signal.signal(kind, lambda *_: stop.set())

    def reload(*_: object) -> None:
        if hangup.is_of_terminal():
            stop.set()
        elif config.security.token_file is None:
            _log.info(NOTHING_TO_RELOAD)
        else:
            _log.info("replicas read --token-file again by themselves when it changes")

    signal.signal(signal.SIGHUP, reload)


def warn_if_crowded(replicas: int, devices: int) -> None:
    """Warns if there are more replicas than this machine can run well.

    Args:
        replicas: The maximum number of replicas.
        devices: The number of GPUs, if they are used; else 0.
    """
    processors = available_cpus()
    if devices and replicas > devices:
        said = log.fields(replicas=replicas, devices=devices)
        _log.warning("more replicas than devices, so some will not start", extra=said)
    elif not devices and replicas > processors:
        said = log.fields(replicas=replicas, processors=processors)
        _log.warning("more replicas than processors, so they slow each other down", extra=said)


def _serve(config: ClusterConfig, cluster: RayCluster, stop: threading.Event) -> int:
    from ray import serve
    from ray.serve.config import HTTPOptions, gRPCOptions
    from ray.serve.schema import LoggingConfig

    from turret.fleet.serving import application, registry_actor

    # Hide Serve's messages in this process: they only report that Serve has started or was found.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if config.fleet.ray_address is None:
        warn_if_crowded(config.fleet.most, application.num_devices(config))
    assert config.listen.http_address is not None
    host, port = split_address(config.listen.address)
    if config.fleet.ray_address is None:
        # Replicas listen on loopback. The ingress listens on the configured host; see
        # write_haproxy.
        host = ingress.LOOPBACK
    serve.start(
        proxy_location="EveryNode",
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
        http_options=HTTPOptions(host=host, port=split_address(config.listen.http_address)[1]),
        grpc_options=gRPCOptions(port=port, grpc_servicer_functions=list(_SERVICES)),
    )
    owner = None
    try:
        registry_actor.start_registry(config.state_dir, config.fleet.lease_seconds)
        cluster.publish(config.state_dir)
        owner = registry_actor.Ownership()
        target = serve.RunTarget(application.deployment(config), APPLICATION, "/")
        # Do not wait here, so that SIGTERM works while the models load.
        serve.run_many([target], wait_for_applications_running=False)
        if _wait_until_up(stop):
            owner.take()
            _log.info(
                "serving",
                extra=log.fields(
                    address=config.listen.address,
                    http=config.listen.http_address,
                    replicas=config.fleet.fewest,
                ),
            )
            while not stop.wait(_POLL_SECONDS) and owner.look():
                pass
    finally:
        if owner is None:
            # An existing application belongs to another fleet.
            if not serve.status().applications:
                serve.shutdown()
        elif owner.is_own:
            _log.info("draining", extra=log.fields(seconds=config.lifecycle.grace_seconds))
            _end()
        else:
            _log.info("another command owns the fleet, which keeps running")
    return 0


def _end() -> None:
    from ray import serve

    from turret.fleet.serving import registry_actor

    try:
        serve.delete(APPLICATION)
        registry_actor.stop_registry()
    finally:
        serve.shutdown()


def _wait_until_up(stop: threading.Event) -> bool:
    """Whether the application runs; False if it should stop first.

    Raises:
        UnavailableError: The fleet does not start; the error has the reason.
    """
    from ray import serve

    waited = 0.0
    while not stop.wait(0.2):
        waited += 0.2
        found = serve.status().applications.get(APPLICATION)
        status = "" if found is None else found.status
        if status == "RUNNING":
            return True
        if status in ("DEPLOY_FAILED", "UNHEALTHY") or waited > _START_SECONDS:
            deployments = () if found is None else found.deployments.values()
            reasons = [each.message for each in deployments if each.message]
            if not reasons:
                raise UnavailableError(say("REPLICAS_NOT_STARTED", seconds=round(waited)))
            raise UnavailableError(say("REPLICAS_FAILED", cause=" ".join(reasons)))
    return False


def print_status(status: FleetStatus) -> None:
    """Print the fleet's state, and one row per replica."""
    base = status.base
    print(f"registry: revision {status.revision}, {counted(status.num_adapters, 'adapter')}")
    members = () if base.merge is None else base.merge.members
    merged = ", ".join(f"{m.name}@{m.generation}={m.weight:g}" for m in members)
    print(f"base: generation {base.generation}{merged and f', merged: {merged}'}")
    if not status.replicas:
        print("no replica has joined yet; see the log of `turret cluster serve`")
        return
    table = Table()
    # Fold a long name onto the next line, because a cut one is useless.
    table.add_column("replica", overflow="fold")
    for heading in ("revision", "lease", "running", "waiting", "in host", "on device"):
        table.add_column(heading, justify="right")
    for replica in status.replicas:
        figures = (replica.running, replica.waiting, replica.num_host, replica.num_device)
        lease = f"{replica.lease_seconds:.1f}s"
        table.add_row(
            Text(replica.name), str(replica.revision), lease, *(str(figure) for figure in figures)
        )
    terminal().print(table)
