"""``turret health``: whether a server serves, as an exit code."""

from __future__ import annotations

import argparse
import sys

from turret.clients.errors import TurretRpcError
from turret.clients.probe import ask
from turret.clients.unreached import in_flags
from turret.clients.verbs.command import (
    connection_parser,
    given_tls,
    given_token,
    print_error,
)

_TIMEOUT_SECONDS = 5.0
_NO_SERVICE = "the server has no such service; leave --service out"


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
        answer = ask(
            args.address,
            args.service,
            timeout_seconds=args.timeout or _TIMEOUT_SECONDS,
            tls=given_tls(args),
            token=given_token(args),
        )
    except TurretRpcError as error:
        print(f"{error.code.name}: {_why_not(error, args)}", file=sys.stderr)
        return 1
    except OSError as error:
        print_error(error, args)
        return 1
    except ValueError as error:
        print_error(error, args)
        return 2
    if answer == "SERVING":
        print(answer)
        return 0
    steps = {
        "NOT_SERVING": ": the server loads its model, or stops",
        "SERVICE_UNKNOWN": f": {_NO_SERVICE}",
    }
    print(f"{answer}{steps.get(answer, '')}", file=sys.stderr)
    return 1


def _why_not(error: TurretRpcError, args: argparse.Namespace) -> str:
    match error.code.name:
        case "DEADLINE_EXCEEDED":
            return f"no answer from {args.address} in time; --timeout waits longer"
        case "NOT_FOUND":
            return _NO_SERVICE
        case "UNAVAILABLE" if not error.reason:
            return in_flags(error.message, args.address)
    return error.message
