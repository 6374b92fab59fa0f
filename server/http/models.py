"""The models that requests may name: GET /v1/models, and the paths that manage adapters."""

from __future__ import annotations

import asyncio
import re
import tarfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from starlette.types import Receive

from turret.server.api.admin import adapter_message
from turret.server.api.uploads import (
    BASE_SECONDS,
    IDLE_SECONDS,
    LEAST_BYTES_PER_SECOND,
    MAX_CHUNK_BYTES,
)
from turret.server.api.violations import Violations
from turret.server.basics.names import BASE, HUB_SCHEME
from turret.server.errors import AdapterNotFoundError, DeadlineExceededError, InvalidRequestError
from turret.server.http.asked import read_model
from turret.server.http.endpoint import ClientGoneError, Exchange, Json
from turret.server.http.refusals import HttpRefusal
from turret.server.http.request_models import AdapterName, LoadAdapter
from turret.server.words import say
from turret.v1 import adapters_pb2
from turret.v1.inference_pb2 import GetModelResponse

OWNER = "turret"
# OpenAI's API requires a creation time. turret does not store one, so this is the server's start.
_CREATED = int(time.time())
# Other servers' scheme for repositories on the hub.
_HF_SCHEME = "hf://"
# Serialising one model takes as long as serialising this many tokens with log probabilities.
_TOKENS_PER_CARD = 2
_TEXT = {"content-type": "text/plain; charset=utf-8"}


async def list_models(exchange: Exchange) -> None:
    """List models: the base model first, then the adapters and the aliases by name."""
    adapters, base = exchange.services.adapters, exchange.services.inference.model()
    records = await adapters.records(exchange.call)
    aliases = adapters.aliases()

    def listed() -> Iterator[dict[str, Any]]:
        yield _base(base)
        yield from (_adapter(adapter_message(record), base) for record in records)
        yield from (_alias(alias, base) for alias in aliases)

    size = (len(records) + len(aliases)) * _TOKENS_PER_CARD
    await exchange.reply.made_json(lambda: {"object": "list", "data": listed()}, size)


async def get_model(exchange: Exchange) -> Json:
    """Get a model by any name that requests may use for it.

    Raises:
        AdapterNotFoundError: No such model exists, or the name is that of a mix.
    """
    adapters, base = exchange.services.adapters, exchange.services.inference.model()
    name = exchange.request.path_params["model"]
    members, wrong = read_model(name, base.name)
    Violations([("model", why) for why in wrong]).raise_if_any()
    if not members:
        return _base(base)
    # A mix has no card, because it has no digest, method or generation.
    if len(members) > 1 or members[0].HasField("weight"):
        text = say("MODEL_IS_A_MIX", model=name[:200], step=members[0].name)
        raise AdapterNotFoundError(text, metadata={"adapter": name[:200]})
    question = adapters_pb2.GetAdapterRequest(name=members[0].name)
    if members[0].HasField("generation"):
        question.generation = members[0].generation
    else:
        for alias in adapters.aliases():
            if alias.name == question.name:
                return _alias(alias, base)
    return _adapter(await adapters.get(question, exchange.call), base)


def _base(info: GetModelResponse) -> dict[str, Any]:
    card = _card(info.name, info.name, None)
    return card | {
        "max_model_len": info.max_model_len,
        "aliases": [BASE],
        "digest": info.digest,
    }


def _adapter(adapter: adapters_pb2.Adapter, base: GetModelResponse) -> dict[str, Any]:
    residency = adapters_pb2.Adapter.Residency.Name(adapter.residency).lower()
    return _card(adapter.name, adapter.digest, base.name) | {
        "method": adapter.method,
        "generation": adapter.generation,
        "residency": residency,
    }


def _alias(alias: adapters_pb2.Alias, base: GetModelResponse) -> dict[str, Any]:
    targets = [
        {"name": target.name, "generation": target.generation, "weight": target.weight}
        for target in alias.targets
    ]
    return _card(alias.name, alias.name, base.name) | {"targets": targets}


def _card(name: str, root: str, parent: str | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": _CREATED,
        "owned_by": OWNER,
        "root": root,
        "parent": parent,
    }


# The management of adapters, with vLLM's fields.


async def load_adapter(exchange: Exchange) -> None:
    """Register an adapter of any method."""
    body = exchange.take_body().checked(LoadAdapter)
    path = body.lora_path
    if path.startswith(_HF_SCHEME):
        path = HUB_SCHEME + path.removeprefix(_HF_SCHEME)
    fields: dict[str, Any] = {"name": body.lora_name, "path": path}
    fields |= {"task": body.task, "chat_template": body.chat_template}
    adapters, call = exchange.services.adapters, exchange.call
    if body.load_inplace:
        await adapters.replace(adapters_pb2.ReplaceAdapterRequest(**fields), call)
    else:
        question = adapters_pb2.LoadAdapterRequest(pinned=body.pinned, **fields)
        await adapters.load(question, call)
    await _succeed(exchange, body.lora_name, "added successfully")


async def unload_adapter(exchange: Exchange) -> None:
    """Remove an adapter once no request uses it."""
    await _change(exchange, "unload", adapters_pb2.UnloadAdapterRequest, "removed successfully")


async def pin_adapter(exchange: Exchange) -> None:
    """Keep an adapter in memory."""
    await _change(exchange, "pin", adapters_pb2.PinAdapterRequest, "pinned")


async def unpin_adapter(exchange: Exchange) -> None:
    """Let an adapter leave memory again."""
    await _change(exchange, "unpin", adapters_pb2.UnpinAdapterRequest, "unpinned")


async def _change(exchange: Exchange, method: str, kind: type[Any], done: str) -> None:
    name = exchange.take_body().checked(AdapterName).lora_name
    await getattr(exchange.services.adapters, method)(kind(name=name), exchange.call)
    await _succeed(exchange, name, done)


async def _succeed(exchange: Exchange, name: str, what: str) -> None:
    """Answer that an adapter was added, or otherwise changed."""
    # The text is the same as vLLM's.
    text = f"Success: LoRA adapter '{name}' {what}."
    await exchange.reply.whole(text.encode(), 200, _TEXT)


# Uploads: the files of an adapter, as an uncompressed tar archive.

# Browsers let a page of another origin send this type only after a preflight request.
ARCHIVE = "application/x-tar"
ARCHIVE_FLAGS = ("load_inplace", "pinned")
_BLOCK = tarfile.BLOCKSIZE
# Maximum number of entries in an archive; a folder of checkpoints has fewer files.
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
    await _succeed(exchange, header.name, "added successfully")


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
        """The entries, each as a name without folders, a size in bytes, and the content.

        The name is empty if the entry is not a file.

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
                # Entries that are not regular files are folders, links and the like.
                yield PurePosixPath(path).name if info.isreg() else "", info.size, content
                long_name = None
            for rest in (content, self._read(-info.size % _BLOCK)):
                async for _ in rest:
                    pass
        raise InvalidRequestError(say("ARCHIVE_TOO_LONG", most=_MAX_ENTRIES))

    async def _end(self) -> None:
        """Read the padding after the last entry."""
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
