"""Reads the JSON of a request within limits of size, time and depth."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic_core import from_json
from starlette.types import Receive

from turret.server.api.call import Call
from turret.server.basics.codes import Code
from turret.server.basics.turns import FairPool
from turret.server.errors import InvalidRequestError
from turret.server.http.refusals import HttpRefusal
from turret.server.http.schemas.fields import Body, Sent, read
from turret.server.words import say

# The same limit as for a gRPC message.
MAX_BODY_BYTES = 4 << 20
# A slower client has probably gone, and would hold a place for which others wait.
BODY_SECONDS = 60.0
# Maximum number of lists and objects in a body; 4096 turns with tool calls have 30,000.
MAX_CONTAINERS = 1 << 15
# Larger bodies take more than about a millisecond to parse, so they are parsed off the event loop.
_INLINE_BYTES = 32 << 10
# Large bodies are parsed one at a time: a body of 4 MiB can become 60 MiB of objects, and the
# bodies of several clients would add up.
_parsing = FairPool(ThreadPoolExecutor(1, "turret-body"))

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ALL_BUT_STRUCTURE = bytes(set(range(256)) - set(b'"[{'))


class ClientGoneError(Exception):
    """The client closed the connection before its request was complete."""


async def read_json(
    receive: Receive, headers: Mapping[str, str], model: type[Body], call: Call
) -> Sent[Any]:
    """The content of the request's body.

    Args:
        receive: ASGI's ``receive`` function.
        headers: The request's headers.
        model: The model with the body's fields.
        call: The call that counts the body's bytes. A large body waits for its tenant's turn.

    Raises:
        HttpRefusal: The body is too large, too slow, compressed, or not declared to be JSON.
        QueueFullError: See ``Call.receive``.
        InvalidRequestError: The body is not a JSON object, or has too many lists and objects.
        ClientGoneError: The body never arrived in full.
    """
    # Browsers let a page of another origin send other media types without a preflight request. For
    # JSON they require a preflight, which --http-cors-origin answers.
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    encoding = headers.get("content-encoding", "").strip().lower()
    if media_type != "application/json" or encoding not in ("", "identity"):
        raise HttpRefusal(415, Code.INVALID_ARGUMENT, say("UNSUPPORTED_MEDIA_TYPE"))
    data = await read_body(receive, headers, call)
    if len(data) <= _INLINE_BYTES:
        return read(model, parse(data))
    return await _parsing.run(call.tenant, lambda: read(model, parse(data)))


async def read_body(receive: Receive, headers: Mapping[str, str], call: Call) -> bytes:
    """The bytes of the request's body; arguments and errors are those of ``read_json``."""
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > MAX_BODY_BYTES:
        raise _too_large()
    parts = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                call.receive(len(message.get("body", b"")))
                parts += message.get("body", b"")
                if len(parts) > MAX_BODY_BYTES:
                    raise _too_large()
                if not message.get("more_body", False):
                    return bytes(parts)
    except TimeoutError:
        text = say("REQUEST_TIMEOUT", seconds=round(BODY_SECONDS))
        raise HttpRefusal(408, Code.DEADLINE_EXCEEDED, text) from None


def parse(data: bytes) -> dict[str, Any]:
    """The object in the bytes; the time grows linearly with their number.

    Raises:
        InvalidRequestError: The bytes are not a JSON object, or have too many lists and objects.
    """
    # A million lists and objects would take the parser and the garbage collector half a second,
    # while no other thread runs.
    if _num_containers(data) > MAX_CONTAINERS:
        raise InvalidRequestError(say("BODY_TOO_NESTED", most=MAX_CONTAINERS))
    try:
        # The parser limits the nesting, and rejects halves of surrogate pairs. It is twice as fast
        # on objects with many names when its cache of strings is off.
        body = from_json(
            data.removeprefix(_BYTE_ORDER_MARK), allow_inf_nan=False, cache_strings="none"
        )
    except ValueError as error:
        raise InvalidRequestError(say("BODY_NOT_JSON", problem=error)) from None
    if not isinstance(body, dict):
        raise InvalidRequestError(say("BODY_NOT_OBJECT"))
    return body


def _num_containers(data: bytes) -> int:
    """The number of lists and objects in a JSON text."""
    most = data.count(b"[") + data.count(b"{")
    if most <= MAX_CONTAINERS:
        return most
    # Brackets in strings do not count. Once escapes are removed, every second part between quotes
    # is outside strings.
    bare = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    return sum(map(len, bare.translate(None, _ALL_BUT_STRUCTURE).split(b'"')[::2]))


def _too_large() -> HttpRefusal:
    return HttpRefusal(413, Code.INVALID_ARGUMENT, say("REQUEST_TOO_LARGE", most=MAX_BODY_BYTES))
