"""The verb ``turret cluster``: its flags, and checks before Ray is loaded."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import logging
import os
from pathlib import Path

from turret.fleet.serving import fleet_folder
from turret.fleet.serving.plan import (
    REFUSED,
    ClusterPlan,
    check_ray_address,
    fleet_config,
    too_small,
    why_refused,
)
from turret.fleet.words import say
from turret.server import log
from turret.server.basics.extras import how_to_add
from turret.server.basics.settings import SettingsError
from turret.server.command.flags import Settings, add_flags, read_settings
from turret.server.command.parser import EXIT_USAGE, CommandParser
from turret.server.command.preflight import problems
from turret.server.command.start_lines import note, refuse

EXIT_FAILED = 1

_log = logging.getLogger(__name__)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser], text: str) -> None:
    """Adds the verb and its actions; ``text`` is its line in the help."""
    parser = subparsers.add_parser(
        "cluster",
        help=text,
        description="Many replicas as one server, on Ray Serve (pip install 'turret[cluster]').",
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    _add_serve(verbs)
    _add_status(verbs)


def _add_serve(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "serve",
        help="start the replicas and serve until SIGTERM",
        description="Start replicas that serve the same adapters behind one address each for gRPC"
        " and HTTP, until SIGTERM or SIGINT. The flags of turret serve are those of every replica;"
        " --address auto joins the Ray cluster of this machine instead of starting one.",
    )
    fleet = parser.add_argument_group("fleet", "How many replicas, and on which machines.")
    fleet.add_argument("--replicas", type=int, metavar="N", help="replicas (default: 2)")
    fleet.add_argument(
        "--min-replicas", type=int, metavar="N", help="fewest, if the number follows the load"
    )
    fleet.add_argument(
        "--max-replicas",
        type=int,
        metavar="N",
        help="most; one is added while more than four sequences wait on each",
    )
    fleet.add_argument(
        "--ray-address", metavar="HOST:PORT", help="Ray cluster to join (default: start one)"
    )
    fleet.add_argument(
        "--lease-seconds",
        type=float,
        default=5.0,
        metavar="SECONDS",
        help="how long changes of adapters wait for a replica that is silent (default: 5)",
    )
    fleet.add_argument(
        "--stop-without-registry",
        action="store_true",
        help="replicas answer UNAVAILABLE while the registry is away, instead of serving on",
    )
    add_flags(parser, hidden=REFUSED)
    assert isinstance(parser, CommandParser)
    parser.logs = True
    parser.set_defaults(func=serve)


def _add_status(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "status", help="show replicas, revisions and residency", description="Show the fleet."
    )
    parser.add_argument(
        "--state-dir",
        type=Path,
        metavar="DIR",
        help="of a fleet that was started on this machine (default: the one that runs)",
    )
    parser.add_argument(
        "--ray-address", metavar="HOST:PORT", help="of a Ray cluster; auto is this machine's"
    )
    parser.set_defaults(func=status)


def serve(args: argparse.Namespace) -> int:
    """Runs ``turret cluster serve``."""
    if not _has_ray("serve"):
        return EXIT_FAILED
    is_json = getattr(args, "log_format", os.environ.get("TURRET_LOG_FORMAT")) == "json"
    settings = Settings()
    try:
        plan = _plan(args)
        settings = read_settings(args, os.environ)
        is_json = settings.values.get("log_format") == "json"
        if why := why_refused(settings.values):
            raise ValueError(why)
        config = fleet_config(settings.config(), joins=plan.ray_address is not None)
    except SettingsError as error:
        _complain("serve", *settings.placed(error.violations), is_json=is_json)
        return EXIT_USAGE
    except (OSError, ValueError) as error:
        _complain("serve", ("", str(error)), is_json=is_json)
        return EXIT_USAGE
    note(settings.placed(settings.notes), is_json=is_json, command="turret cluster serve")
    # First end an ingress whose fleet was killed: it holds the addresses checked below.
    removed = [] if plan.ray_address is not None else fleet_folder.remove_dead()
    # Replicas use the first free ports from --metrics-address on, so do not check that one.
    listened = dataclasses.replace(config.listen, metrics_address=None)
    looked_at = dataclasses.replace(config, listen=listened)
    # If this command joins a cluster, it may change a running fleet, which uses the addresses.
    if found := problems(looked_at, may_run=plan.ray_address is not None):
        _complain("serve", *settings.placed(found), is_json=is_json)
        return EXIT_FAILED
    level = logging.DEBUG if config.log.verbose else logging.INFO
    log.configure(level, log_format=config.log.log_format)
    for folder in removed:
        _log.info("removed what a fleet that was killed had left", extra=log.fields(folder=folder))
    from turret.fleet.serving.serve import run

    return run(config, plan)


def _plan(args: argparse.Namespace) -> ClusterPlan:
    ray_address = args.ray_address
    if getattr(args, "address", None) == "auto":
        delattr(args, "address")
        ray_address = ray_address or "auto"
    least, most = args.min_replicas, args.max_replicas
    if args.replicas is not None and (least is not None or most is not None):
        raise ValueError(say("REPLICAS_TWICE"))
    if (least is None) != (most is None):
        raise ValueError(say("REPLICAS_HALF"))
    if least is None or most is None:
        least = most = 2 if args.replicas is None else args.replicas
    if args.replicas is not None and args.replicas < 1:
        raise ValueError(too_small("replicas", args.replicas))
    return ClusterPlan(
        ray_address=ray_address,
        min_replicas=least,
        max_replicas=most,
        lease_seconds=args.lease_seconds,
        stops_alone=args.stop_without_registry,
    )


def status(args: argparse.Namespace) -> int:
    """Runs ``turret cluster status``."""
    if not _has_ray("status"):
        return EXIT_FAILED
    from turret.fleet.serving.ray_cluster import join_as_guest
    from turret.fleet.serving.serve import print_status
    from turret.server.errors import UnavailableError

    try:
        check_ray_address(args.ray_address)
    except ValueError as error:
        _complain("status", ("", str(error)))
        return EXIT_USAGE
    try:
        join_as_guest(args.ray_address, args.state_dir)
        from turret.fleet.serving.registry_actor import RayChannel

        print_status(RayChannel().status())
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
