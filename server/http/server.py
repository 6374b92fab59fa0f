"""The HTTP listener: routes, TLS, limits, start and stop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import ssl
from collections.abc import Iterator
from typing import Any

import uvicorn
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route as StarletteRoute

from turret.server.api.access import MOST_CONNECTIONS, Shares, TokenTable
from turret.server.api.admin import Adapters
from turret.server.api.call import REQUEST_ID_KEY
from turret.server.api.faults import Failures
from turret.server.api.inference import Inference
from turret.server.basics.settings import split_address
from turret.server.config import ListenConfig, SecurityConfig
from turret.server.http import pages
from turret.server.http.archive import Upload
from turret.server.http.chat import ChatCompletions
from turret.server.http.completions import Completions
from turret.server.http.connection import Connection, Listener, tls_context
from turret.server.http.console.state import Probes, State
from turret.server.http.endpoint import INFERENCE, Endpoint, Handler, Route
from turret.server.http.messages import (
    CountRequest,
    Messages,
    MessagesRequest,
    anthropic_refusal,
)
from turret.server.http.middleware import HostCheck, RequestIds, no_route
from turret.server.http.models import Lora, Models
from turret.server.http.openapi import Document
from turret.server.http.responses import Responses
from turret.server.http.schemas import answers
from turret.server.http.schemas.fields import Body
from turret.server.http.schemas.requests import (
    AdapterName,
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingsRequest,
    LoadAdapter,
    ResponseRequest,
    TokenizeRequest,
)
from turret.server.http.texts import Classify, Embeddings, Tokens
from turret.server.metrics import Metrics

# Clients reuse idle connections, and a request fails if its connection was just closed.
KEEP_ALIVE_SECONDS = 75
# Paths for managing adapters. They are not served here if the admin API has its own address.
ADMIN_PATHS = tuple(f"/v1/{verb}_lora_adapter" for verb in ("load", "unload", "pin", "unpin"))
UPLOAD_PATH = "/v1/upload_lora_adapter"
_LAST_WORD_SECONDS = 1.0


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
        inference: The Inference service.
        adapters: The Adapters service.
        metrics: The metrics that are reported.
        failures: The last calls that failed.
        has_admin: Whether adapters can be loaded and unloaded here.
        has_tokens: Whether callers need a token.
    """
    made: list[Route] = []
    document = Document(lambda: made, has_tokens=has_tokens)
    docs, console = pages.docs(), pages.console()
    state = State(inference, adapters, metrics=metrics, failures=failures, has_admin=has_admin)
    models, probes, tokens = (
        Models(inference, adapters),
        Probes(inference, metrics),
        Tokens(inference),
    )

    def ask(
        path: str, handler: Handler, body: type[Body], answer: type[BaseModel], **more: Any
    ) -> None:
        """The route of a POST, which by default runs on adapters."""
        more = {"is_counted": True, **more}
        made.append(Route(path, handler, body, answer, INFERENCE, **more))

    def get(
        path: str, handler: Handler, service: str, answer: type[BaseModel] | None = None
    ) -> None:
        made.append(Route(path, handler, None, answer, service))

    ask("/v1/chat/completions", ChatCompletions(inference), ChatRequest, answers.ChatCompletion)
    ask("/v1/completions", Completions(inference), CompletionRequest, answers.Completion)
    ask("/v1/responses", Responses(inference), ResponseRequest, answers.Response)
    ask("/v1/embeddings", Embeddings(inference), EmbeddingsRequest, answers.Embeddings)
    ask("/classify", Classify(inference), ClassifyRequest, answers.Classification)
    messages = Messages(inference)
    form = {"refuse": anthropic_refusal}
    count_path = "/v1/messages/count_tokens"
    ask("/v1/messages", messages, MessagesRequest, answers.Message, **form)
    ask(count_path, messages.count, CountRequest, answers.TokenCount, is_counted=False, **form)
    get("/v1/models", models.list, INFERENCE, answers.ModelList)
    # Model names may contain slashes.
    get("/v1/models/{model:path}", models.get, INFERENCE, answers.ModelCard)
    ask("/tokenize", tokens.tokenize, TokenizeRequest, answers.Tokens, is_counted=False)
    ask("/detokenize", tokens.detokenize, DetokenizeRequest, answers.Text, is_counted=False)
    get("/tokenizer_info", tokens.info, INFERENCE, answers.TokenizerInfo)
    for path in ("/health", "/v1/health", "/ping"):
        get(path, probes.health, "", answers.Health)
    get("/version", probes.version, "", answers.Version)
    get("/metrics", probes.metrics, "metrics")
    # The state is open to every role: the handler itself rejects callers without one.
    for path, handler in (
        ("/openapi.json", document),
        ("/docs", docs.index),
        ("/docs/{file}", docs.file),
        ("/", console.index),
        ("/console/state", state),
        ("/console/{file}", console.file),
    ):
        made.append(Route(path, handler, is_hidden=True))
    if has_admin:
        lora = Lora(adapters)
        handlers = (lora.load, lora.unload, lora.pin, lora.unpin)
        for path, handler in zip(ADMIN_PATHS, handlers, strict=True):
            body = LoadAdapter if handler == lora.load else AdapterName
            made.append(Route(path, handler, body, None, "turret.v1.Adapters"))
        made.append(
            Route(UPLOAD_PATH, Upload(adapters), service="turret.v1.Adapters", is_archive=True)
        )
    return made


class _Uvicorn(uvicorn.Server):
    """A uvicorn server in a process that has its own signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """The HTTP server. It starts before the model is loaded, and reports that it is starting.

    Create and use it inside the running event loop.

    Args:
        listen: The address, and the origins of pages that may call.
        security: The TLS files; the caller reads the token file.
        inference: The Inference service.
        adapters: The Adapters service, or None if it has a separate address.
        metrics: The metrics that count calls.
        tokens: Accepted bearer tokens; None lets every caller in.
        shares: The limits on the answers of one party; None for no limits.
        most_connections: The maximum number of open connections; further ones are closed.
        failures: Records failed calls, which the console shows.

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
        self._app = application(
            listen,
            inference=inference,
            adapters=adapters,
            metrics=metrics,
            tokens=tokens,
            shares=shares or Shares(),
            failures=failures or Failures(),
        )
        self._tls = tls_context(security)
        self._most_connections = most_connections
        self._server: uvicorn.Server | None = None
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Bind and listen; ``address`` then has the actual port.

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
            raise OSError(f"cannot listen on {self.address}: {error}") from None
        self.address = f"{shown}:{listener.getsockname()[1]}"
        self._server = _Uvicorn(_configuration(self._app, self._tls, listener))
        self._serving = asyncio.ensure_future(self._server.serve(sockets=[listener]))

    async def stop(self, grace_seconds: float) -> None:
        """Accept no more requests; cancel those that still run after the grace period."""
        server = self._server
        if self._serving is None or server is None:
            return
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
    apart = () if has_admin else (*ADMIN_PATHS, UPLOAD_PATH)
    answered = []
    for route in made:
        endpoint = Endpoint(route, metrics=metrics, tokens=tokens, shares=shares, failures=failures)
        # Serve the path with a slash too, because a redirect would have no JSON body.
        ends = ("",) if route.path.endswith(("}", "/")) else ("", "/")
        answered += [
            StarletteRoute(f"{route.path}{end}", endpoint, methods=[route.method]) for end in ends
        ]
    middleware = _cross_origin(listen.http_cors_origin)
    if tokens is None or listen.http_allowed_host:
        # Without tokens, check the host: otherwise, a page of another origin could call the server.
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
