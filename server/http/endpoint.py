"""One request: its body, its handler and its answer, with the errors of all of them."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic_core import from_json, to_json
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from turret.server import log
from turret.server.api.access import (
    INFERENCE,
    TRAINING,
    Party,
    authorize,
    bearer_token,
    roles_of,
)
from turret.server.api.call import REQUEST_ID_KEY, Call
from turret.server.api.inference import converted
from turret.server.api.services import Services
from turret.server.basics.codes import Code
from turret.server.basics.turns import FairPool
from turret.server.errors import InvalidRequestError, UnavailableError
from turret.server.http.connection import EXTENSION, MAX_BODY_BYTES, MAX_HEAD_BYTES, Chunks
from turret.server.http.fields import Body, Sent, read
from turret.server.http.refusals import HttpRefusal, Refusal, refusal_of
from turret.server.words import say

_JSON = {"content-type": "application/json"}
_PIECE_BYTES = 1 << 18
_DONE = b"data: [DONE]\n\n"
_COMMENT = b": still working\n\n"
_EVENTS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    # Without this header, buffering proxies would hold the answer back until its end.
    "x-accel-buffering": "no",
}


def dumps(value: Any) -> bytes:
    """JSON as UTF-8, on one line."""
    return to_json(value, inf_nan_mode="null")


def _object(value: Mapping[str, Any]) -> bytes:
    """An object as JSON. Lists are encoded item by item, because the encoder holds the GIL."""
    parts = []
    for key, each in value.items():
        is_list = isinstance(each, list | Iterator)
        part = b"[%b]" % b",".join(map(dumps, each)) if is_list else dumps(each)
        parts.append(b"%b:%b" % (dumps(key), part))
    return b"{%b}" % b",".join(parts)


def event_bytes(value: Any, name: str = "") -> bytes:
    """The bytes of an event, with a name if it has one."""
    named = b"event: %b\n" % name.encode() if name else b""
    return b"%bdata: %b\n\n" % (named, dumps(value))


class Reply:
    """The answer to one request.

    Args:
        send: ASGI's ``send`` function.
        call: The call, which has the request's id.
        chunks: Sends events directly, if the server supports that.

    Attributes:
        is_begun: Whether the status has been sent, so that it cannot change any more.
        is_ended: Whether the last byte has been sent.
        is_stream: Whether the answer will be events, so that comments may be sent before and
            between them.
    """

    def __init__(self, send: Send, call: Call, chunks: Chunks | None = None) -> None:
        self._send = send
        self._call = call
        self._chunks = chunks
        self.is_begun = False
        self.is_ended = False
        self.is_stream = False
        self._was_quiet = False

    async def keep_alive(self) -> None:
        """Send a comment if nothing was sent since the last call. The comment may begin the answer.

        Without comments, proxies and clients would close the idle connection.
        """
        if not self._was_quiet:
            self._was_quiet = True
        elif self.is_stream and not self.is_ended:
            await self.send_event(_COMMENT)

    async def json(
        self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        """Send a value as the whole answer.

        Raises:
            QueueFullError: See ``Call.send``; never for an error, which is too small to count.
        """
        body = dumps(value)
        if status < 400:
            self._call.send(len(body))
        await self.whole(body, status, {**_JSON, **(headers or {})})

    async def made_json(self, make: Callable[[], Mapping[str, Any]], size: int) -> None:
        """Send an object as the whole answer. A large one is built off the event loop.

        Args:
            make: Returns the object; iterators in it become lists.
            size: See ``converted``.

        Raises:
            QueueFullError: See ``Call.send``.
        """
        body = await converted(self._call.tenant, size, lambda: _object(make()))
        self._call.send(len(body))
        await self.whole(body, 200, _JSON)

    async def whole(self, body: bytes, status: int, headers: Mapping[str, str]) -> None:
        """Send bytes as the whole answer, piece by piece as the client reads them.

        The call therefore does not end before almost all of the answer has been read.
        """
        await self._begin(status, {**headers, "content-length": str(len(body))})
        last = max(len(body) - 1, 0) // _PIECE_BYTES * _PIECE_BYTES
        for start in range(0, last, _PIECE_BYTES):
            await self._write(body[start : start + _PIECE_BYTES])
        await self._write(body[last:], is_last=True)

    async def stream(self, parts: AsyncIterator[bytes], headers: Mapping[str, str]) -> None:
        """Send the parts of a body whose length is among the headers."""
        await self._begin(200, headers)
        async for part in parts:
            await self._write(part)
        await self._write(b"", is_last=True)

    async def event(self, value: Any, name: str = "") -> None:
        """Send an event, with a name if it has one. The first event begins the answer."""
        await self.send_event(event_bytes(value, name))

    async def send_event(self, event: bytes) -> None:
        """Send an event that is already encoded. The first event begins the answer."""
        self._was_quiet = False
        if not self.is_begun:
            await self._begin(200, _EVENTS)
        if self._chunks is not None:
            await self._chunks.write(event)
        else:
            await self._write(event)

    async def end_events(self, *, has_done: bool = True) -> None:
        """End the stream, by default with OpenAI's end mark."""
        await self._write(_DONE if has_done else b"", is_last=True)

    async def refuse(self, refusal: Refusal) -> None:
        """Send an error: as a status, or as the last event if the answer has begun."""
        if not self.is_begun:
            await self.json(refusal.body, refusal.status, refusal.headers)
        elif not self.is_ended:
            await self._write(event_bytes(refusal.body, refusal.event), is_last=True)

    async def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        self.is_begun = True
        every = {**headers, REQUEST_ID_KEY: self._call.request_id}
        raw = [(name.encode("latin-1"), text.encode("latin-1")) for name, text in every.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def _write(self, body: bytes, is_last: bool = False) -> None:
        if self._chunks is not None:
            self._chunks.flush()
        self.is_ended = is_last
        await self._send({"type": "http.response.body", "body": body, "more_body": not is_last})


# Placeholder for the text of an event. It is random, so no text from a client contains it.
HOLE = uuid.uuid4().hex


class Template:
    """The bytes of an event around its text, encoded once.

    Args:
        value: The event, with ``HOLE`` for the text.
    """

    def __init__(self, value: Any) -> None:
        self._before, _, self._after = event_bytes(value).partition(dumps(HOLE))

    def event(self, text: str) -> bytes:
        """The event with this text."""
        return self._before + dumps(text) + self._after


# Time limit for a body. A slower client has probably gone, and would hold a place for which others
# wait.
BODY_SECONDS = 60.0
# Maximum number of lists and objects in a body; 4096 turns with tool calls contain 30,000.
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


def parse(data: bytes) -> dict[str, Any]:
    """The JSON object in the bytes, parsed in time linear in their number.

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
    return HttpRefusal(413, say("REQUEST_TOO_LARGE", most=MAX_BODY_BYTES))


# A stream that has been quiet for this long gets a comment.
HEARTBEAT_SECONDS = 15.0
_log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Exchange:
    """One request, and the means to answer it.

    Attributes:
        call: The call, with its id and its counts.
        request: The request. If the query has a name several times, the last one counts.
        reply: Writes the answer.
        names: The client's names for field paths of turret.v1.
        services: The services that answer.
        has_admin: Whether adapters are managed at this address, not at a separate one.
    """

    call: Call
    request: Request
    reply: Reply
    names: dict[str, str]
    services: Services
    has_admin: bool
    _sent: Sent[Any] = dataclasses.field(default_factory=Sent)

    @property
    def media_type(self) -> str:
        """The media type of the body; empty if it is compressed."""
        headers = self.request.headers
        if headers.get("content-encoding", "").strip().lower() not in ("", "identity"):
            return ""
        return headers.get("content-type", "").partition(";")[0].strip().lower()

    async def read_json(self, model: type[Body]) -> None:
        """Read the request's body, for ``take_body``; a large one waits for its tenant's turn.

        Args:
            model: The model with the body's fields.

        Raises:
            HttpRefusal: The body is too large, too slow, compressed, or not declared to be JSON.
            QueueFullError: See ``Call.receive``.
            InvalidRequestError: The body is not a JSON object, or has too many lists and objects.
            ClientGoneError: The body never arrived in full.
        """
        # Browsers let a page of another origin send other media types without a preflight request.
        # For JSON they require a preflight, which --http-cors-origin answers.
        if self.media_type != "application/json":
            raise HttpRefusal(415, say("UNSUPPORTED_MEDIA_TYPE"))
        data = await self.read_body()
        if len(data) <= _INLINE_BYTES:
            self._sent = read(model, parse(data))
        else:
            self._sent = await _parsing.run(self.call.tenant, lambda: read(model, parse(data)))

    async def read_body(self) -> bytes:
        """The bytes of the request's body; errors are those of ``read_json``."""
        length = self.request.headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > MAX_BODY_BYTES:
            raise _too_large()
        parts = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await self.request.receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError
                    self.call.receive(len(message.get("body", b"")))
                    parts += message.get("body", b"")
                    if len(parts) > MAX_BODY_BYTES:
                        raise _too_large()
                    if not message.get("more_body", False):
                        return bytes(parts)
        except TimeoutError:
            raise HttpRefusal(408, say("REQUEST_TIMEOUT", seconds=round(BODY_SECONDS))) from None

    def take_body(self) -> Sent[Any]:
        """Return the sent object and drop it here, so that nothing else keeps it in memory."""
        sent, self._sent = self._sent, Sent()
        return sent

    def roles(self) -> frozenset[str]:
        """The client's roles.

        Raises:
            UnauthenticatedError: The client sent no token, or an unknown one.
        """
        return roles_of(self.services.tokens, self.call.party.authorization)


# The object that a handler answers with; None if it writes its answer itself.
Json = dict[str, Any]
Handler = Callable[[Exchange], Awaitable[Json | None]]


@dataclass(frozen=True, slots=True)
class Route:
    """A path, its method and its handler.

    The OpenAPI document describes the route with the first line of the handler's docstring.

    Attributes:
        path: The path, with ``{name}`` for variable parts.
        handler: Answers a request.
        body: The model of the JSON body of a POST; None for a route without JSON.
        answer: The model of the answer, for the OpenAPI document; None if it is text.
        service: The service of turret.v1 whose role the client needs (see ``authorize``); empty if
            the route is open to everyone.
        is_hidden: Whether the OpenAPI document omits the route.
        is_counted: Whether the route runs on adapters, so that metrics count it.
        is_raw: Whether the route is a POST whose body the handler reads itself.
        is_frequent: Whether clients call the route so often that calls are logged only at level
            DEBUG.
        verb: The method; empty if it is POST for a route with a body, and GET for others.
        refuse: Converts an error, with the id of its request, to the form of another API.
    """

    path: str
    handler: Handler
    body: type[Body] | None = None
    answer: type[BaseModel] | None = None
    service: str = ""
    is_hidden: bool = False
    is_counted: bool = False
    is_raw: bool = False
    is_frequent: bool = False
    verb: str = ""
    refuse: Callable[[Refusal, str], Refusal] | None = None

    @property
    def method(self) -> str:
        return self.verb or ("POST" if self.body or self.is_raw else "GET")

    @property
    def is_polled(self) -> bool:
        """Whether clients poll the route, so that its calls are logged only at level DEBUG."""
        return self.is_frequent or (self.method == "GET" and self.service != INFERENCE)


class Endpoint:
    """A route as an ASGI application.

    Args:
        route: The route that handles the request.
        services: The services that answer.
        has_admin: Whether adapters are managed at this address, not at a separate one.
    """

    def __init__(self, route: Route, services: Services, *, has_admin: bool) -> None:
        self._route = route
        self._services = services
        self._has_admin = has_admin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route, services = self._route, self._services
        request = Request(scope, receive)
        headers = request.headers
        call = Call.begin(
            f"{route.method} {route.path}",
            headers.getlist(REQUEST_ID_KEY),
            services.metrics,
            headers=headers.items,
            protocol="http",
            party=Party(services.shares, _authorization(headers), _peer(scope)),
            # Failures of polled endpoints would crowd all others out of the list of failures.
            failures=None if route.is_polled else services.failures,
            is_counted=route.is_counted,
            is_private=route.service == TRAINING,
            level=logging.DEBUG if route.is_polled else logging.INFO,
        )
        exchange = Exchange(
            call=call,
            request=request,
            reply=Reply(send, call, scope.get("extensions", {}).get(EXTENSION)),
            names=dict(route.body.names) if route.body else {},
            services=services,
            has_admin=self._has_admin,
        )
        code = Code.CANCELLED
        try:
            code, refusal = await self._answered(exchange)
            # Send the refusal only after the error is freed, because its traceback holds the body.
            if refusal is not None and route.refuse is not None:
                refusal = route.refuse(refusal, call.request_id)
            if refusal is not None:
                await exchange.reply.refuse(refusal)
        finally:
            call.finish(code)

    async def _answered(self, exchange: Exchange) -> tuple[Code, Refusal | None]:
        """Answer, or return the refusal; also returns the code to count."""
        route, call = self._route, exchange.call
        try:
            _check_head(exchange.request)
            authorize(self._services.tokens, route.service, call.party.authorization)
            if route.is_raw:
                await _handled(route.handler, exchange)
                return Code.OK, None
            if route.body is not None:
                await exchange.read_json(route.body)
            return await _answer(route.handler, exchange), None
        except ClientGoneError:
            return Code.CANCELLED, None
        except asyncio.CancelledError:
            # The listener is stopping. Nothing else waits for this task, so the exception may end
            # here, and the client gets an error.
            return Code.CANCELLED, refusal_of(UnavailableError(say("REQUEST_ENDED")))
        except Exception as error:
            refusal = refusal_of(error, exchange.names)
            said = refusal.body["error"]
            call.fail(
                getattr(error, "reason", said["code"].upper()),
                said["message"],
                violations=getattr(error, "violations", ()),
                metadata=getattr(error, "metadata", None),
            )
            if refusal.code is Code.INTERNAL:
                _log.exception("internal error", extra=log.fields(method=route.path))
            return refusal.code, refusal


def _authorization(headers: Mapping[str, str]) -> str | None:
    """The ``authorization`` header, or the equivalent of Anthropic's clients."""
    key = headers.get("x-api-key")
    return headers.get("authorization", key and f"Bearer {key}")


def _check_head(request: Request) -> None:
    scope, headers = request.scope, request.headers
    size = len(scope["raw_path"]) + len(scope["query_string"])
    if size + sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEAD_BYTES:
        raise HttpRefusal(431, say("HEAD_TOO_LARGE", most=MAX_HEAD_BYTES))
    # Reject duplicates: a proxy in front may have checked the other one of two headers.
    for name in ("authorization", "x-api-key", "host"):
        if len(headers.getlist(name)) > 1:
            raise HttpRefusal(400, say("DUPLICATE_HEADER", header=name))
    if (key := headers.get("x-api-key")) and bearer_token(_authorization(headers) or "") != key:
        raise HttpRefusal(400, say("DUPLICATE_HEADER", header="authorization or x-api-key"))
    # RFC 9112, section 3.2, requires this header.
    if "host" not in headers and scope["http_version"] == "1.1":
        raise HttpRefusal(400, say("HOST_MISSING"))


def _peer(scope: Scope) -> str:
    """The client's address in gRPC's form, so that both protocols count it as one party."""
    host, port = scope.get("client") or ("", 0)
    return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"


async def _answer(handler: Handler, exchange: Exchange) -> Code:
    """Run a handler until it ends or its client disconnects.

    Returns:
        OK, or CANCELLED if the client disconnected. In both cases the handler has ended.
    """
    # Run the handler in its own task: it cannot notice a disconnect while it waits for the engine.
    work = asyncio.ensure_future(_handled(handler, exchange))
    gone = asyncio.ensure_future(_disconnect(exchange.request.receive))
    try:
        while not await _either(work, gone):
            await exchange.reply.keep_alive()
        if not (work.done() or exchange.reply.is_ended):
            return Code.CANCELLED
        await work
        return Code.OK
    finally:
        gone.cancel()
        work.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)
        # A task refers to its exception, whose traceback refers to this frame. Without this line,
        # the cycle would keep the body of the request in memory until the next garbage collection.
        del work, gone


async def _handled(handler: Handler, exchange: Exchange) -> None:
    answer = await handler(exchange)
    if answer is not None:
        await exchange.reply.json(answer)


async def _either(work: asyncio.Future[None], gone: asyncio.Future[None]) -> bool:
    """Wait for a limited time until one of two tasks is done; return whether one is."""
    done, _ = await asyncio.wait(
        (work, gone), timeout=HEARTBEAT_SECONDS / 2, return_when=asyncio.FIRST_COMPLETED
    )
    return bool(done)


async def _disconnect(receive: Receive) -> None:
    # The body of a POST has been read, but uvicorn may report its end more than once before the
    # disconnect. The body of a GET is dropped.
    while (await receive())["type"] != "http.disconnect":
        pass
