"""``turret health``: whether a server serves, as an exit code."""

from __future__ import annotations

import argparse
import sys

from turret.clients.probe import is_serving
from turret.clients.verbs.command import (
    connection_parser,
    given_tls,
    given_token,
    print_error,
)

_TIMEOUT_SECONDS = 5.0


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "health",
        help="exit 0 if a server is serving, 1 if not",
        description="Ask a server's health service; for container health checks."
        f" Without --timeout it waits {_TIMEOUT_SECONDS:g} s.",
        parents=[connection_parser()],
    )
    parser.add_argument(
        "--service", default="", help="full service name (default: the whole server)"
    )
    parser.set_defaults(func=_health)


def _health(args: argparse.Namespace) -> int:
    try:
        serving, answer = is_serving(
            args.address,
            args.service,
            timeout_seconds=args.timeout or _TIMEOUT_SECONDS,
            tls=given_tls(args),
            token=given_token(args),
        )
    except OSError as error:
        print_error(error)
        return 1
    except ValueError as error:
        print_error(error)
        return 2
    if serving:
        print(answer)
        return 0
    print(f"{answer}{_next_step(answer, args.address)}", file=sys.stderr)
    return 1


def _next_step(answer: str, address: str) -> str:
    steps = {
        "UNAVAILABLE": f": no server answers at {address}; `turret serve` starts one, --address"
        " names another, and one with TLS wants --tls or --tls-ca",
        "DEADLINE_EXCEEDED": f": no answer from {address} in time; --timeout waits longer",
        "NOT_SERVING": ": the server loads its model, or stops",
        "SERVICE_UNKNOWN": ": the server has no such service; leave --service out",
        "NOT_FOUND": ": the server has no such service; leave --service out",
    }
    return steps.get(answer, "")
