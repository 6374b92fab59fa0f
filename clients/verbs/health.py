"""``turret health``: exits with 0 if a server is serving."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from turret.clients.calls.settings import CallSettings, RetryPolicy
from turret.clients.channel import Tls, check_address, open_channel
from turret.clients.errors import TurretRpcError
from turret.clients.hints import COMMAND_HINTS
from turret.clients.unreached import ANSWERED
from turret.clients.verbs.command import (
    Subparsers,
    add_verb_parser,
    given_tls,
    given_token,
    hint_of,
    print_error,
    print_json,
)
from turret.clients.verbs.flags import positive_seconds, shared

_TIMEOUT_SECONDS = 5.0
_PAUSE_SECONDS = 0.5
# Results that may change while a server starts, whether it already listens or not.
_MAY_CHANGE = ("NOT_SERVING", "UNAVAILABLE", "DEADLINE_EXCEEDED")
_NO_SERVICE = "the server has no such service; omit --service"
_HINTS = {
    **COMMAND_HINTS,
    "DEADLINE_EXCEEDED": "raise --timeout to wait longer for {address}",
}


def add_health(subparsers: Subparsers, text: str) -> None:
    """Add the verb; ``text`` is its line in the help."""
    parser = add_verb_parser(
        subparsers,
        "health",
        text,
        _health,
        shared("--json"),
        description="Query a server's health service, for example as a container's health check."
        f" The default --timeout is {_TIMEOUT_SECONDS:g} s.",
    )
    parser.add_argument(
        "--service", default="", help="full service name (default: the whole server)"
    )
    parser.add_argument(
        "--wait",
        type=positive_seconds,
        metavar="SECONDS",
        help="ask repeatedly until the server is serving, for at most SECONDS (default: ask once)",
    )


def _health(args: argparse.Namespace) -> int:
    try:
        answer = _ask(args)
    except TurretRpcError as error:
        print(_described(error, args), file=sys.stderr)
        return 1
    except OSError as error:
        print_error(error, args)
        return 1
    except ValueError as error:
        print_error(error, args)
        return 2
    if args.json:
        print_json({"status": answer})
        return 0 if answer == "SERVING" else 1
    if answer == "SERVING":
        print(answer)
        return 0
    steps = {
        "NOT_SERVING": _not_serving(args.wait),
        "SERVICE_UNKNOWN": f": {_NO_SERVICE}",
    }
    print(f"{answer}{steps.get(answer, '')}", file=sys.stderr)
    return 1


def _not_serving(waited: float | None) -> str:
    loads = ": the server is loading its model or stopping"
    return f"{loads}; --wait 600 waits until it is serving" if waited is None else loads


def _ask(args: argparse.Namespace) -> str:
    """The answer, or with ``--wait`` the last one."""
    tls, token = given_tls(args), given_token(args)
    end = time.monotonic() + (args.wait or 0)
    said = ""
    while True:
        timeout = args.timeout or _TIMEOUT_SECONDS
        failure: TurretRpcError | None = None
        answer = ""
        try:
            answer = ask(args.address, args.service, timeout_seconds=timeout, tls=tls, token=token)
        except TurretRpcError as error:
            failure = error
        if args.wait and failure is not None and failure.reason in ANSWERED and not said:
            # Something answered, so waiting for a server to start may be futile: print the error
            # now.
            said = _described(failure, args)
            print(f"{said}; retrying", file=sys.stderr)
        code = answer if failure is None else failure.code.name
        if code not in _MAY_CHANGE or time.monotonic() + _PAUSE_SECONDS > end:
            if failure is not None:
                raise failure
            return answer
        time.sleep(_PAUSE_SECONDS)


def _described(error: TurretRpcError, args: argparse.Namespace) -> str:
    if error.code is grpc.StatusCode.NOT_FOUND:
        # Servers describe this in different words, or not at all.
        return f"{error.code.name}: {_NO_SERVICE}"
    return error.described(hint_of(error, args, _HINTS))


def ask(
    address: str, service: str, *, timeout_seconds: float, tls: Tls | None, token: str | None
) -> str:
    """The status of ``service`` (empty: the whole server), such as ``NOT_SERVING``.

    A turret server requires no token for this; a proxy in front of it may.

    Raises:
        TurretRpcError: The server does not answer.
    """
    call = CallSettings.of(token, timeout_seconds, RetryPolicy(0), tls)
    check_address(address, tls)
    with open_channel(grpc, address, tls) as channel:
        try:
            # The generated stub sets its methods in a way that type checkers do not follow.
            stub: Any = health_pb2_grpc.HealthStub(channel)
            answer = stub.Check(
                health_pb2.HealthCheckRequest(service=service),
                timeout=call.timeout,
                metadata=call.metadata,
            )
        except grpc.RpcError as error:
            raise call.failure(error, call.timeout) from None
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
