"""The HTTP listener: the layers around the routes, TLS, limits, start and stop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import ssl
from collections.abc import Collection, Iterable, Iterator, Mapping

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as StarletteRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from turret.server.api.access import ADAPTERS, is_own_host
from turret.server.api.call import REQUEST_ID_KEY, request_id_of
from turret.server.api.services import Services
from turret.server.basics.settings import split_address
from turret.server.config import ListenConfig, SecurityConfig
from turret.server.http.connection import Connection, Listener, tls_context
from turret.server.http.endpoint import Endpoint, Route, dumps
from turret.server.http.fields import slip_of
from turret.server.http.openapi import sender
from turret.server.http.refusals import HttpRefusal, refusal_of
from turret.server.http.routes import ROUTES
from turret.server.words import say

ANY = "*"
_SHOWN_CHARS = 200
# Unrelated short paths also differ in few letters, so a similar spelling proves nothing.
_SHORT_PATH = 10


class HostCheck:
    """Rejects requests whose host name is not one of the server's, with status 421.

    This protects against DNS rebinding: once a page of evil.example is loaded, its owner can make
    that name resolve to this server. The browser then treats requests to this server as requests to
    the page's own origin, and only their Host header shows the difference.

    Args:
        app: The application that answers accepted requests.
        names: Additional accepted names; ``*`` accepts all.
    """

    def __init__(self, app: ASGIApp, names: Iterable[str]) -> None:
        self._app = app
        self._names = {name.lower().rstrip(".") for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = Headers(scope=scope).get("host", "")
        if ANY in self._names or is_own_host(host, self._names):
            await self._app(scope, receive, send)
            return
        text = say("UNKNOWN_HOST", host=host[:_SHOWN_CHARS])
        refused = _response(HttpRefusal(421, text))
        await refused(scope, receive, send)


class RequestIds:
    """Adds ``x-request-id`` to answers without one: those to unknown paths, methods and hosts.

    Args:
        app: The application that answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent = Headers(scope=scope).getlist(REQUEST_ID_KEY)
                MutableHeaders(scope=message).setdefault(REQUEST_ID_KEY, request_id_of(sent))
            await send(message)

        await self._app(scope, receive, named)


async def no_route(apart: Collection[str], request: Request, error: Exception) -> Response:
    """The answer to a request that Starlette itself rejects, for its unknown path or method.

    Args:
        apart: Paths that are served at a separate address.
        request: The rejected request.
        error: Starlette's error.
    """
    assert isinstance(error, HTTPException)
    headers = error.headers or {}
    method, path = request.method, request.url.path[:_SHOWN_CHARS]
    if path.rstrip("/") in apart:
        text = say("URL_ELSEWHERE", method=method, path=path)
    elif error.status_code == 405:
        allowed = headers.get("Allow", "").split(", ")
        methods = " or ".join(each for each in allowed if each != "HEAD")
        text = say("METHOD_NOT_ALLOWED", method=method, path=path, allowed=methods)
    else:
        meant = _meant(request)
        closest = {"closest": meant} if meant else {}
        text = say("UNKNOWN_URL", method=method, path=path, **closest)
    return _response(HttpRefusal(error.status_code, text), headers)


def _meant(request: Request) -> str:
    """The path that a client probably meant, with or without ``/v1``; "" if there is none."""
    parts = [part for part in request.url.path.split("/") if part]
    while parts and parts[0].lower() == "v1":
        del parts[0]
    if not (named := "/".join(parts)):
        return ""
    served = {getattr(route, "path", "").rstrip("/") for route in request.app.routes}
    wanted = (f"/v1/{named}", f"/{named}", f"/v1/{named}s")
    if found := next((path for path in wanted if path in served), ""):
        return found
    return slip_of(wanted[0], (path for path in served if len(path) > _SHORT_PATH))


def _response(error: HttpRefusal, headers: Mapping[str, str] | None = None) -> Response:
    refusal = refusal_of(error)
    every = {**refusal.headers, **(headers or {})}
    return Response(dumps(refusal.body), refusal.status, every, media_type="application/json")


# Clients reuse idle connections, and a request fails if the server has just closed its connection.
# Most clients close idle connections earlier than this.
KEEP_ALIVE_SECONDS = 75
_LAST_WORD_SECONDS = 1.0


class _Uvicorn(uvicorn.Server):
    """A uvicorn server in a process that has its own signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """The HTTP server. Until the model is loaded, it answers that the server is starting.

    Create and use it inside the running event loop.

    Args:
        listen: The address, and the origins of pages that may call the server.
        security: The TLS files; the caller reads the token file.
        services: The services that answer.

    Raises:
        OSError: A TLS file cannot be read, or the files do not match each other.
    """

    def __init__(self, listen: ListenConfig, security: SecurityConfig, services: Services) -> None:
        assert listen.http_address is not None
        self.address = listen.http_address
        self._tenants = services.tenants
        self._app = application(listen, services)
        self._tls = tls_context(security)
        self._most_connections = services.most_connections
        self._server: uvicorn.Server | None = None
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Bind and listen. Afterwards, ``address`` has the actual port.

        Raises:
            OSError: The address cannot be bound.
        """
        host, port = split_address(self.address)
        shown, family = (f"[{host}]", socket.AF_INET6) if ":" in host else (host, socket.AF_INET)
        try:
            listener = Listener(
                socket.create_server((host, port), family=family), self._most_connections
            )
        except OSError as error:
            raise OSError(say("ADDRESS_UNUSABLE", value=self.address, why=str(error))) from None
        self.address = f"{shown}:{listener.getsockname()[1]}"
        self._server = _Uvicorn(_configuration(self._app, self._tls))
        self._serving = asyncio.ensure_future(self._server.serve(sockets=[listener]))
        if self._tenants is not None:
            self._tenants.start()

    async def stop(self, grace_seconds: float) -> None:
        """Accept no more requests; cancel those that still run after the grace period."""
        server = self._server
        if self._serving is None or server is None:
            return
        server.config.timeout_graceful_shutdown = grace_seconds  # type: ignore[assignment]
        server.should_exit = True
        await self._serving
        # These tasks were just cancelled. Let each of them send its last message, but do not wait
        # for clients that do not read.
        tasks = list(server.server_state.tasks)
        if tasks:
            await asyncio.wait(tasks, timeout=_LAST_WORD_SECONDS)
        for connection in list(server.server_state.connections):
            connection.transport.abort()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._tenants is not None:
            await self._tenants.stop()


def application(listen: ListenConfig, services: Services) -> Starlette:
    """The ASGI application with all routes.

    Args:
        listen: See ``HttpServer``.
        services: See ``HttpServer``.
    """
    assert listen.http_address is not None
    has_admin, has_tokens = listen.admin_address is None, services.tokens is not None
    served = [route for route in ROUTES if has_admin or route.service != ADAPTERS]
    apart = {route.path for route in ROUTES} - {route.path for route in served}
    if services.tenants is not None:
        # Imported here because the import takes time, and few servers train.
        from turret.server.http import tinker

        served += tinker.ROUTES
    document = Route("/openapi.json", sender(served, has_tokens=has_tokens), is_hidden=True)
    answered = []
    for route in (*served, document):
        endpoint = Endpoint(route, services, has_admin=has_admin)
        # Serve the path with a trailing slash as well, because a redirect would have no JSON body.
        ends = ("",) if route.path.endswith(("}", "/")) else ("", "/")
        answered += [
            StarletteRoute(f"{route.path}{end}", endpoint, methods=[route.method]) for end in ends
        ]
    middleware = _cross_origin(listen.http_cors_origin)
    if not has_tokens or listen.http_allowed_host:
        # Without tokens, check the host. Otherwise, a page of another origin could call the server.
        names = (split_address(listen.http_address)[0], *listen.http_allowed_host)
        middleware.insert(0, Middleware(HostCheck, names=names))
    middleware.insert(0, Middleware(RequestIds))
    app = Starlette(
        routes=answered,
        middleware=middleware,
        exception_handlers={HTTPException: functools.partial(no_route, apart)},
    )
    app.router.redirect_slashes = False
    return app


def _configuration(app: Starlette, context: ssl.SSLContext | None) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        # The endpoints answer and log failures themselves.
        log_level="critical",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        ssl_context_factory=None if context is None else lambda _config, _default: context,
    )


def _cross_origin(origins: tuple[str, ...]) -> list[Middleware]:
    """The middleware that allows calls from pages of other origins."""
    if not origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID_KEY, "retry-after"],
        )
    ]
