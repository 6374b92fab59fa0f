"""The HTTP listener: routes, TLS, limits, start and stop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import socket
import ssl
from collections.abc import Collection, Iterator, Mapping

import uvicorn
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as StarletteRoute

from turret.server.api.access.shares import MOST_CONNECTIONS, Shares
from turret.server.api.access.tokens import TokenTable
from turret.server.api.admin.adapters import Adapters
from turret.server.api.call import REQUEST_ID_KEY
from turret.server.api.faults import Failures
from turret.server.api.inference.inference import Inference
from turret.server.basics.address import split_address
from turret.server.basics.codes import Code
from turret.server.config import ListenConfig, SecurityConfig
from turret.server.http import asked
from turret.server.http.chat import ChatCompletions
from turret.server.http.completions import Completions
from turret.server.http.connection import Connection, Listener, tls_context
from turret.server.http.console.page import Page
from turret.server.http.console.state import Probes, State
from turret.server.http.endpoint import Endpoint, Handler, Route
from turret.server.http.middleware import HostCheck, RequestIds
from turret.server.http.models import ADAPTER_NAMES, Lora, Models
from turret.server.http.openapi import Reference
from turret.server.http.refusals import HttpRefusal, refusal_of
from turret.server.http.reply import dumps
from turret.server.http.responses import Responses
from turret.server.http.schemas import answers, requests
from turret.server.http.schemas.fields import Body, slip_of
from turret.server.http.texts import Classify, Embeddings, Tokens
from turret.server.metrics import Metrics
from turret.server.words import say

INFERENCE = "turret.v1.Inference"
ADAPTERS = "turret.v1.Adapters"
METRICS = "metrics"

# Clients reuse idle connections, and a request fails if its connection was just closed.
KEEP_ALIVE_SECONDS = 75
BACKLOG = 1024
# Paths for managing adapters. They are not served here if the admin API has its own address.
ADMIN_PATHS = tuple(f"/v1/{verb}_lora_adapter" for verb in ("load", "unload", "pin", "unpin"))
_LAST_WORD_SECONDS = 1.0
# Shorter paths differ in few letters anyway, so they are not suggested by their spelling.
_SHORT_PATH = 10
_MOST_ECHOED = 200


def routes(
    inference: Inference,
    adapters: Adapters,
    *,
    metrics: Metrics,
    failures: Failures,
    has_admin: bool,
    has_tokens: bool = False,
) -> list[Route]:
    """All routes.

    Args:
        inference: Answers the data plane.
        adapters: Answers the control plane.
        metrics: What is counted.
        failures: The last calls that failed.
        has_admin: Whether adapters can be loaded and unloaded here.
        has_tokens: Whether callers need a token.
    """
    made: list[Route] = []
    reference = Reference(lambda: made, has_tokens=has_tokens)
    page = Page()
    state = State(inference, adapters, metrics=metrics, failures=failures, has_admin=has_admin)
    models, probes = Models(inference, adapters), Probes(inference, metrics)
    texts, admin = Tokens(inference), Lora(adapters)
    chat, completions = ChatCompletions(inference), Completions(inference)
    made += [
        _answer(
            "/v1/chat/completions",
            chat,
            (requests.ChatRequest, answers.ChatCompletion),
            asked.CHAT_NAMES,
            "Answer a conversation",
        ),
        _answer(
            "/v1/completions",
            completions,
            (requests.CompletionRequest, answers.Completion),
            asked.COMPLETION_NAMES,
            "Continue prompts",
        ),
        _answer(
            "/v1/responses",
            Responses(inference),
            (requests.ResponseRequest, answers.Response),
            asked.RESPONSE_NAMES,
            "Answer a conversation (Responses API); nothing is stored",
        ),
        _answer(
            "/v1/embeddings",
            Embeddings(inference),
            (requests.EmbeddingsRequest, answers.Embeddings),
            asked.INPUT_NAMES,
            "Embed texts",
        ),
        _answer(
            "/classify",
            Classify(inference),
            (requests.ClassifyRequest, answers.Classification),
            asked.INPUT_NAMES,
            "Label texts",
        ),
        _get("/v1/models", models.list, INFERENCE, answers.ModelList, "List models"),
        # Model names may contain slashes.
        _get("/v1/models/{model:path}", models.get, INFERENCE, answers.ModelCard, "Get a model"),
        _post(
            "/tokenize",
            texts.tokenize,
            INFERENCE,
            (requests.TokenizeRequest, answers.Tokens),
            asked.TOKEN_NAMES,
            "Turn a text or a conversation into tokens",
        ),
        _post(
            "/detokenize",
            texts.detokenize,
            INFERENCE,
            (requests.DetokenizeRequest, answers.Text),
            asked.TOKEN_NAMES,
            "Turn tokens into a text",
        ),
        _get("/health", probes.health, "", answers.Health, "Whether requests are served"),
        _get("/metrics", probes.metrics, METRICS, None, "Metrics for Prometheus"),
        _get("/openapi.json", reference.openapi),
        _get("/docs", reference.docs),
        _get("/docs/{file}", reference.file),
        _get("/", page.index),
        # Open to every role: the handler itself rejects callers without one.
        _get("/console/state", state),
        _get("/console/{file}", page.file),
    ]
    if has_admin:
        name = requests.AdapterName
        for path, handler, body, summary in zip(
            ADMIN_PATHS,
            (admin.load, admin.unload, admin.pin, admin.unpin),
            (requests.LoadAdapter, name, name, name),
            (
                "Register an adapter of any method",
                "Remove an adapter once no request uses it",
                "Keep an adapter in memory",
                "Let an adapter leave memory again",
            ),
            strict=True,
        ):
            made.append(_post(path, handler, ADAPTERS, (body, None), ADAPTER_NAMES, summary))
    return made


_Bodies = tuple[type[Body], type[BaseModel] | None]


def _answer(
    path: str, handler: Handler, bodies: _Bodies, names: Mapping[str, str], summary: str
) -> Route:
    """The routes of calls that run on adapters."""
    made = _post(path, handler, INFERENCE, bodies, names, summary)
    return dataclasses.replace(made, is_counted=True)


def _get(
    path: str,
    handler: Handler,
    service: str = "",
    answer: type[BaseModel] | None = None,
    summary: str = "",
) -> Route:
    # Probes and pages are polled, so their calls are not worth a line of the log.
    level = logging.INFO if service == INFERENCE else logging.DEBUG
    return Route(
        method="GET",
        path=path,
        handler=handler,
        service=service,
        answer=answer,
        summary=summary,
        level=level,
    )


def _post(
    path: str,
    handler: Handler,
    service: str,
    bodies: _Bodies,
    names: Mapping[str, str],
    summary: str,
) -> Route:
    return Route(
        method="POST",
        path=path,
        handler=handler,
        service=service,
        names=names,
        body=bodies[0],
        answer=bodies[1],
        summary=summary,
    )


class _Uvicorn(uvicorn.Server):
    """A server inside a process that has its own signal handlers."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_up = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_up.set()


class HttpServer:
    """The HTTP server. It starts before the model is loaded and reports that it is starting.

    Must be made and used inside the running event loop.

    Args:
        listen: The address, and the origins of pages that may call.
        security: TLS files; its token file is read by the caller.
        inference: Answers the data plane.
        adapters: Answers the control plane, unless that has an address of its own.
        metrics: Counts calls.
        tokens: Accepted bearer tokens; None lets every caller in.
        shares: Limits the answers of one party; without them there is none.
        most_connections: Open at once; what comes beyond them is closed.
        failures: Takes in the calls that fail, and the console shows them.

    Raises:
        OSError: A TLS file cannot be read, or the files do not fit together.
    """

    def __init__(
        self,
        listen: ListenConfig,
        security: SecurityConfig,
        *,
        inference: Inference,
        adapters: Adapters,
        metrics: Metrics,
        tokens: TokenTable | None,
        shares: Shares | None = None,
        most_connections: int = MOST_CONNECTIONS,
        failures: Failures | None = None,
    ) -> None:
        assert listen.http_address is not None
        self.address = listen.http_address
        app = application(
            listen,
            inference=inference,
            adapters=adapters,
            metrics=metrics,
            tokens=tokens,
            shares=shares or Shares(),
            failures=failures or Failures(),
        )
        context = tls_context(security)
        host, _ = split_address(self.address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = Listener(family, most_connections)
        self._server = _Uvicorn(_configuration(app, context, self._listener))
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Bind and listen; ``address`` then has the actual port.

        Raises:
            OSError: The address cannot be bound.
        """
        host, port = split_address(self.address)
        listener = self._listener
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if listener.family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind((host, port))
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            raise OSError(f"cannot listen on {self.address}: {error}") from None
        shown = f"[{host}]" if ":" in host else host
        self.address = f"{shown}:{listener.getsockname()[1]}"
        self._serving = asyncio.ensure_future(self._server.serve(sockets=[listener]))
        up = asyncio.ensure_future(self._server.is_up.wait())
        await asyncio.wait((self._serving, up), return_when=asyncio.FIRST_COMPLETED)
        if not up.done():
            up.cancel()
            await self._serving

    async def stop(self, grace_seconds: float) -> None:
        """Take no further request; cancel those that still run after the grace period."""
        if self._serving is None:
            self._listener.close()
            return
        server = self._server
        server.config.timeout_graceful_shutdown = grace_seconds  # type: ignore[assignment]
        server.should_exit = True
        await self._serving
        # These tasks were just cancelled. Let each send its last message, but do not wait for a
        # client that does not read.
        tasks = list(server.server_state.tasks)
        if tasks:
            await asyncio.wait(tasks, timeout=_LAST_WORD_SECONDS)
        for connection in list(server.server_state.connections):
            connection.transport.abort()
        await asyncio.gather(*tasks, return_exceptions=True)


def application(
    listen: ListenConfig,
    *,
    inference: Inference,
    adapters: Adapters,
    metrics: Metrics,
    tokens: TokenTable | None,
    shares: Shares,
    failures: Failures,
) -> Starlette:
    """The ASGI application with all routes; arguments are those of ``HttpServer``."""
    assert listen.http_address is not None
    has_admin = listen.admin_address is None
    made = routes(
        inference,
        adapters,
        metrics=metrics,
        failures=failures,
        has_admin=has_admin,
        has_tokens=tokens is not None,
    )
    apart = () if has_admin else ADMIN_PATHS
    answered = []
    for route in made:
        endpoint = Endpoint(route, metrics=metrics, tokens=tokens, shares=shares, failures=failures)
        # Serve the path with a slash too: a redirect would have no JSON body.
        ends = ("",) if route.path.endswith(("}", "/")) else ("", "/")
        answered += [
            StarletteRoute(f"{route.path}{end}", endpoint, methods=[route.method]) for end in ends
        ]
    middleware = _cross_origin(listen.http_cors_origin)
    if tokens is None or listen.http_allowed_host:
        # Without tokens, check the host: a page of another origin could call the server.
        names = (split_address(listen.http_address)[0], *listen.http_allowed_host)
        middleware.insert(0, Middleware(HostCheck, names=names))
    middleware.insert(0, Middleware(RequestIds))
    app = Starlette(
        routes=answered,
        middleware=middleware,
        exception_handlers={HTTPException: functools.partial(_no_route, apart)},
    )
    app.router.redirect_slashes = False
    return app


def _configuration(
    app: Starlette, context: ssl.SSLContext | None, listener: Listener
) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=functools.partial(Connection, listener),  # type: ignore[arg-type]
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
    """The middleware that lets pages of other origins call."""
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


def _meant(request: Request) -> str:
    """The served path that a misspelt one may mean, or one with or without ``/v1``; "" if none."""
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


async def _no_route(apart: Collection[str], request: Request, error: Exception) -> Response:
    """Reports what Starlette itself rejects: an unknown path or method.

    Args:
        apart: Paths that would be, were it not for an address of their own service.
        request: What was asked.
        error: Starlette's.
    """
    status = error.status_code if isinstance(error, HTTPException) else 500
    code = Code.NOT_FOUND if status == 404 else Code.UNIMPLEMENTED
    method, path = request.method, request.url.path[:_MOST_ECHOED]
    allowed = (getattr(error, "headers", None) or {}).get("Allow", "")
    if path.rstrip("/") in apart:
        text = say("URL_ELSEWHERE", method=method, path=path)
    elif status == 405:
        methods = " or ".join(each for each in allowed.split(", ") if each != "HEAD")
        text = say("METHOD_NOT_ALLOWED", method=method, path=path, allowed=methods)
    elif meant := _meant(request):
        text = say("UNKNOWN_URL", method=method, path=path, closest=meant)
    else:
        text = say("UNKNOWN_URL", method=method, path=path)
    refusal = refusal_of(HttpRefusal(status, code, text))
    headers = {**refusal.headers, **(getattr(error, "headers", None) or {})}
    return Response(dumps(refusal.body), status, headers=headers, media_type="application/json")
