"""Common handling of all requests: authorisation, start and end of the call, and error answers."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from starlette.datastructures import Headers, QueryParams
from starlette.types import Receive, Scope, Send

from turret.server import log
from turret.server.api.access import Party, authorize, bearer_token, roles_of
from turret.server.api.call import REQUEST_ID_KEY, Call
from turret.server.api.services import Services
from turret.server.basics.codes import Code
from turret.server.errors import UnavailableError
from turret.server.http.body import ClientGoneError, read_json
from turret.server.http.connection import EXTENSION, MAX_HEAD_BYTES
from turret.server.http.refusals import HttpRefusal, Refusal, refusal_of
from turret.server.http.reply import Reply
from turret.server.http.schemas.fields import Body, Sent
from turret.server.words import say

INFERENCE, ADAPTERS = "turret.v1.Inference", "turret.v1.Adapters"
TRAINING = "turret.v1.Training"
# A stream that has been quiet for this long gets a comment.
HEARTBEAT_SECONDS = 15.0
_log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Exchange:
    """One request, and the means to answer it.

    Attributes:
        call: The call, with its id and its counts.
        scheme: ``http`` or ``https``.
        path: Parts of the path, by name.
        query: The parameters of the query, by name. If a name occurs several times, the last one
            counts.
        headers: The request's headers.
        receive: ASGI's function, for a handler that reads the body itself.
        reply: Writes the answer.
        names: The client's names for field paths of turret.v1.
        services: The services that answer.
        has_admin: Whether adapters can be managed here.
    """

    call: Call
    scheme: str
    path: Mapping[str, str]
    query: Mapping[str, str]
    headers: Mapping[str, str]
    receive: Receive
    reply: Reply
    names: dict[str, str]
    services: Services
    has_admin: bool
    _sent: Sent[Any] = dataclasses.field(default_factory=Sent)

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


Handler = Callable[[Exchange], Awaitable[None]]


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
        is_frequent: Whether clients call the route so often that calls are not logged.
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
        """Whether the route is a probe or a page, whose calls are not logged."""
        return self.is_frequent or (self.method == "GET" and self.service != INFERENCE)


class Endpoint:
    """A route as an ASGI application.

    Args:
        route: The route that handles the request.
        services: The services that answer.
        has_admin: Whether adapters can be managed here.
    """

    def __init__(self, route: Route, services: Services, *, has_admin: bool) -> None:
        self._route = route
        self._services = services
        self._has_admin = has_admin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route, services = self._route, self._services
        headers = Headers(scope=scope)
        call = Call.begin(
            f"{route.method} {route.path}",
            headers.getlist(REQUEST_ID_KEY),
            services.metrics,
            headers=headers.items,
            protocol="http",
            party=Party(services.shares, _authorization(headers), _peer(scope)),
            # Failures of polled endpoints would crowd out all others.
            failures=None if route.is_polled else services.failures,
            is_counted=route.is_counted,
            level=logging.DEBUG if route.is_polled else logging.INFO,
        )
        reply = Reply(send, call, scope.get("extensions", {}).get(EXTENSION))
        code = Code.CANCELLED
        try:
            code, refusal = await self._answered(scope, receive, call, reply)
            # Send the refusal only after the error is freed, because its traceback holds the body.
            if refusal is not None and route.refuse is not None:
                refusal = route.refuse(refusal, call.request_id)
            if refusal is not None:
                await reply.refuse(refusal)
        finally:
            call.finish(code)

    async def _answered(
        self, scope: Scope, receive: Receive, call: Call, reply: Reply
    ) -> tuple[Code, Refusal | None]:
        """Answer, or return the refusal; also returns the code to count."""
        route = self._route
        headers = Headers(scope=scope)
        names = dict(route.body.names) if route.body else {}
        try:
            _check_head(scope, headers)
            authorize(self._services.tokens, route.service, call.party.authorization)
            exchange = Exchange(
                call=call,
                scheme=scope["scheme"],
                path=scope["path_params"],
                query=QueryParams(scope["query_string"]),
                headers=headers,
                receive=receive,
                reply=reply,
                names=names,
                services=self._services,
                has_admin=self._has_admin,
            )
            if route.is_raw:
                await route.handler(exchange)
                return Code.OK, None
            if route.body is not None:
                exchange._sent = await read_json(receive, headers, route.body, call)
            return await _answer(route.handler, exchange, receive), None
        except ClientGoneError:
            return Code.CANCELLED, None
        except asyncio.CancelledError:
            # The listener is stopping. Nothing else waits for this task, so report it to the
            # client.
            why = UnavailableError(say("REQUEST_ENDED"))
            return Code.CANCELLED, refusal_of(why)
        except Exception as error:
            refusal = refusal_of(error, names)
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


def _check_head(scope: Scope, headers: Headers) -> None:
    size = len(scope["raw_path"]) + len(scope["query_string"])
    if size + sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEAD_BYTES:
        raise HttpRefusal(431, Code.INVALID_ARGUMENT, say("HEAD_TOO_LARGE", most=MAX_HEAD_BYTES))
    # Reject duplicates: a proxy in front may have checked the other one of two headers.
    for name in ("authorization", "x-api-key", "host"):
        if len(headers.getlist(name)) > 1:
            text = say("DUPLICATE_HEADER", header=name)
            raise HttpRefusal(400, Code.INVALID_ARGUMENT, text)
    if (key := headers.get("x-api-key")) and bearer_token(_authorization(headers) or "") != key:
        text = say("DUPLICATE_HEADER", header="authorization or x-api-key")
        raise HttpRefusal(400, Code.INVALID_ARGUMENT, text)
    # RFC 9112, section 3.2.
    if "host" not in headers and scope["http_version"] == "1.1":
        raise HttpRefusal(400, Code.INVALID_ARGUMENT, say("HOST_MISSING"))


def _peer(scope: Scope) -> str:
    """The client's address in gRPC's form, so that both protocols count one party."""
    host, port = scope.get("client") or ("", 0)
    return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"


async def _answer(handler: Handler, exchange: Exchange, receive: Receive) -> Code:
    """Run a handler until it ends or its client disconnects.

    Returns:
        OK, or CANCELLED if the client disconnected. In both cases the handler has ended.
    """
    # Run the handler in its own task: it cannot notice a disconnect while it waits for the engine.
    work = asyncio.ensure_future(handler(exchange))
    gone = asyncio.ensure_future(_disconnect(receive))
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


async def _either(work: asyncio.Future[None], gone: asyncio.Future[None]) -> bool:
    """Wait for a limited time until one of two tasks is done; returns whether one is."""
    done, _ = await asyncio.wait(
        (work, gone), timeout=HEARTBEAT_SECONDS / 2, return_when=asyncio.FIRST_COMPLETED
    )
    return bool(done)


async def _disconnect(receive: Receive) -> None:
    # The body of a POST has been read, but uvicorn may report its end more than once before the
    # disconnect. The body of a GET is dropped.
    while (await receive())["type"] != "http.disconnect":
        pass
