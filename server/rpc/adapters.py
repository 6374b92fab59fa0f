"""The control plane: loads, replaces, lists, pins and unloads adapters while traffic flows."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
from google.protobuf import duration_pb2, timestamp_pb2

from turret.server.adapters.adapter_info import AdapterInfo
from turret.server.adapters.fuse.interrupt import Interrupt
from turret.server.adapters.state.staged_upload import UploadedFile
from turret.server.api.call import current_call
from turret.server.api.gate import Gate
from turret.server.api.violations import Violations
from turret.server.config import ADAPTER_NAME
from turret.server.errors import (
    InvalidRequestError,
    QueueFullError,
    UnavailableError,
)
from turret.server.rpc.fuse import checked_fuse_request, fuse_response
from turret.server.rpc.merges import checked_merge_request, merge_state_message
from turret.server.rpc.paging import make_page_token, page_length, read_page_token
from turret.server.rpc.uploads import checked_header, next_message, receive_chunks
from turret.v1 import adapters_pb2, adapters_pb2_grpc

if TYPE_CHECKING:
    from turret.server.adapters.adapter_info import AdapterInfo
    from turret.server.adapters.merge.state import MergeState
    from turret.server.adapters.registry.registry import AdapterRegistry

DEFAULT_UNLOAD_SECONDS = 30.0
MAX_UNLOAD_SECONDS = 3600.0
# Each may take up to --max-upload-bytes of the disk before it is known to be any good.
MAX_UPLOADS = 8
# Loads and drains may take long; they must not hold up the threads that tokenise or list.
_SLOW_CALLS = 32

_Context = grpc.aio.ServicerContext[Any, Any]
_T = TypeVar("_T")

_RESIDENCIES = {
    "disk": adapters_pb2.Adapter.DISK,
    "host": adapters_pb2.Adapter.HOST,
    "device": adapters_pb2.Adapter.DEVICE,
}


def _sendable(text: str) -> str:
    """The text with a question mark for each half of a surrogate pair, which no message can hold.

    Reading refuses such text, but a state directory may hold what an earlier version let in.
    """
    return text.encode("utf-8", "replace").decode()


def adapter_message(record: AdapterInfo) -> adapters_pb2.Adapter:
    """A registry record, as the API shows it."""
    facts = record.facts
    message = adapters_pb2.Adapter(
        name=record.name,
        uuid=record.uuid,
        generation=record.generation,
        digest=_sendable(facts.digest),
        method=_sendable(facts.method),
        ranks=facts.ranks,
        target_modules=map(_sendable, facts.target_modules),
        bytes_disk=facts.bytes_disk,
        bytes_host=record.bytes_host,
        bytes_device=record.bytes_device,
        residency=_RESIDENCIES[record.residency],
        pinned=record.pinned,
        in_flight=record.in_flight,
        base_model=_sendable(facts.base_model),
        warnings=map(_sendable, facts.warnings),
        state=record.state,
    )
    if record.last_used_time is not None:
        stamp = timestamp_pb2.Timestamp()
        stamp.FromNanoseconds(round(record.last_used_time * 1e9))
        message.last_used_time.CopyFrom(stamp)
    return message


def _check_name(name: str, violations: Violations) -> None:
    violations.check(
        ADAPTER_NAME.fullmatch(name) is not None, "name", f"must match {ADAPTER_NAME.pattern}"
    )


def _named(name: str) -> str:
    violations = Violations()
    _check_name(name, violations)
    violations.raise_if_any()
    current_call().adapters = (name,)
    return name


def _check_path(path: str, violations: Violations) -> None:
    violations.check(path != "", "path", "must be set")
    violations.check("\0" not in path, "path", "must not hold a NUL character")


def _unload_seconds(timeout: duration_pb2.Duration, violations: Violations) -> float:
    seconds = timeout.seconds + timeout.nanos / 1e9
    violations.check(
        0 <= seconds <= MAX_UNLOAD_SECONDS and abs(timeout.nanos) < 1_000_000_000,
        "timeout",
        f"must be in [0, {MAX_UNLOAD_SECONDS:.0f}] seconds",
    )
    return seconds


class AdaptersServicer(adapters_pb2_grpc.AdaptersServicer):
    """Answers on behalf of the registry behind the gate."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._num_uploads = 0
        self._slow = ThreadPoolExecutor(_SLOW_CALLS, thread_name_prefix="turret-adapters")

    def close(self) -> None:
        """Start no further call; those that run end by themselves."""
        self._slow.shutdown(wait=False, cancel_futures=True)

    async def _in_slow_thread(self, call: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._slow, functools.partial(call, *args, **kwargs))

    async def _open_in_slow_thread(
        self, call: Callable[[], _T], undo: Callable[[_T], object]
    ) -> _T:
        """As above; if the caller goes away meanwhile, what was opened is closed again."""
        loop = asyncio.get_running_loop()
        opening = loop.run_in_executor(self._slow, call)
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:

            def close(future: asyncio.Future[_T]) -> None:
                if not future.cancelled() and future.exception() is None:
                    self._slow.submit(undo, future.result())

            opening.add_done_callback(close)
            raise

    async def LoadAdapter(
        self, request: adapters_pb2.LoadAdapterRequest, context: _Context
    ) -> adapters_pb2.Adapter:
        registry = self._gate.enter().registry
        violations = Violations()
        _check_name(request.name, violations)
        _check_path(request.path, violations)
        violations.raise_if_any()
        current_call().adapters = (request.name,)
        record = await self._in_slow_thread(
            registry.load, request.name, request.path, pinned=request.pinned
        )
        return adapter_message(record)

    async def ReplaceAdapter(
        self, request: adapters_pb2.ReplaceAdapterRequest, context: _Context
    ) -> adapters_pb2.Adapter:
        registry = self._gate.enter().registry
        violations = Violations()
        _check_name(request.name, violations)
        _check_path(request.path, violations)
        violations.raise_if_any()
        current_call().adapters = (request.name,)
        record = await self._in_slow_thread(registry.replace, request.name, request.path)
        return adapter_message(record)

    async def UploadAdapter(
        self,
        request_iterator: AsyncIterator[adapters_pb2.UploadAdapterRequest],
        context: _Context,
    ) -> adapters_pb2.Adapter:
        registry = self._gate.enter().registry
        if self._num_uploads >= MAX_UPLOADS:
            raise QueueFullError(f"{MAX_UPLOADS} uploads are under way already")
        self._num_uploads += 1
        try:
            return await self._receive(registry, aiter(request_iterator))
        finally:
            self._num_uploads -= 1

    async def _receive(
        self, registry: AdapterRegistry, messages: AsyncIterator[adapters_pb2.UploadAdapterRequest]
    ) -> adapters_pb2.Adapter:
        header = checked_header(await next_message(messages))
        current_call().adapters = (header.name,)
        files = [UploadedFile(file.path, file.size_bytes, file.sha256) for file in header.files]
        staged = await self._open_in_slow_thread(
            lambda: registry.stage(files), lambda opened: opened.discard()
        )
        try:
            await receive_chunks(
                messages, lambda name, data: self._in_slow_thread(staged.write, name, data)
            )
            await self._in_slow_thread(staged.finish)
            record = await self._in_slow_thread(
                registry.upload, header.name, staged, pinned=header.pinned, replace=header.replace
            )
        finally:
            # In a thread of its own: the pool refuses work while the server stops.
            threading.Thread(target=staged.discard, name="discard upload").start()
        return adapter_message(record)

    async def GetAdapter(
        self, request: adapters_pb2.GetAdapterRequest, context: _Context
    ) -> adapters_pb2.Adapter:
        registry = self._gate.enter().registry
        return adapter_message(await asyncio.to_thread(registry.get, _named(request.name)))

    async def ListAdapters(
        self, request: adapters_pb2.ListAdaptersRequest, context: _Context
    ) -> adapters_pb2.ListAdaptersResponse:
        registry = self._gate.enter().registry
        filters = f"{request.method}\0{request.residency}"
        violations = Violations()
        length, after = 0, ""
        try:
            length = page_length(request.page_size)
        except InvalidRequestError as error:
            violations.found.extend(error.violations)
        try:
            after = read_page_token(request.page_token, filters)
        except InvalidRequestError as error:
            violations.found.extend(error.violations)
        violations.check(
            request.residency in adapters_pb2.Adapter.Residency.values(),
            "residency",
            "is no value of Residency",
        )
        violations.raise_if_any()
        records = [
            record
            for record in await asyncio.to_thread(registry.list)
            if request.method in ("", record.facts.method)
            and request.residency in (0, _RESIDENCIES[record.residency])
        ]
        rest = sorted((r for r in records if r.name > after), key=lambda r: r.name)
        page = rest[:length]
        return adapters_pb2.ListAdaptersResponse(
            adapters=[adapter_message(record) for record in page],
            next_page_token=make_page_token(page[-1].name, filters) if len(rest) > length else "",
            total_size=len(records),
        )

    async def UnloadAdapter(
        self, request: adapters_pb2.UnloadAdapterRequest, context: _Context
    ) -> adapters_pb2.UnloadAdapterResponse:
        registry = self._gate.enter().registry
        modes = adapters_pb2.UnloadAdapterRequest.Mode
        violations = Violations()
        _check_name(request.name, violations)
        violations.check(request.mode in modes.values(), "mode", "is no value of Mode")
        seconds = DEFAULT_UNLOAD_SECONDS
        if request.HasField("timeout"):
            seconds = _unload_seconds(request.timeout, violations)
        violations.raise_if_any()
        current_call().adapters = (request.name,)
        mode = "FORCE" if request.mode == adapters_pb2.UnloadAdapterRequest.FORCE else "DRAIN"
        await self._in_slow_thread(
            registry.unload, request.name, mode=mode, timeout_seconds=seconds
        )
        return adapters_pb2.UnloadAdapterResponse()

    async def PinAdapter(
        self, request: adapters_pb2.PinAdapterRequest, context: _Context
    ) -> adapters_pb2.Adapter:
        return await self._pin(_named(request.name), "pin")

    async def UnpinAdapter(
        self, request: adapters_pb2.UnpinAdapterRequest, context: _Context
    ) -> adapters_pb2.Adapter:
        return await self._pin(_named(request.name), "unpin")

    async def _pin(self, name: str, verb: str) -> adapters_pb2.Adapter:
        registry = self._gate.enter().registry
        change = registry.pin if verb == "pin" else registry.unpin
        return adapter_message(await self._in_slow_thread(change, name))

    async def ExportAdapter(
        self, request: adapters_pb2.ExportAdapterRequest, context: _Context
    ) -> AsyncIterator[adapters_pb2.ExportAdapterResponse]:
        registry = self._gate.enter().registry
        generation = request.generation if request.HasField("generation") else None
        name = _named(request.name)
        export = await self._open_in_slow_thread(
            lambda: registry.export(name, generation), lambda opened: opened.close()
        )
        try:
            header = adapters_pb2.ExportHeader(adapter=adapter_message(export.record))
            for file in export.files:
                header.files.add(path=file.name, size_bytes=file.size_bytes, sha256=file.sha256)
            yield adapters_pb2.ExportAdapterResponse(header=header)
            chunks = export.chunks()
            while part := await self._in_slow_thread(lambda: next(chunks, None)):
                path, data = part
                chunk = adapters_pb2.FileChunk(path=path, data=data)
                yield adapters_pb2.ExportAdapterResponse(chunk=chunk)
        finally:
            export.close()

    async def FuseAdapters(
        self, request: adapters_pb2.FuseAdaptersRequest, context: _Context
    ) -> adapters_pb2.FuseAdaptersResponse:
        registry = self._gate.enter().registry
        name, refs, combination = checked_fuse_request(request)
        current_call().adapters = (name,)
        interrupt = Interrupt()
        fusing = registry.fuser.start(name, refs, combination, interrupt)
        try:
            result = await asyncio.wrap_future(fusing)
        except asyncio.CancelledError:
            interrupt.set(UnavailableError("the caller went away"))
            raise
        return fuse_response(result, adapter_message(result.record))

    async def MergeAdapters(
        self, request: adapters_pb2.MergeAdaptersRequest, context: _Context
    ) -> adapters_pb2.MergeState:
        merger = self._gate.enter().merger
        refs, precision = checked_merge_request(request)
        current_call().adapters = tuple(ref.name for ref in refs)
        return await self._change_base(merger.merge, refs, precision)

    async def UnmergeAdapters(
        self, request: adapters_pb2.UnmergeAdaptersRequest, context: _Context
    ) -> adapters_pb2.MergeState:
        return await self._change_base(self._gate.enter().merger.unmerge)

    async def _change_base(
        self, change: Callable[..., MergeState], *args: Any
    ) -> adapters_pb2.MergeState:
        cancelled: Future[None] = Future()
        try:
            state = await self._in_slow_thread(change, *args, cancelled)
        except asyncio.CancelledError:
            cancelled.set_result(None)
            raise
        return merge_state_message(state)

    async def GetMergeState(
        self, request: adapters_pb2.GetMergeStateRequest, context: _Context
    ) -> adapters_pb2.MergeState:
        return merge_state_message(self._gate.enter().merger.state)
