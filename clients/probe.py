"""Asks a running server whether it serves, as a container's health check does."""

from __future__ import annotations

from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from turret.clients.calls.settings import CallSettings, RetryPolicy
from turret.clients.channel import Tls, check_address, open_channel
from turret.clients.errors import TurretRpcError


def is_serving(
    address: str,
    service: str = "",
    *,
    timeout_seconds: float = 5.0,
    tls: Tls | None = None,
    token: str | None = None,
) -> tuple[bool, str]:
    """Whether ``service`` (empty: the whole server) answers SERVING in time, and its answer.

    A turret server requires no token for this; a proxy in front of it may.
    """
    try:
        answer = ask(address, service, timeout_seconds=timeout_seconds, tls=tls, token=token)
    except TurretRpcError as error:
        answer = error.code.name
    return answer == "SERVING", answer


def ask(
    address: str, service: str, *, timeout_seconds: float, tls: Tls | None, token: str | None
) -> str:
    """The answer of ``service``, such as ``NOT_SERVING``; arguments are those of ``is_serving``.

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
