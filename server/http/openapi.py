"""GET /openapi.json: the paths of this API, with their bodies, answers and errors."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Iterable
from typing import Any

import turret
from turret.server.api.access import SERVICE_ROLES
from turret.server.http.answer_models import AnthropicFailure, Failure
from turret.server.http.endpoint import Exchange, Handler, Route, dumps
from turret.server.http.models import ARCHIVE, ARCHIVE_FLAGS

DESCRIPTION = """\
OpenAI's HTTP API for the base model, its adapters and their mixes.

- Unknown fields are ignored, unless they are misspelt. Fields marked *Not supported* are refused,
  unless their value has no effect. A field that is null counts as absent.
- With `stream` true, an answer comes as server-sent events (`text/event-stream`), each with the
  new part of the answer. Except in `/v1/messages`, the last one is `data: [DONE]`.
- Stored completions, responses, files, assistants, batches, images and audio are not supported.
"""
_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
_STATUSES: dict[int, str] = {
    400: "A field is wrong, or the body is not JSON.",
    401: "The token is missing or unknown.",
    403: "The token lacks the role.",
    404: "The model or adapter does not exist.",
    409: "The state of an adapter or of the base model forbids it.",
    429: "The queue is full, or a budget is exceeded.",
    503: "The server is starting or shutting down.",
    504: "`timeout` passed before the answer was complete.",
}


def sender(routes: Iterable[Route], *, has_tokens: bool) -> Handler:
    """A handler that sends the document, which is as public as the console.

    Args:
        routes: The routes that the document describes.
        has_tokens: Whether callers need a token.
    """
    made = functools.cache(lambda: dumps(document(routes, has_tokens=has_tokens)))

    async def send(exchange: Exchange) -> None:
        await exchange.reply.whole(made(), 200, {"content-type": "application/json"})

    return send


def document(routes: Iterable[Route], *, has_tokens: bool) -> dict[str, Any]:
    """The OpenAPI document of these routes, without the paths of the console's files."""
    # Imported here because the import takes a third of a second, and few servers need the document.
    from fastapi.openapi.utils import get_openapi

    described = [_described(route) for route in routes if not route.is_hidden]
    made = get_openapi(
        title="turret", version=turret.__version__, description=DESCRIPTION, routes=described
    )
    made = json.loads(dumps(made), object_hook=_with_bounds)
    # FastAPI adds its own form of an error, which this server does not send.
    for name in ("HTTPValidationError", "ValidationError"):
        made["components"]["schemas"].pop(name, None)
    for path in made["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    bearer = {"type": "http", "scheme": "bearer", "description": "A token of the --token-file."}
    if has_tokens:
        made["components"]["securitySchemes"] = {"token": bearer}
        for route in routes:
            if route.service and not route.is_hidden:
                path = route.path.replace(":path}", "}")
                made["paths"][path][route.method.lower()]["security"] = [{"token": []}]
    return made


def _with_bounds(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema with JSON Schema's names for bounds (``minimum``), not pydantic's (``ge``)."""
    return {
        _BOUNDS.get(name, name) if isinstance(value, int | float) else name: value
        for name, value in schema.items()
    }


def _described(route: Route) -> Any:
    """A FastAPI route that only describes ``route``. No request reaches it."""
    from fastapi.routing import APIRoute

    def stub() -> None: ...

    parameters = []
    if "{model:path}" in route.path:
        parameters = [_parameter("model", str)]
    if route.body is not None:
        parameters.append(_parameter("body", route.body))
    body: dict[str, Any] | None = None
    if route.is_raw:
        binary = {"schema": {"type": "string", "format": "binary"}}
        body = {"requestBody": {"content": {ARCHIVE: binary}, "required": True}}
        parameters.append(_parameter("lora_name", str))
        parameters += (_parameter(name, bool, False) for name in ARCHIVE_FLAGS)
    stub.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    role = SERVICE_ROLES.get(route.service)
    statuses = _STATUSES if route.method == "POST" else {401: _STATUSES[401], 503: _STATUSES[503]}
    failure = AnthropicFailure if route.refuse else Failure
    answer: dict[str, Any] = {}
    if route.answer is None:
        answer = {"content": {"text/plain": {"schema": {"type": "string"}}}}
    elif route.body is not None and "stream" in route.body.model_fields:
        answer = {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
    return APIRoute(
        route.path,
        stub,
        methods=[route.method],
        response_model=route.answer,
        operation_id=_operation(route),
        summary=_summary(route.handler),
        description=f"Role: {role}." if role else "Open to everyone.",
        openapi_extra=body,
        responses={
            200: answer,
            **{status: {"model": failure, "description": why} for status, why in statuses.items()},
        },
    )


def _parameter(
    name: str, annotation: Any, default: Any = inspect.Parameter.empty
) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, annotation=annotation, default=default)


def _operation(route: Route) -> str:
    words = route.path.replace("{model:path}", "one").strip("/").replace("/", "_")
    return f"{route.method.lower()}_{words}"


def _summary(handler: Handler) -> str:
    return (handler.__doc__ or "").partition("\n")[0].rstrip(".")
