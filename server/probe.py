"""Asks a running server whether it serves, as a container's health check does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def is_serving(
    address: str,
    service: str = "",
    *,
    timeout_seconds: float = 5.0,
    tls_ca: str | None = None,
    tls_cert: str | None = None,
    tls_key: str | None = None,
) -> tuple[bool, str]:
    """Whether ``service`` (empty: the whole server) answers SERVING in time, and what it answered.

    Raises:
        OSError: A TLS file cannot be read.
    """
    if tls_ca is None:
        channel = grpc.insecure_channel(address)
    else:
        credentials = grpc.ssl_channel_credentials(
            Path(tls_ca).read_bytes(),
            Path(tls_key).read_bytes() if tls_key else None,
            Path(tls_cert).read_bytes() if tls_cert else None,
        )
        channel = grpc.secure_channel(address, credentials)
    with channel:
        try:
            # The generated stub sets its methods in a way that type checkers do not follow.
            stub: Any = health_pb2_grpc.HealthStub(channel)
            answer = stub.Check(
                health_pb2.HealthCheckRequest(service=service), timeout=timeout_seconds
            )
        except grpc.RpcError as error:
            code = error.code().name if isinstance(error, grpc.Call) else "UNKNOWN"
            return False, code
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return answer.status == health_pb2.HealthCheckResponse.SERVING, name
