"""POST /v1/upload_lora_adapter: the files of an adapter, as an uncompressed tar archive."""

from __future__ import annotations

import asyncio
import re
import tarfile
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import PurePosixPath

from starlette.types import Receive

from turret.server.api.uploads import (
    BASE_SECONDS,
    IDLE_SECONDS,
    LEAST_BYTES_PER_SECOND,
    MAX_CHUNK_BYTES,
)
from turret.server.api.violations import Violations
from turret.server.errors import DeadlineExceededError, InvalidRequestError
from turret.server.http.endpoint import ClientGoneError, Exchange
from turret.server.http.models import succeed
from turret.server.http.refusals import HttpRefusal
from turret.server.words import say
from turret.v1 import adapters_pb2

# Browsers let a page of another origin send this type only after a preflight request.
ARCHIVE = "application/x-tar"
ARCHIVE_FLAGS = ("load_inplace", "pinned")
_BLOCK = tarfile.BLOCKSIZE
# A folder of checkpoints has fewer files.
_MAX_ENTRIES = 1024
_MAX_PADDING = 1 << 20
# Entries that contain the next entry's name if it has over 100 characters, in GNU's and POSIX's
# form.
_LONG_NAMES = {
    tarfile.GNUTYPE_LONGNAME: re.compile(rb"([^\0]+)"),
    tarfile.XHDTYPE: re.compile(rb"^\d+ path=(.+)$", re.MULTILINE),
}


async def upload(exchange: Exchange) -> None:
    """Upload an adapter's files as a tar archive, and register it."""
    if exchange.media_type != ARCHIVE:
        raise HttpRefusal(415, say("NOT_AN_ARCHIVE_TYPE", wanted=ARCHIVE))
    header = _header(exchange.request.query_params)
    exchange.names.update(name="lora_name", pinned="pinned", replace="load_inplace")
    archive = _Archive(exchange.request.receive)
    await exchange.services.adapters.upload_archive(header, archive.entries(), exchange.call)
    await succeed(exchange, header.name, "added successfully")


def _header(query: Mapping[str, str]) -> adapters_pb2.UploadHeader:
    """The header of an upload, from the query.

    Raises:
        InvalidRequestError: The query lacks the name, or has other parameters or values.
    """
    violations = Violations()
    known = ("lora_name", *ARCHIVE_FLAGS)
    for name in query:
        violations.check(name in known, name[:40], "UNKNOWN_FIELD", name=name[:40])
    flags = {name: query.get(name, "false") for name in ARCHIVE_FLAGS}
    for name, value in flags.items():
        is_known = value in ("true", "false")
        violations.check(is_known, name, "NOT_ONE_OF", value=value[:40], choices="true, false")
    violations.check_name(query.get("lora_name", ""), "lora_name")
    replaces, pinned = (flags[name] == "true" for name in ARCHIVE_FLAGS)
    violations.check(not (replaces and pinned), "pinned", "CONFLICTS_WITH", other="load_inplace")
    violations.raise_if_any()
    return adapters_pb2.UploadHeader(name=query["lora_name"], replace=replaces, pinned=pinned)


class _Archive:
    """Reads a tar archive while it arrives. Only one ASGI message of it is in memory at a time.

    Args:
        receive: ASGI's ``receive`` function.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._held = b""
        self._num_bytes = 0
        self._begun = time.monotonic()
        self._is_over = False

    async def entries(self) -> AsyncIterator[tuple[str, int, AsyncIterator[bytes]]]:
        """The entries: name without folders, or empty unless it is a file; size in bytes; content.

        Raises:
            InvalidRequestError: The body is not an archive, is truncated, or has too many entries.
            DeadlineExceededError: The client was silent for too long, or is too slow.
            ClientGoneError: The client closed the connection.
        """
        long_name = None
        for _ in range(_MAX_ENTRIES):
            block = b"".join([part async for part in self._read(_BLOCK)])
            if block == bytes(_BLOCK):
                await self._end()
                return
            try:
                info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except tarfile.HeaderError as error:
                raise InvalidRequestError(say("ARCHIVE_UNREADABLE", problem=error)) from None
            content = self._read(info.size)
            if info.type in _LONG_NAMES and info.size <= MAX_CHUNK_BYTES:
                data = b"".join([part async for part in content])
                long_name = _LONG_NAMES[info.type].search(data) or long_name
            else:
                path = long_name[1].decode(errors="replace") if long_name else info.name
                # Other entries are folders, links and the like.
                yield PurePosixPath(path).name if info.isreg() else "", info.size, content
                long_name = None
            for rest in (content, self._read(-info.size % _BLOCK)):
                async for _ in rest:
                    pass
        raise InvalidRequestError(say("ARCHIVE_TOO_LONG", most=_MAX_ENTRIES))

    async def _end(self) -> None:
        """Read the padding."""
        most_bytes = self._num_bytes + _MAX_PADDING
        while not self._is_over:
            if self._num_bytes > most_bytes:
                raise InvalidRequestError(say("ARCHIVE_UNREADABLE", problem="data follows its end"))
            await self._more()
            self._held = b""

    async def _read(self, size: int) -> AsyncIterator[bytes]:
        """The next ``size`` bytes, in parts."""
        while size > 0:
            if not self._held:
                await self._more()
            part = self._held[: min(size, MAX_CHUNK_BYTES)]
            self._held = self._held[len(part) :]
            size -= len(part)
            yield part

    async def _more(self) -> None:
        """Wait for the next message of the body."""
        if self._is_over:
            raise InvalidRequestError(say("ARCHIVE_UNREADABLE", problem="it ends too early"))
        limit = BASE_SECONDS + self._num_bytes / LEAST_BYTES_PER_SECOND
        try:
            async with asyncio.timeout(min(IDLE_SECONDS, self._begun + limit - time.monotonic())):
                message = await self._receive()
        except TimeoutError:
            seconds = time.monotonic() - self._begun
            raise DeadlineExceededError(say("UPLOAD_TOO_SLOW", seconds=seconds)) from None
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        self._held += message.get("body", b"")
        self._num_bytes += len(message.get("body", b""))
        self._is_over = not message.get("more_body", False)
