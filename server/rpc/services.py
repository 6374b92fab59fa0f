"""The services over gRPC: the control plane, the data plane, health."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from turret.server.api.admin import Adapters
from turret.server.api.inference import Inference
from turret.server.rpc.interceptor import current_call, current_party
from turret.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc

# The Adapters service.


_Context = grpc.aio.ServicerContext[Any, Any]


class AdaptersServicer(adapters_pb2_grpc.AdaptersServicer):
    """Hands every call to ``Adapters``."""

    def __init__(self, adapters: Adapters) -> None:
        self._adapters = adapters

    async def LoadAdapter(
        self, request: adapters_pb2.LoadAdapterRequest, context: _Context
    ) -> adapters_pb2.Adapter:
        return await self._adapters.load(request, current_call())

    async def ReplaceAdapter(
        self, request: adapters_pb2.ReplaceAdapterRequest, context: _Context
    ) -> adapters_pb2.Adapter:
        return await self._adapters.replace(request, current_call())

    async def UploadAdapter(
        self,
        request_iterator: AsyncIterator[adapters_pb2.UploadAdapterRequest],
        context: _Context,
    ) -> adapters_pb2.Adapter:
        return await self._adapters.upload(aiter(request_iterator), current_call())

    async def RollbackAdapter(
        self, request: adapters_pb2.RollbackAdapterRequest, context: _Context
    ) -> adapters_pb2.Adapter:
        return await self._adapters.rollback(request, current_call())

    async def SetAlias(
        self, request: adapters_pb2.SetAliasRequest, context: _Context
    ) -> adapters_pb2.Alias:
        return await self._adapters.set_alias(request, current_call())

    async def DeleteAlias(
        self, request: adapters_pb2.DeleteAliasRequest, context: _Context
    ) -> adapters_pb2.DeleteAliasResponse:
        await self._adapters.delete_alias(request)
        return adapters_pb2.DeleteAliasResponse()

    async def ListAliases(
        self, request: adapters_pb2.ListAliasesRequest, context: _Context
    ) -> adapters_pb2.ListAliasesResponse:
        return adapters_pb2.ListAliasesResponse(aliases=self._adapters.aliases())

    async def GetAdapter(
        self, request: adapters_pb2.GetAdapterRequest, context: _Context
    ) -> adapters_pb2.Adapter:
        return await self._adapters.get(request, current_call())

    async def ListAdapters(
        self, request: adapters_pb2.ListAdaptersRequest, context: _Context
    ) -> adapters_pb2.ListAdaptersResponse:
        return await self._adapters.list_page(request)

    async def UnloadAdapter(
        self, request: adapters_pb2.UnloadAdapterRequest, context: _Context
    ) -> adapters_pb2.UnloadAdapterResponse:
        await self._adapters.unload(request, current_call())
        return adapters_pb2.UnloadAdapterResponse()

    async def PinAdapter(
        self, request: adapters_pb2.PinAdapterRequest, context: _Context
    ) -> adapters_pb2.Adapter:
        return await self._adapters.pin(request, current_call())

    async def UnpinAdapter(
        self, request: adapters_pb2.UnpinAdapterRequest, context: _Context
    ) -> adapters_pb2.Adapter:
        return await self._adapters.unpin(request, current_call())

    def ExportAdapter(
        self, request: adapters_pb2.ExportAdapterRequest, context: _Context
    ) -> AsyncIterator[adapters_pb2.ExportAdapterResponse]:
        return self._adapters.export(request, current_call())

    async def FuseAdapters(
        self, request: adapters_pb2.FuseAdaptersRequest, context: _Context
    ) -> adapters_pb2.FuseAdaptersResponse:
        return await self._adapters.fuse(request, current_call())

    async def MergeAdapters(
        self, request: adapters_pb2.MergeAdaptersRequest, context: _Context
    ) -> adapters_pb2.MergeState:
        return await self._adapters.merge(request, current_call())

    async def UnmergeAdapters(
        self, request: adapters_pb2.UnmergeAdaptersRequest, context: _Context
    ) -> adapters_pb2.MergeState:
        return await self._adapters.unmerge()

    async def GetMergeState(
        self, request: adapters_pb2.GetMergeStateRequest, context: _Context
    ) -> adapters_pb2.MergeState:
        return self._adapters.merge_state()


# The Inference service.


# gRPC allows timeouts of up to 11,000 years, but no request runs for longer than 30 days.
_MAX_DEADLINE_SECONDS = 30 * 86400.0


def _deadline(context: _Context) -> float | None:
    """The deadline on the ``time.monotonic()`` clock; None if there is none or it is far off."""
    remaining = context.time_remaining()
    if remaining is None or remaining > _MAX_DEADLINE_SECONDS:
        return None
    return time.monotonic() + remaining


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """Hands every call to ``Inference``."""

    def __init__(self, inference: Inference) -> None:
        self._inference = inference

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: _Context
    ) -> inference_pb2.GenerateResponse:
        answer = self._inference.generate_whole(request, current_call(), _deadline(context))
        # Drop our reference so that the message is freed once it is converted.
        del request
        return await answer

    def GenerateStream(
        self, request: inference_pb2.GenerateRequest, context: _Context
    ) -> AsyncIterator[inference_pb2.GenerateChunk]:
        return self._inference.generate(request, current_call(), _deadline(context))

    async def Score(
        self, request: inference_pb2.ScoreRequest, context: _Context
    ) -> inference_pb2.ScoreResponse:
        answer = self._inference.score(request, current_call(), _deadline(context))
        # Drop our reference so that the message is freed once it is converted.
        del request
        return await answer

    async def Embed(
        self, request: inference_pb2.EmbedRequest, context: _Context
    ) -> inference_pb2.EmbedResponse:
        call, party = current_call(), current_party()
        return await self._inference.embed(request, call, party, _deadline(context))

    async def Classify(
        self, request: inference_pb2.ClassifyRequest, context: _Context
    ) -> inference_pb2.ClassifyResponse:
        call, party = current_call(), current_party()
        return await self._inference.classify(request, call, party, _deadline(context))

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: _Context
    ) -> inference_pb2.TokenizeResponse:
        return await self._inference.tokenize(request, current_call())

    async def GetModel(
        self, request: inference_pb2.GetModelRequest, context: _Context
    ) -> inference_pb2.GetModelResponse:
        return self._inference.model()


# The health service, ``grpc.health.v1``.
#
# grpcio's own asyncio servicer drops all watchers of a service when one of them leaves, and keeps
# watchers open while the server stops. This servicer does neither.


SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthServicer(health_pb2_grpc.HealthServicer):
    """Reports the same status for all services, because all of them depend on the engine.

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
        # Every change has its own event, so even a slow watcher always sees the latest status.
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
