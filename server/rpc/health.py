"""``grpc.health.v1`` per service.

grpcio's own asyncio servicer drops the other watchers of a service when one of them leaves, and
keeps watchers open while the server stops; this one does neither.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthServicer(health_pb2_grpc.HealthServicer):
    """Holds one status for all services: they live and die with the engine.

    Args:
        services: Full service names. The empty name, the whole server, is always there.
    """

    def __init__(self, services: Iterable[str]) -> None:
        self._services = {"", *services}
        self._status = NOT_SERVING
        self._is_closed = False
        self._changed = asyncio.Event()

    def set_serving(self, serving: bool) -> None:
        """Set the status for later checks, and notify all watchers."""
        self._status = SERVING if serving else NOT_SERVING
        self._wake()

    def close(self) -> None:
        """Set NOT_SERVING for good; watchers are notified and their calls end."""
        self._is_closed = True
        self.set_serving(False)

    def _wake(self) -> None:
        # Every change has an event of its own, so a slow watcher misses none.
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in self._services:
            # Set the status instead of raising: see CallInterceptor.run.
            context.set_code(grpc.StatusCode.NOT_FOUND)
            context.set_details("unknown service")
        return health_pb2.HealthCheckResponse(status=self._status)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        last = None
        while True:
            changed = self._changed
            status = self._status if request.service in self._services else _UNKNOWN
            if status != last:
                yield health_pb2.HealthCheckResponse(status=status)
                last = status
            if self._is_closed:
                return
            await changed.wait()
