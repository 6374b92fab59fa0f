"""The deployment: what Ray Serve starts, routes to, watches and stops."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from ray import serve
from starlette.types import ASGIApp, Receive, Scope, Send

from turret.fleet.serving.autoscaling import RUNNING, WAITING
from turret.fleet.serving.forwarded import from_client
from turret.fleet.serving.registry_actor import RayChannel
from turret.fleet.serving.replica_server import ReplicaServer
from turret.server import log
from turret.server.config import Config
from turret.v1 import adapters_pb2, inference_pb2

_INFERENCE, _ADAPTERS = "Inference", "Adapters"


@serve.ingress()
class Replica:
    """One engine. Its methods are those of turret.v1, by name.

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
                # The replica starts and stops by itself; this only has to be answered.
                for stage in ("startup", "shutdown"):
                    await receive()
                    await send({"type": f"lifespan.{stage}.complete"})

        return answer

    async def __del__(self) -> None:
        # Serve awaits it when the replica is to go, after its calls have ended or their time is up.
        if not self._is_stopped:
            self._is_stopped = True
            await self._server.stop()

    async def check_health(self) -> None:
        self._server.check()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        server = self._server
        return {WAITING: float(server.num_waiting), RUNNING: float(server.num_running)}

    # turret.v1.Inference

    async def Generate(self, request: inference_pb2.GenerateRequest, grpc_context: Any) -> Any:
        return await self._server.answer(_INFERENCE, "Generate", request, grpc_context)

    async def GenerateStream(
        self, request: inference_pb2.GenerateRequest, grpc_context: Any
    ) -> AsyncIterator[Any]:
        answers = self._server.answer_stream(_INFERENCE, "GenerateStream", request, grpc_context)
        async for message in answers:
            yield message

    async def Score(self, request: inference_pb2.ScoreRequest, grpc_context: Any) -> Any:
        return await self._server.answer(_INFERENCE, "Score", request, grpc_context)

    async def Embed(self, request: inference_pb2.EmbedRequest, grpc_context: Any) -> Any:
        return await self._server.answer(_INFERENCE, "Embed", request, grpc_context)

    async def Classify(self, request: inference_pb2.ClassifyRequest, grpc_context: Any) -> Any:
        return await self._server.answer(_INFERENCE, "Classify", request, grpc_context)

    async def Tokenize(self, request: inference_pb2.TokenizeRequest, grpc_context: Any) -> Any:
        return await self._server.answer(_INFERENCE, "Tokenize", request, grpc_context)

    async def GetModel(self, request: inference_pb2.GetModelRequest, grpc_context: Any) -> Any:
        return await self._server.answer(_INFERENCE, "GetModel", request, grpc_context)

    # turret.v1.Adapters

    async def LoadAdapter(self, request: adapters_pb2.LoadAdapterRequest, grpc_context: Any) -> Any:
        return await self._server.answer(_ADAPTERS, "LoadAdapter", request, grpc_context)

    async def ReplaceAdapter(
        self, request: adapters_pb2.ReplaceAdapterRequest, grpc_context: Any
    ) -> Any:
        return await self._server.answer(_ADAPTERS, "ReplaceAdapter", request, grpc_context)

    async def UploadAdapter(self, requests: Any, grpc_context: Any) -> Any:
        return await self._server.answer(_ADAPTERS, "UploadAdapter", requests, grpc_context)

    async def GetAdapter(self, request: adapters_pb2.GetAdapterRequest, grpc_context: Any) -> Any:
        return await self._server.answer(_ADAPTERS, "GetAdapter", request, grpc_context)

    async def ListAdapters(
        self, request: adapters_pb2.ListAdaptersRequest, grpc_context: Any
    ) -> Any:
        return await self._server.answer(_ADAPTERS, "ListAdapters", request, grpc_context)

    async def UnloadAdapter(
        self, request: adapters_pb2.UnloadAdapterRequest, grpc_context: Any
    ) -> Any:
        return await self._server.answer(_ADAPTERS, "UnloadAdapter", request, grpc_context)

    async def PinAdapter(self, request: adapters_pb2.PinAdapterRequest, grpc_context: Any) -> Any:
        return await self._server.answer(_ADAPTERS, "PinAdapter", request, grpc_context)

    async def UnpinAdapter(
        self, request: adapters_pb2.UnpinAdapterRequest, grpc_context: Any
    ) -> Any:
        return await self._server.answer(_ADAPTERS, "UnpinAdapter", request, grpc_context)

    async def ExportAdapter(
        self, request: adapters_pb2.ExportAdapterRequest, grpc_context: Any
    ) -> AsyncIterator[Any]:
        answers = self._server.answer_stream(_ADAPTERS, "ExportAdapter", request, grpc_context)
        async for message in answers:
            yield message

    async def FuseAdapters(
        self, request: adapters_pb2.FuseAdaptersRequest, grpc_context: Any
    ) -> Any:
        return await self._server.answer(_ADAPTERS, "FuseAdapters", request, grpc_context)

    async def MergeAdapters(
        self, request: adapters_pb2.MergeAdaptersRequest, grpc_context: Any
    ) -> Any:
        return await self._server.answer(_ADAPTERS, "MergeAdapters", request, grpc_context)

    async def UnmergeAdapters(
        self, request: adapters_pb2.UnmergeAdaptersRequest, grpc_context: Any
    ) -> Any:
        return await self._server.answer(_ADAPTERS, "UnmergeAdapters", request, grpc_context)

    async def GetMergeState(
        self, request: adapters_pb2.GetMergeStateRequest, grpc_context: Any
    ) -> Any:
        return await self._server.answer(_ADAPTERS, "GetMergeState", request, grpc_context)

    # grpc.health.v1.Health

    async def Check(self, request: health_pb2.HealthCheckRequest, grpc_context: Any) -> Any:
        return await self._server.check_service(request, grpc_context)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, grpc_context: Any
    ) -> AsyncIterator[Any]:
        # A watcher would keep a replica from ending; clients that hear this take it for serving.
        grpc_context.set_code(grpc.StatusCode.UNIMPLEMENTED)
        grpc_context.set_details("a fleet's health cannot be watched; ask for it")
        return
        yield
