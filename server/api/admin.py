"""The Adapters service, independent of the protocol: it takes and returns messages.

It loads, replaces, lists, pins, fuses, merges and unloads adapters while requests are served, and
raises TurretErrors. The code of a protocol (gRPC or HTTP) parses its input into a message, begins a
``Call`` and awaits the result.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import functools
import hashlib
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from google.protobuf import duration_pb2

from turret.server.adapters.adapter import AdapterRef, origin_of
from turret.server.adapters.combination import Combination
from turret.server.adapters.state_dir import StagedUpload, UploadedFile
from turret.server.api import uploads
from turret.server.api.access import MAX_EXPORTS
from turret.server.api.call import Call
from turret.server.api.gate import ServingGate
from turret.server.api.limits import (
    MAX_ALIAS_TARGETS,
    MAX_PAGE_TOKEN_CHARS,
    MAX_PATH_CHARS,
    MAX_WEIGHT,
    MAX_WORD_CHARS,
)
from turret.server.api.violations import Violations, adapter_refs, message_of, timestamp
from turret.server.basics.names import HUB_SCHEME, closest, is_private, is_remote
from turret.server.basics.turns import FairPool, shielded
from turret.server.basics.work import Cancellation
from turret.server.errors import InvalidRequestError, QueueFullError, UnavailableError
from turret.server.words import say
from turret.v1 import adapters_pb2

if TYPE_CHECKING:
    from turret.server.adapters.adapter import AdapterInfo, Alias
    from turret.server.adapters.base import Precision
    from turret.server.adapters.combination import FuseResult
    from turret.server.adapters.merger import MergeState
    from turret.server.adapters.registry import AdapterRegistry, UnloadMode


# Conversion of registered adapters from domain to proto.


RESIDENCIES = {
    "disk": adapters_pb2.Adapter.DISK,
    "host": adapters_pb2.Adapter.HOST,
    "device": adapters_pb2.Adapter.DEVICE,
}


def _sendable(text: str) -> str:
    """The text with a question mark for each half of a surrogate pair, which protobuf rejects.

    New adapters with such text are rejected, but a state directory may contain adapters that an
    earlier version accepted.
    """
    return text.encode("utf-8", "replace").decode()


def adapter_message(record: AdapterInfo) -> adapters_pb2.Adapter:
    """A registry record in the form of the API."""
    facts = record.facts
    return message_of(
        adapters_pb2.Adapter,
        record,
        digest=_sendable(facts.digest),
        method=_sendable(facts.method),
        ranks=facts.ranks,
        target_modules=map(_sendable, facts.target_modules),
        bytes_disk=facts.bytes_disk,
        residency=RESIDENCIES[record.residency],
        base_model=_sendable(facts.base_model),
        warnings=map(_sendable, facts.warnings),
        source=_sendable(record.source),
        invocation_token_ids=facts.invocation,
        labels=map(_sendable, facts.labels),
        vocab_size=facts.vocab_size,
        chat_template=origin_of(facts.chat_template),
        last_used_time=timestamp(record.last_used_time),
    )


def alias_message(alias: Alias) -> adapters_pb2.Alias:
    """An alias in the form of the API."""
    targets = [message_of(adapters_pb2.AliasTarget, target) for target in alias.targets]
    return adapters_pb2.Alias(name=alias.name, targets=targets)


def checked_alias(message: adapters_pb2.SetAliasRequest) -> tuple[str, list[AdapterRef]]:
    """The name and the targets of a request.

    Raises:
        InvalidRequestError: Lists every offending field.
    """
    violations = Violations()
    violations.check_name(message.name, "name")
    violations.check(len(message.targets) > 0, "targets", "EMPTY")
    refs: list[AdapterRef] = []
    if violations.check_count(len(message.targets), MAX_ALIAS_TARGETS, "targets"):
        for index, target in enumerate(message.targets):
            path = f"targets[{index}]"
            violations.check_name(target.name, f"{path}.name")
            weight = target.weight if target.HasField("weight") else 1.0
            if not 0 < weight <= MAX_WEIGHT:
                wanted = f"greater than 0 and at most {MAX_WEIGHT}"
                text = say("INVALID_VALUE", value=weight, wanted=wanted)
                violations.add(f"{path}.weight", text)
                continue
            generation = target.generation if target.HasField("generation") else None
            refs.append(AdapterRef(name=target.name, generation=generation, weight=weight))
    violations.raise_if_any()
    return message.name, refs


# Page tokens of ``ListAdapters``: the last name of the previous page, with its filters.

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
# gRPC clients accept 4 MiB by default.
MAX_PAGE_BYTES = 3 << 20
_CHECK_BYTES = 8


def _check(name: bytes, filters: str) -> bytes:
    return hashlib.sha256(filters.encode() + b"\0" + name).digest()[:_CHECK_BYTES]


def make_page_token(last_name: str, filters: str) -> str:
    """A token for the page after ``last_name`` under the same filters."""
    name = last_name.encode()
    return base64.urlsafe_b64encode(_check(name, filters) + name).decode()


def read_page_token(token: str, filters: str, violations: Violations) -> str:
    """The name that the page starts after; empty for the first page.

    Records a violation if the token is malformed or is for other filters.
    """
    if not token:
        return ""
    try:
        data = base64.b64decode(token.encode(), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        data = b""
    check, name = data[:_CHECK_BYTES], data[_CHECK_BYTES:]
    is_own = bool(name) and check == _check(name, filters)
    violations.check(is_own, "page_token", "NOT_A_PAGE_TOKEN")
    return name.decode("ascii", "replace")


def cut_page(messages: Iterable[adapters_pb2.Adapter]) -> list[adapters_pb2.Adapter]:
    """The first adapters, as many as fit into one message, but at least one."""
    page: list[adapters_pb2.Adapter] = []
    left = MAX_PAGE_BYTES
    for message in messages:
        left -= message.ByteSize()
        if page and left < 0:
            break
        page.append(message)
    return page


# Conversion of fusions between proto and domain.

_OPTIONAL = ("rank", "energy", "density", "seed")


def checked_fuse_request(
    request: adapters_pb2.FuseAdaptersRequest,
) -> tuple[str, tuple[AdapterRef, ...], Combination]:
    """The name of the result, its mix and its combination.

    Raises:
        InvalidRequestError: Lists every offending field.
    """
    violations = Violations()
    violations.check_name(request.name, "name")
    violations.check(len(request.adapters) > 0, "adapters", "EMPTY")
    refs = adapter_refs(request.adapters, violations)
    values: dict[str, Any] = {
        field: getattr(request, field) for field in _OPTIONAL if request.HasField(field)
    }
    # An empty string selects the default.
    for field, path in (("name", "combination"), ("majority_sign_method",) * 2):
        text = getattr(request, path)
        violations.check_chars(text, MAX_WORD_CHARS, path)
        if text and len(text) <= MAX_WORD_CHARS:
            values[field] = text
    combination = Combination()
    try:
        combination = Combination(**values)
    except InvalidRequestError as error:
        violations.found.extend(error.violations)
    violations.raise_if_any()
    return request.name, refs, combination


def fuse_response(
    result: FuseResult, adapter: adapters_pb2.Adapter
) -> adapters_pb2.FuseAdaptersResponse:
    """A ``FuseResult`` in the form of the API."""
    modules = [message_of(adapters_pb2.ModuleError, each) for each in result.modules]
    return adapters_pb2.FuseAdaptersResponse(
        adapter=adapter, relative_error=result.relative_error, modules=modules
    )


# Conversion of merges between proto and domain.

_Request = adapters_pb2.MergeAdaptersRequest
# None lets the merge choose the precision.
_PRECISIONS: dict[int, Precision | None] = {
    _Request.PRECISION_UNSPECIFIED: None,
    _Request.AUTO: None,
    _Request.NF4: "NF4",
    _Request.BF16: "BF16",
}


def checked_merge_request(request: _Request) -> tuple[tuple[AdapterRef, ...], Precision | None]:
    """The mix, and the precision in which it is stored.

    Raises:
        InvalidRequestError: Lists every offending field.
    """
    violations = Violations()
    violations.check(len(request.adapters) > 0, "adapters", "EMPTY")
    refs = adapter_refs(request.adapters, violations)
    # A mix whose weights are all zero would change nothing, but would prevent another merge.
    is_nothing = bool(refs) and all(ref.weight == 0 for ref in refs)
    violations.check(not is_nothing, "adapters", "NO_WEIGHT")
    violations.check_enum(request, "precision")
    violations.raise_if_any()
    return refs, _PRECISIONS[request.precision]


def merge_state_message(state: MergeState) -> adapters_pb2.MergeState:
    """The state in the form of the API."""
    merge = state.merge
    if merge is None:
        return adapters_pb2.MergeState(base_generation=state.base_generation)
    return adapters_pb2.MergeState(
        base_generation=state.base_generation,
        active=True,
        adapters=[message_of(adapters_pb2.MergedAdapter, each) for each in merge.adapters],
        precision=merge.precision,
        merge_time=timestamp(merge.time),
        relative_error=merge.report.relative_error,
        update_error=merge.report.update_error,
        modules=[
            adapters_pb2.ModuleError(module=path, relative_error=error)
            for path, error in merge.report.modules
        ],
    )


# Blocking calls.

_T = TypeVar("_T")


class SlowCalls:
    """Runs blocking calls off the event loop, for tenants in turn.

    Args:
        num_threads: Maximum number of running calls; further calls wait.
        most_of_one: See ``FairPool``.
    """

    def __init__(self, num_threads: int, most_of_one: int | None = None) -> None:
        self._num_threads = num_threads
        self._num_running = 0
        threads = ThreadPoolExecutor(num_threads, thread_name_prefix="turret-adapters")
        self._pool = FairPool(threads, most_of_one)

    def close(self) -> None:
        """Start no further calls. Running calls continue to their end."""
        self._pool.close()

    async def run(self, tenant: bytes, call: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
        """Run ``call`` on a thread, where it continues if the caller is cancelled meanwhile."""
        return await self._pool.run(tenant, functools.partial(call, *args, **kwargs))

    async def run_now(self, call: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
        """Like ``run``, but without waiting for a turn.

        Raises:
            QueueFullError: All threads are taken.
        """
        if self._num_running >= self._num_threads:
            raise QueueFullError(say("TOO_MANY_CALLS", most=self._num_threads))

        def ended(call: asyncio.Future[_T]) -> None:
            self._num_running -= 1
            # If the caller has gone, nobody else looks at a failure, and asyncio would log it.
            if not call.cancelled():
                call.exception()

        self._num_running += 1
        running = asyncio.ensure_future(self.run(b"", call, *args, **kwargs))
        # If the caller is cancelled, the thread continues, and is counted until it is done.
        running.add_done_callback(ended)
        return await shielded(running)

    async def open(self, tenant: bytes, call: Callable[[], _T], undo: Callable[[_T], object]) -> _T:
        """Like ``run``, but undoes the call if the caller is cancelled meanwhile."""
        opening = asyncio.wrap_future(self._pool.submit(tenant, call))
        try:
            return await shielded(opening)
        except asyncio.CancelledError:

            def close(future: asyncio.Future[_T]) -> None:
                if not future.cancelled() and future.exception() is None:
                    self._pool.submit(tenant, functools.partial(undo, future.result()))

            opening.add_done_callback(close)
            raise


# The service itself.

DEFAULT_UNLOAD_SECONDS = 30.0
MAX_UNLOAD_SECONDS = 3600.0
# Concurrent uploads. Each may take up to --max-upload-bytes of the disk before it is validated.
MAX_UPLOADS = 8
# Threads for slow calls, so that they do not delay tokenising or listing. The calls of one bearer
# token may take three quarters of the threads.
_SLOW_CALLS = 32
# The same for calls that download from a hub, a bucket or a registry.
_DOWNLOADS = 8
_DRAINS = 32
_LOOKUPS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Some of the matching adapters, with the number of matches and the number of all adapters."""

    shown: list[adapters_pb2.Adapter]
    num_matching: int
    num_all: int


class Adapters:
    """Serves adapter calls from the registry behind the gate; all protocols share one instance.

    Every method raises UnavailableError while the gate is closed, and InvalidRequestError, which
    lists all invalid fields of a message. Other errors are those of the registry, the fuser or the
    merger, whose methods have the same names. Methods that concern particular adapters record their
    names in the call.
    """

    def __init__(self, gate: ServingGate) -> None:
        self._gate = gate
        self._slow = SlowCalls(_SLOW_CALLS, _SLOW_CALLS * 3 // 4)
        self._downloads = SlowCalls(_DOWNLOADS, _DOWNLOADS * 3 // 4)
        # Drains wait up to an hour for the requests of others, so they have separate threads.
        self._drains = SlowCalls(_DRAINS)
        # Lookups have separate threads: in a fleet, they ask the fleet's registry, which may not
        # answer, and clients without the role admin may list adapters, too.
        self._lookups = FairPool(ThreadPoolExecutor(_LOOKUPS, "turret-lookups"))

    def close(self) -> None:
        """Start no further calls. Running calls continue to their end."""
        self._slow.close()
        self._downloads.close()
        self._drains.close()
        self._lookups.close()

    # New weights

    async def load(
        self, message: adapters_pb2.LoadAdapterRequest, call: Call
    ) -> adapters_pb2.Adapter:
        options = {"pinned": message.pinned, **uploads.reading_options(message)}
        load = self._gate.enter().registry.load
        return await self._read(load, *_checked_source(message, call), call, **options)

    async def replace(
        self, message: adapters_pb2.ReplaceAdapterRequest, call: Call
    ) -> adapters_pb2.Adapter:
        options = {**_generations(message), **uploads.reading_options(message)}
        replace = self._gate.enter().registry.replace
        return await self._read(replace, *_checked_source(message, call), call, **options)

    async def rollback(
        self, message: adapters_pb2.RollbackAdapterRequest, call: Call
    ) -> adapters_pb2.Adapter:
        name = _checked_name(message.name, call)
        rollback = self._gate.enter().registry.rollback
        return await self._change(call, rollback, name, **_generations(message))

    async def _read(
        self, change: Callable[..., AdapterInfo], name: str, path: str, call: Call, **options: Any
    ) -> adapters_pb2.Adapter:
        """Call a method of the registry that reads an adapter from a path."""
        is_download = is_remote(path) or path.startswith(HUB_SCHEME)
        calls = self._downloads if is_download else self._slow
        return adapter_message(await calls.run(call.tenant, change, name, path, **options))

    async def _change(
        self, call: Call, change: Callable[..., AdapterInfo], *args: Any, **kwargs: Any
    ) -> adapters_pb2.Adapter:
        """Call a method of the registry that returns the changed adapter."""
        return adapter_message(await self._slow.run(call.tenant, change, *args, **kwargs))

    async def upload(self, messages: uploads.Messages, call: Call) -> adapters_pb2.Adapter:
        """Receive the files of an adapter: a header, then chunks in the order of its files.

        Raises:
            QueueFullError: See ``Shares.transfer``.
            DeadlineExceededError: The client was silent for too long.
        """
        with self._upload_of(call) as registry:
            header = uploads.checked_header(await uploads.next_message(messages))
            files = [UploadedFile(file.path, file.size_bytes, file.sha256) for file in header.files]

            async def receive(staged: StagedUpload) -> None:
                write = functools.partial(self._slow.run, call.tenant, staged.write)
                await uploads.receive_chunks(messages, write, uploads.most_seconds(header))

            return await self._received(registry, header, call, files, receive)

    async def upload_archive(
        self, header: adapters_pb2.UploadHeader, entries: uploads.Entries, call: Call
    ) -> adapters_pb2.Adapter:
        """Receive an adapter's files one after another; other files are skipped.

        Args:
            header: The message without the files.
            entries: The files as they arrive; each is read before the next.
            call: The call.

        Raises:
            InvalidRequestError: A file occurs twice, or a required file is missing.
            QueueFullError, DeadlineExceededError: See ``upload``.
        """
        with self._upload_of(call) as registry:

            async def receive(staged: StagedUpload) -> None:
                announced, violations = set[str](), Violations()
                num_bytes, run = 0, functools.partial(self._slow.run, call.tenant)
                async for name, size, chunks in entries:
                    num_bytes += max(size, 0)
                    to_write = size if name in uploads.UPLOAD_FILES else 0
                    await run(registry.check_room, num_bytes, num_bytes - to_write)
                    if name not in uploads.UPLOAD_FILES:
                        continue
                    uploads.check_file(name, size, announced, violations, name)
                    violations.raise_if_any()
                    announced.add(name)
                    await run(staged.announce, UploadedFile(name, size))
                    async for data in chunks:
                        await run(staged.write, name, data)
                uploads.check_complete(announced, violations, "files")
                violations.raise_if_any()

            return await self._received(registry, header, call, (), receive)

    @contextlib.contextmanager
    def _upload_of(self, call: Call) -> Iterator[AdapterRegistry]:
        """Takes one of the places for uploads, and yields the registry."""
        registry = self._gate.enter().registry
        with call.party.shares.transfer("uploads", MAX_UPLOADS, call.tenant):
            yield registry

    async def _received(
        self,
        registry: AdapterRegistry,
        header: adapters_pb2.UploadHeader,
        call: Call,
        files: Sequence[UploadedFile],
        receive: Callable[[StagedUpload], Awaitable[None]],
    ) -> adapters_pb2.Adapter:
        call.adapters = (header.name,)
        staged = await self._slow.open(
            call.tenant, lambda: registry.stage(files), lambda opened: opened.discard()
        )
        try:
            await receive(staged)
            await self._slow.run(call.tenant, staged.finish)
            options = {**_generations(header), **uploads.reading_options(header)}
            options |= {"pinned": header.pinned, "replace": header.replace}
            return await self._change(call, registry.upload, header.name, staged, **options)
        finally:
            # Start a thread for this, because the pool rejects work while the server is stopping.
            threading.Thread(target=staged.discard, name="discard upload").start()

    async def fuse(
        self, message: adapters_pb2.FuseAdaptersRequest, call: Call
    ) -> adapters_pb2.FuseAdaptersResponse:
        """Fuse a mix into a new adapter. Cancelling the task ends the fusion."""
        fuser = self._gate.enter().fuser
        name, refs, combination = checked_fuse_request(message)
        call.adapters = (name,)
        cancellation = Cancellation()
        fusing = fuser.start(name, refs, combination, cancellation)
        with _cancelling(cancellation):
            result = await asyncio.wrap_future(fusing)
        return fuse_response(result, adapter_message(result.record))

    # Aliases

    async def set_alias(
        self, message: adapters_pb2.SetAliasRequest, call: Call
    ) -> adapters_pb2.Alias:
        registry = self._gate.enter().registry
        name, targets = checked_alias(message)
        call.adapters = tuple(target.name for target in targets)
        return alias_message(await self._slow.run(call.tenant, registry.set_alias, name, targets))

    async def delete_alias(
        self, message: adapters_pb2.DeleteAliasRequest, call: Call
    ) -> adapters_pb2.DeleteAliasResponse:
        registry = self._gate.enter().registry
        name = _checked_name(message.name, call)
        await self._slow.run(call.tenant, registry.delete_alias, name)
        return adapters_pb2.DeleteAliasResponse()

    def aliases(self) -> list[adapters_pb2.Alias]:
        """All aliases, by name."""
        return [alias_message(alias) for alias in self._gate.enter().registry.aliases()]

    # Reading the registry

    async def get(
        self, message: adapters_pb2.GetAdapterRequest, call: Call
    ) -> adapters_pb2.Adapter:
        registry = self._gate.enter().registry
        name, generation = _checked_name(message.name, call), _generations(message)["generation"]
        lookup = functools.partial(registry.get, name, generation)
        return adapter_message(await self._lookups.run(call.tenant, lookup))

    async def records(self, call: Call) -> list[AdapterInfo]:
        """All adapters, by name, except those whose names only their clients may know."""
        registry = self._gate.enter().registry

        def listed() -> list[AdapterInfo]:
            return [record for record in registry.list() if not is_private(record.name)]

        return await self._lookups.run(call.tenant, listed)

    async def list_page(
        self, message: adapters_pb2.ListAdaptersRequest, call: Call
    ) -> adapters_pb2.ListAdaptersResponse:
        """One page of all adapters, by name, and the token of the next page."""
        backend = self._gate.enter()
        violations = Violations()
        violations.check_chars(message.method, MAX_WORD_CHARS, "method")
        violations.check_chars(message.page_token, MAX_PAGE_TOKEN_CHARS, "page_token")
        violations.raise_if_any()
        filters = f"{message.method}\0{message.residency}"
        size = message.page_size
        violations.check(size >= 0, "page_size", "TOO_SMALL", least=0, value=size)
        length = min(size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
        after = read_page_token(message.page_token, filters, violations)
        violations.check_enum(message, "residency")
        violations.check(
            message.method in ("", *backend.methods),
            "method",
            "NOT_ONE_OF",
            value=message.method,
            choices=", ".join(backend.methods),
            closest=closest(message.method, backend.methods),
        )
        violations.raise_if_any()
        records = [
            record
            for record in await self.records(call)
            if message.method in ("", record.facts.method)
            and message.residency in (0, RESIDENCIES[record.residency])
        ]
        rest = sorted((r for r in records if r.name > after), key=lambda r: r.name)
        page = cut_page(adapter_message(record) for record in rest[:length])
        is_last = len(page) == len(rest)
        return adapters_pb2.ListAdaptersResponse(
            adapters=page,
            next_page_token="" if is_last else make_page_token(page[-1].name, filters),
            total_size=len(records),
        )

    async def find(self, text: str, most: int, call: Call) -> Found:
        """The first ``most`` adapters, by name, whose names contain ``text`` (any string)."""
        records = await self.records(call)
        matching = sorted((r for r in records if text in r.name), key=lambda r: r.name)
        return Found(
            shown=[adapter_message(record) for record in matching[:most]],
            num_matching=len(matching),
            num_all=len(records),
        )

    async def export(
        self, message: adapters_pb2.ExportAdapterRequest, call: Call
    ) -> AsyncGenerator[adapters_pb2.ExportAdapterResponse, None]:
        """The files of an adapter as they were loaded: a header, then chunks.

        Close the generator if you leave it early.

        Raises:
            QueueFullError: See ``Shares.transfer``.
        """
        registry = self._gate.enter().registry
        name, generation = _checked_name(message.name, call), _generations(message)["generation"]
        with call.party.shares.transfer("exports", MAX_EXPORTS, call.tenant):
            export = await self._slow.open(
                call.tenant,
                lambda: registry.export(name, generation),
                lambda opened: opened.close(),
            )
            with export:
                header = adapters_pb2.ExportHeader(adapter=adapter_message(export.record))
                for each in export.files:
                    header.files.add(path=each.name, size_bytes=each.size_bytes, sha256=each.sha256)
                yield adapters_pb2.ExportAdapterResponse(header=header)
                chunks = export.chunks()
                while part := await self._slow.run(call.tenant, lambda: next(chunks, None)):
                    path, data = part
                    chunk = adapters_pb2.FileChunk(path=path, data=data)
                    yield adapters_pb2.ExportAdapterResponse(chunk=chunk)

    # Pinning and unloading

    async def pin(
        self, message: adapters_pb2.PinAdapterRequest, call: Call
    ) -> adapters_pb2.Adapter:
        pin = self._gate.enter().registry.pin
        return await self._change(call, pin, _checked_name(message.name, call))

    async def unpin(
        self, message: adapters_pb2.UnpinAdapterRequest, call: Call
    ) -> adapters_pb2.Adapter:
        unpin = self._gate.enter().registry.unpin
        return await self._change(call, unpin, _checked_name(message.name, call))

    async def unload(
        self, message: adapters_pb2.UnloadAdapterRequest, call: Call
    ) -> adapters_pb2.UnloadAdapterResponse:
        """Remove an adapter once no request holds it, or (FORCE) end the requests that do.

        Raises:
            QueueFullError: ``_DRAINS`` other calls already wait for requests to end.
        """
        registry = self._gate.enter().registry
        violations = Violations()
        violations.check_name(message.name, "name")
        violations.check_enum(message, "mode")
        seconds = DEFAULT_UNLOAD_SECONDS
        if message.HasField("timeout"):
            seconds = _unload_seconds(message.timeout, violations)
        violations.raise_if_any()
        call.adapters = (message.name,)
        is_forced = message.mode == adapters_pb2.UnloadAdapterRequest.FORCE
        mode: UnloadMode = "FORCE" if is_forced else "DRAIN"
        # Start a drain at once. In a queue, it would also wait for the requests of other drains.
        at_turn = functools.partial(self._slow.run, call.tenant)
        run = at_turn if is_forced else self._drains.run_now
        await run(
            registry.unload,
            message.name,
            mode=mode,
            timeout_seconds=seconds,
            **_generations(message),
        )
        return adapters_pb2.UnloadAdapterResponse()

    # The base

    async def merge(
        self, message: adapters_pb2.MergeAdaptersRequest, call: Call
    ) -> adapters_pb2.MergeState:
        """Make a mix a part of the base. Cancelling the task withdraws the merge."""
        merger = self._gate.enter().merger
        refs, precision = checked_merge_request(message)
        call.adapters = tuple(ref.name for ref in refs)
        return await self._change_base(call, merger.merge, refs, precision)

    async def unmerge(self, call: Call) -> adapters_pb2.MergeState:
        """Restore the base's own weights. Cancelling the task withdraws the call."""
        return await self._change_base(call, self._gate.enter().merger.unmerge)

    async def _change_base(
        self, call: Call, change: Callable[..., MergeState], *args: Any
    ) -> adapters_pb2.MergeState:
        cancellation = Cancellation()
        with _cancelling(cancellation):
            state = await self._slow.run(call.tenant, change, *args, cancellation)
        return merge_state_message(state)

    def merge_state(self) -> adapters_pb2.MergeState:
        """The current merge, if any."""
        return merge_state_message(self._gate.enter().merger.state)


@contextlib.contextmanager
def _cancelling(work: Cancellation) -> Iterator[None]:
    """Ends the work on another thread if the task that waits for it is cancelled."""
    try:
        yield
    except asyncio.CancelledError:
        work.set(UnavailableError(say("CALLER_GONE")))
        raise


def _checked_name(name: str, call: Call) -> str:
    violations = Violations()
    violations.check_name(name, "name")
    violations.raise_if_any()
    call.adapters = (name,)
    return name


def _generations(message: Any) -> dict[str, int | None]:
    """The generations that a message names and expects, as arguments; each may be None."""
    names = ("generation", "expected_generation")
    known = [name for name in names if name in message.DESCRIPTOR.fields_by_name]
    return {name: getattr(message, name) if message.HasField(name) else None for name in known}


def _checked_source(
    message: adapters_pb2.LoadAdapterRequest | adapters_pb2.ReplaceAdapterRequest, call: Call
) -> tuple[str, str]:
    violations = Violations()
    violations.check_name(message.name, "name")
    violations.check(message.path != "", "path", "REQUIRED")
    violations.check_chars(message.path, MAX_PATH_CHARS, "path")
    violations.check("\0" not in message.path, "path", "HOLDS_NUL")
    uploads.check_template(message, violations)
    violations.raise_if_any()
    call.adapters = (message.name,)
    return message.name, message.path


def _unload_seconds(timeout: duration_pb2.Duration, violations: Violations) -> float:
    seconds = timeout.seconds + timeout.nanos / 1e9
    violations.check(
        0 <= seconds <= MAX_UNLOAD_SECONDS and abs(timeout.nanos) < 1_000_000_000,
        "timeout",
        "NOT_IN_RANGE",
        least=0,
        most=MAX_UNLOAD_SECONDS,
        value=seconds,
    )
    return seconds
