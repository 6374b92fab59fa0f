"""The verb ``turret cluster``: its flags, and checks before Ray is loaded."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import logging
from pathlib import Path

from turret.fleet.config import REFUSED, ClusterConfig, as_ray_address
from turret.fleet.serving import fleet_folder
from turret.server import log
from turret.server.basics.names import how_to_add
from turret.server.command.flags import add_flags, resolved
from turret.server.command.parser import EXIT_USAGE
from turret.server.command.preflight import problems
from turret.server.command.start_lines import introduce, refuse

EXIT_FAILED = 1

_log = logging.getLogger(__name__)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser], text: str) -> None:
    """Adds the verb and its actions; ``text`` is its line in the help."""
    parser = subparsers.add_parser(
        "cluster",
        help=text,
        description="Run many replicas as one server on Ray Serve (pip install 'turret[cluster]').",
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    _add_serve(verbs)
    _add_status(verbs)


def _add_serve(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "serve",
        help="start the replicas and serve until SIGTERM",
        description="Start replicas that serve the same adapters behind one address each for gRPC"
        " and HTTP, until SIGTERM or SIGINT. Flags of turret serve apply to every replica.",
    )
    add_flags(parser, ClusterConfig, hidden=(*REFUSED, "training_bytes"))
    parser.set_defaults(func=serve)


def _add_status(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "status", help="show replicas, revisions and residency", description="Show the fleet."
    )
    parser.add_argument(
        "--state-dir",
        type=Path,
        metavar="DIR",
        help="state directory of a fleet that was started on this machine (default: the running"
        " fleet's)",
    )
    parser.add_argument(
        "--ray-address", metavar="HOST:PORT", help="address of a Ray cluster, or auto"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(func=status)


def serve(args: argparse.Namespace) -> int:
    """Runs ``turret cluster serve``."""
    if not _has_ray("serve"):
        return EXIT_FAILED
    if not (found := resolved(args, "turret cluster serve", ClusterConfig)):
        return EXIT_USAGE
    settings, config = found
    joins = config.fleet.ray_address is not None
    # First end an ingress whose fleet was killed: it holds the addresses checked below.
    removed = [] if joins else fleet_folder.remove_dead()
    # Replicas use the first free ports from --metrics-address on, so do not check that one.
    listened = dataclasses.replace(config.listen, metrics_address=None, http_address=config.http)
    looked_at = dataclasses.replace(config, listen=listened)
    # If this command joins a cluster, it may change a running fleet that uses the addresses.
    if found := problems(looked_at, may_run=joins):
        _complain("serve", *settings.placed(found), is_json=config.log.log_format == "json")
        return EXIT_FAILED
    level = logging.DEBUG if config.log.verbose else logging.INFO
    log.configure(level, log_format=config.log.log_format)
    introduce(settings, config)
    for folder in removed:
        _log.info("removed the files of a fleet that was killed", extra=log.fields(folder=folder))
    from turret.fleet.serving.serve import run

    return run(config.for_replicas())


def status(args: argparse.Namespace) -> int:
    """Runs ``turret cluster status``."""
    if not _has_ray("status"):
        return EXIT_FAILED
    from turret.clients.verbs.command import print_json
    from turret.fleet.serving.ray_cluster import join_as_guest
    from turret.fleet.serving.serve import print_status
    from turret.server.errors import UnavailableError

    try:
        as_ray_address(args.ray_address or "auto")
    except ValueError as error:
        _complain("status", ("--ray-address", str(error)))
        return EXIT_USAGE
    try:
        join_as_guest(args.ray_address, args.state_dir)
        from turret.fleet.serving.registry_actor import RayChannel

        found = RayChannel().status()
        print_json(found) if args.json else print_status(found)
    except UnavailableError as error:
        _complain("status", ("", str(error)))
        return EXIT_FAILED
    return 0


def _has_ray(verb: str) -> bool:
    if importlib.util.find_spec("ray") is not None:
        return True
    _complain(verb, ("", f"Ray is not installed; {how_to_add('cluster')}"))
    return False


def _complain(verb: str, *found: tuple[str, str], is_json: bool = False) -> None:
    refuse(found, is_json=is_json, command=f"turret cluster {verb}")
