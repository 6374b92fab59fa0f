"""``turret health``: exits with 0 if a server is serving."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from turret.clients.calls import CallSettings, RetryPolicy
from turret.clients.channel import open_channel
from turret.clients.client import TurretClient
from turret.clients.errors import TurretRpcError
from turret.clients.verbs import command

_TIMEOUT_SECONDS = 5.0
_PAUSE_SECONDS = 0.5
# Results that may change while a server starts, whether it already listens or not.
_MAY_CHANGE = ("NOT_SERVING", "UNAVAILABLE", "DEADLINE_EXCEEDED")


def add_health(subparsers: command.Subparsers, text: str) -> None:
    """Add the verb; ``text`` is its line in the help."""
    flags: command.Flags = {
        **command.shared("--json"),
        "--wait": command.flag(
            "ask repeatedly until the server is serving, for at most SECONDS (default: ask once)",
            type=command.positive_seconds,
            default=0.0,
            metavar="SECONDS",
        ),
    }
    description = (
        "Query a server's health service, for example as a container's health check."
        f" The default --timeout is {_TIMEOUT_SECONDS:g} s."
    )
    command.add_verb_parser(
        subparsers, "health", text, _health, flags, description=description
    ).set_defaults(timeout=_TIMEOUT_SECONDS)


def _health(args: argparse.Namespace, _: TurretClient) -> int:
    call = CallSettings.of(command.given_token(args), args.timeout, RetryPolicy(0))
    end = time.monotonic() + args.wait
    while True:
        failure: TurretRpcError | None = None
        try:
            answer = _ask(args, call)
        except TurretRpcError as error:
            answer, failure = error.code.name, error
        if answer not in _MAY_CHANGE or time.monotonic() + _PAUSE_SECONDS > end:
            break
        time.sleep(_PAUSE_SECONDS)
    if failure is not None:
        raise failure
    if args.json:
        command.print_json({"status": answer})
    else:
        print(answer, file=sys.stdout if answer == "SERVING" else sys.stderr)
    return 0 if answer == "SERVING" else 1


def _ask(args: argparse.Namespace, call: CallSettings) -> str:
    """The status of the server, such as ``NOT_SERVING``.

    A turret server requires no token for this; a proxy in front of it may.

    Raises:
        TurretRpcError: The server does not answer.
    """
    with open_channel(grpc, args.address, command.given_tls(args)) as channel:
        try:
            # The generated stub sets its methods in a way that type checkers do not follow.
            stub: Any = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest()
            answer = stub.Check(request, timeout=call.timeout, metadata=call.metadata)
        except grpc.RpcError as error:
            raise call.failure(error, call.timeout) from None
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
