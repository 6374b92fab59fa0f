"""The deployment that Ray Serve starts, routes to, watches and stops."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from ray import serve
from starlette.types import ASGIApp, Receive, Scope, Send

from turret.fleet.serving.autoscaling import RUNNING, WAITING
from turret.fleet.serving.grpc_call import from_client
from turret.fleet.serving.registry_actor import RayChannel
from turret.fleet.serving.replica_server import ReplicaServer
from turret.server import log
from turret.server.config import Config
from turret.v1 import adapters_pb2, inference_pb2


def _call(service: str, method: str, *, is_stream: bool) -> Any:
    """A method of the deployment. Serve calls the one with the name of the gRPC method."""

    async def answer(self: Any, request: Any, grpc_context: Any) -> Any:
        return await self._server.answer(service, method, request, grpc_context)

    async def answer_stream(self: Any, request: Any, grpc_context: Any) -> AsyncIterator[Any]:
        async for message in self._server.answer_stream(service, method, request, grpc_context):
            yield message

    return answer_stream if is_stream else answer


_CALLS: Any = type(
    "_CALLS",
    (),
    {
        method.name: _call(service.name, method.name, is_stream=method.server_streaming)
        for file in (inference_pb2, adapters_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    },
)


@serve.ingress()
class Replica(_CALLS):
    """One engine, and a method for each of turret.v1 and of gRPC's health.

    Args:
        config: The resolved configuration.
        stops_alone: See ``ReplicaServer``.
    """

    async def __init__(self, config: Config, stops_alone: bool) -> None:  # type: ignore[misc]
        self._is_stopped = True
        level = logging.DEBUG if config.log.verbose else logging.INFO
        log.configure(level, log_format=config.log.log_format)
        name = serve.get_replica_context().replica_id.unique_id
        self._server = server = ReplicaServer(config, name, RayChannel(), stops_alone=stops_alone)
        self._config = config
        await server.start()
        self._is_stopped = False

    def __serve_build_asgi_app__(self) -> ASGIApp:
        from turret.server.http.server import application

        server = self._server
        made = application(
            self._config.listen,
            inference=server.inference,
            adapters=server.adapters,
            metrics=server.metrics,
            tokens=server.tokens,
            shares=server.shares,
            failures=server.failures,
        )

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                await made(from_client(scope), receive, send)
            elif scope["type"] == "lifespan":
                # The replica manages its own start and stop, so just answer the messages.
                for stage in ("startup", "shutdown"):
                    await receive()
                    await send({"type": f"lifespan.{stage}.complete"})

        return answer

    async def __del__(self) -> None:
        # Serve awaits this when it removes the replica, once its calls have ended or timed out.
        if not self._is_stopped:
            self._is_stopped = True
            await self._server.stop()

    async def check_health(self) -> None:
        self._server.check()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        server = self._server
        return {WAITING: float(server.num_waiting), RUNNING: float(server.num_running)}

    # grpc.health.v1.Health

    async def Check(self, request: health_pb2.HealthCheckRequest, grpc_context: Any) -> Any:
        return await self._server.check_service(request, grpc_context)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, grpc_context: Any
    ) -> AsyncIterator[Any]:
        # A watch would keep a replica from ending. Clients treat this status as serving.
        grpc_context.set_code(grpc.StatusCode.UNIMPLEMENTED)
        grpc_context.set_details("a fleet's health cannot be watched; ask for it")
        return
        yield
