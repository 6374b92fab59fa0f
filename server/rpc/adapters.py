"""The control plane over gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from turret.server.api.admin.adapters import Adapters
from turret.server.rpc.interceptor import current_call
from turret.v1 import adapters_pb2, adapters_pb2_grpc

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
