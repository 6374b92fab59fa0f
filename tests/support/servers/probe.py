"""A health check of a server, and free ports."""

from __future__ import annotations

import socket
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from turret.clients.channel import Tls, open_channel

_SECONDS = 5.0


def is_serving(
    address: str, service: str = "", *, tls: Tls | None = None, token: str | None = None
) -> tuple[bool, str]:
    """Whether ``service`` (empty: the whole server) answers SERVING, and its answer."""
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    request = health_pb2.HealthCheckRequest(service=service)
    with open_channel(grpc, address, tls) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            status = stub.Check(request, timeout=_SECONDS, metadata=metadata).status
        except grpc.RpcError as error:
            return False, error.code().name  # type: ignore[attr-defined]
    answer = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
    return answer == "SERVING", answer


def free_port() -> int:
    """A port without a listener."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]
