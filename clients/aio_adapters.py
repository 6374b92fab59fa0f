"""The client of the ``Adapters`` service, reached as ``AsyncTurretClient.adapters``."""
# `timeout` is the call's deadline, which travels to the server; asyncio.timeout would not.
# ruff: noqa: ASYNC109

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from typing import Any

import grpc

from turret.clients.calls.aio import Connection, told_early, waiting
from turret.clients.calls.aio_unary import call_async
from turret.clients.calls.settings import CallSettings, stream_timeout
from turret.clients.messages.adapter_files import ExportWriter, upload_messages
from turret.clients.messages.adapter_requests import (
    filled,
    fuse_request,
    list_request,
    merge_request,
    path_text,
    unload_request,
)
from turret.clients.messages.mix import AdaptersLike
from turret.clients.messages.results import Adapter, Fusion, MergeState
from turret.v1 import adapters_pb2


class AsyncAdaptersClient:
    """Manages a server's adapters. Use it as ``client.adapters`` of an ``AsyncTurretClient``.

    Calls go to the client's ``admin_address``. Every method raises
    :class:`~turret.clients.errors.TurretRpcError` if the server rejects the call or fails.
    ``timeout`` is a deadline in seconds.
    """

    def __init__(self, connection: Connection, settings: CallSettings) -> None:
        self._connection = connection
        self._settings = settings

    async def load(
        self,
        name: str,
        path: str | os.PathLike[str],
        *,
        pinned: bool = False,
        task: int | None = None,
        chat_template: str | None = None,
        timeout: float | None = None,
    ) -> Adapter:
        """Register the adapter in ``path``, a directory relative to the server's adapter root.

        If the files contain several tasks, ``task`` chooses one of them. ``chat_template`` is a
        Jinja template to use instead of the one in the files.
        """
        request = filled(
            adapters_pb2.LoadAdapterRequest(),
            name=name,
            path=path_text(path),
            pinned=pinned,
            task=task,
            chat_template=chat_template,
        )
        return Adapter.from_proto(await self._unary("LoadAdapter", request, timeout))

    async def upload(
        self,
        name: str,
        directory: str | os.PathLike[str],
        *,
        pinned: bool = False,
        replace: bool = False,
        expected_generation: int | None = None,
        task: int | None = None,
        chat_template: str | None = None,
        timeout: float | None = None,
    ) -> Adapter:
        """Send an adapter's files and register it, or with ``replace`` a new generation of it.

        Raises:
            FileNotFoundError: The directory contains no adapter.
            ValueError: One of the files is empty.
        """

        def messages() -> object:
            return upload_messages(
                name,
                directory,
                pinned=pinned,
                replace=replace,
                expected_generation=expected_generation,
                task=task,
                chat_template=chat_template,
            )

        send = told_early(self._connection.adapters.UploadAdapter)
        return Adapter.from_proto(await call_async(send, messages, self._settings, timeout))

    async def replace(
        self,
        name: str,
        path: str | os.PathLike[str],
        *,
        expected_generation: int | None = None,
        task: int | None = None,
        chat_template: str | None = None,
        timeout: float | None = None,
    ) -> Adapter:
        """Make the weights in ``path`` (as in :meth:`load`) the adapter's new generation.

        With ``expected_generation``, the call succeeds only if that is the current generation: if
        two callers replace the same generation, the second gets
        :class:`~turret.clients.errors.FailedPreconditionError`.
        """
        request = filled(
            adapters_pb2.ReplaceAdapterRequest(),
            name=name,
            path=path_text(path),
            expected_generation=expected_generation,
            task=task,
            chat_template=chat_template,
        )
        return Adapter.from_proto(
            await self._unary("ReplaceAdapter", request, timeout, repeatable=False)
        )

    async def get(self, name: str, *, timeout: float | None = None) -> Adapter:
        """Return one adapter."""
        request = filled(adapters_pb2.GetAdapterRequest(), name=name)
        return Adapter.from_proto(await self._unary("GetAdapter", request, timeout))

    def list(
        self,
        *,
        method: str | None = None,
        residency: str | None = None,
        page_size: int = 0,
        timeout: float | None = None,
    ) -> AsyncIterator[Adapter]:
        """Iterate over the adapters by name; pages are fetched as they are needed.

        Args:
            method: A method such as ``lora``; None means any.
            residency: ``disk``, ``host`` or ``device``; None means any.
            page_size: Adapters per call; 0 means the server's default.
            timeout: Deadline in seconds of each page.

        Raises:
            ValueError: The residency is unknown.
        """
        request = list_request(page_size, "", method, residency)
        return self._pages(request, timeout)

    async def _pages(
        self, request: adapters_pb2.ListAdaptersRequest, timeout: float | None
    ) -> AsyncIterator[Adapter]:
        while True:
            page = await self._unary("ListAdapters", request, timeout)
            for adapter in page.adapters:
                yield Adapter.from_proto(adapter)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def unload(
        self,
        name: str,
        *,
        mode: str = "drain",
        drain_seconds: float | None = None,
        expected_generation: int | None = None,
        timeout: float | None = None,
    ) -> None:
        """Unregister an adapter.

        Args:
            name: A registered name.
            mode: ``drain`` lets the requests that use it finish, ``force`` aborts them.
            drain_seconds: Longest wait for these requests; None means the server's default.
            expected_generation: As in :meth:`replace`.
            timeout: Deadline in seconds.

        Raises:
            ValueError: The mode is unknown.
        """
        request = unload_request(name, mode, drain_seconds, expected_generation)
        await self._unary("UnloadAdapter", request, timeout, repeatable=False)

    async def pin(self, name: str, *, timeout: float | None = None) -> Adapter:
        """Keep an adapter in memory and registered until it is unpinned."""
        request = filled(adapters_pb2.PinAdapterRequest(), name=name)
        return Adapter.from_proto(await self._unary("PinAdapter", request, timeout))

    async def unpin(self, name: str, *, timeout: float | None = None) -> Adapter:
        """Allow an adapter to be evicted and unloaded again."""
        request = filled(adapters_pb2.UnpinAdapterRequest(), name=name)
        return Adapter.from_proto(await self._unary("UnpinAdapter", request, timeout))

    async def fuse(
        self,
        name: str,
        adapters: AdaptersLike,
        *,
        combination: str | None = None,
        rank: int | None = None,
        energy: float | None = None,
        density: float | None = None,
        majority_sign_method: str | None = None,
        seed: int | None = None,
        timeout: float | None = None,
    ) -> Fusion:
        """Fuse a mix into a new adapter; arguments are the fields of ``FuseAdaptersRequest``."""
        request = fuse_request(
            name,
            adapters,
            combination=combination,
            rank=rank,
            energy=energy,
            density=density,
            majority_sign_method=majority_sign_method,
            seed=seed,
        )
        return Fusion.from_proto(await self._unary("FuseAdapters", request, timeout))

    async def merge(
        self,
        adapters: AdaptersLike,
        *,
        precision: str = "auto",
        timeout: float | None = None,
    ) -> MergeState:
        """Merge a mix into the base model, stored as ``nf4`` or ``bf16``.

        Raises:
            ValueError: The precision is unknown.
        """
        request = merge_request(adapters, precision)
        return MergeState.from_proto(
            await self._unary("MergeAdapters", request, timeout, repeatable=False)
        )

    async def unmerge(self, *, timeout: float | None = None) -> MergeState:
        """Restore the base model."""
        request = adapters_pb2.UnmergeAdaptersRequest()
        return MergeState.from_proto(
            await self._unary("UnmergeAdapters", request, timeout, repeatable=False)
        )

    async def get_merge_state(self, *, timeout: float | None = None) -> MergeState:
        """Return what is merged."""
        request = adapters_pb2.GetMergeStateRequest()
        return MergeState.from_proto(await self._unary("GetMergeState", request, timeout))

    async def export(
        self,
        name: str,
        directory: str | os.PathLike[str],
        *,
        generation: int | None = None,
        timeout: float | None = None,
    ) -> Adapter:
        """Write an adapter's files, in PEFT's layout, to a new directory.

        Raises:
            FileExistsError: The directory is already there.
            ValueError: What arrived is incomplete or garbled.
        """
        request = filled(adapters_pb2.ExportAdapterRequest(), name=name, generation=generation)
        seconds = stream_timeout(timeout)
        with ExportWriter(directory) as writer:
            call = self._connection.adapters.ExportAdapter(
                request, timeout=seconds, metadata=self._settings.metadata
            )
            try:
                with waiting(self._settings):
                    async for message in call:
                        writer.write(message)
            except grpc.RpcError as error:
                raise self._settings.failure(error, seconds) from None
            finally:
                call.cancel()
            return Adapter.from_proto(writer.finish())

    async def _unary(
        self, name: str, request: object, timeout: float | None, *, repeatable: bool = True
    ) -> Any:
        method = getattr(self._connection.adapters, name)
        return await call_async(
            method, lambda: request, self._settings, timeout, repeatable=repeatable
        )
