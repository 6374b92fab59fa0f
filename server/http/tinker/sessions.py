"""Handlers of the Tinker API's sessions and results, and functions that other handlers share."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

from turret.server.api.futures import Future, Result
from turret.server.api.tenants import Session, TenantModel, Tenants
from turret.server.api.training import MAX_DATUMS
from turret.server.basics.names import BASE
from turret.server.errors import InvalidRequestError, TrainingNotFoundError
from turret.server.http.endpoint import Exchange, Json
from turret.server.http.fields import wrong_type
from turret.server.http.refusals import HttpRefusal
from turret.server.http.tinker.schemas import OfRequest, OfSession
from turret.server.words import say

_SHOWN_CHARS = 200


def tenants_of(exchange: Exchange) -> Tenants:
    """The state of training that all protocols share."""
    tenants = exchange.services.tenants
    assert tenants is not None, "only a server that trains has these paths"
    return tenants


def owner_of(exchange: Exchange) -> str:
    """The client's identity, taken from its token; empty if the server accepts every caller."""
    return tenants_of(exchange).owner(exchange.call.party)


def session_of(exchange: Exchange, session_id: str) -> Session:
    """A session of the client. The call keeps the session alive.

    Raises:
        HttpRefusal: The session has ended, or belongs to another client.
    """
    try:
        return tenants_of(exchange).sessions.find(owner_of(exchange), session_id)
    except TrainingNotFoundError:
        raise session_gone(session_id) from None


def check_base(exchange: Exchange, name: str) -> None:
    """Check that a name is that of the base model.

    Raises:
        HttpRefusal: The name is another one.
    """
    if name not in (BASE, tenants_of(exchange).info().name):
        raise HttpRefusal(404, say("NO_SUCH_MODEL", model=name[:_SHOWN_CHARS]))


def command(
    tenants: Tenants,
    model: TenantModel,
    number: int,
    run: Callable[[], Awaitable[Result]],
    size: int = 0,
) -> Future:
    """The future of a command. A command that was sent before already has one.

    Raises:
        HttpRefusal: The command was sent before, and its result is no longer kept.
        QueueFullError: Too many commands wait.
    """
    owner, request_id = model.owner, f"{model.model_id}:{number}"
    if found := tenants.futures.find(owner, request_id):
        return found
    if model.log.is_past(number):
        raise gone()
    return model.log.add(number, owner, request_id, run, size)


def session_gone(session_id: str) -> HttpRefusal:
    """The error for a session that has ended. Its status makes clients stop their heartbeats."""
    return HttpRefusal(410, say("SESSION_NOT_FOUND", session=session_id[:_SHOWN_CHARS]))


def gone() -> HttpRefusal:
    """The error for a result that does not exist or is no longer kept."""
    return HttpRefusal(410, say("RESULT_GONE"))


def number_of(raw: Any) -> int:
    """The number of a command.

    Raises:
        InvalidRequestError: The value is not a valid number.
    """
    if type(raw) is not int or not 0 < raw < 1 << 31:
        raise InvalidRequestError.of("seq_id", wrong_type("a positive integer", raw))
    return raw


# The client divides lists of sequences into requests of this size, which leaves room for the other
# fields of a body of at most 4 MiB.
_CHUNK_BYTES = 3_000_000
_CONFIG: dict[str, Any] = {
    "fwdbwd_max_chunk_len": min(256, MAX_DATUMS),
    "fwdbwd_max_chunk_bytes_count": _CHUNK_BYTES,
    "sample_max_concurrent_requests": 256,
}
# Clients wait 45 seconds for an answer, so tell them earlier to ask again.
POLL_SECONDS = 20.0
# How often a waiting call checks whether the server is shutting down.
_LOOK_SECONDS = 1.0


async def config(exchange: Exchange) -> Json:
    """Tell the client which features to use; all others are off."""
    return _CONFIG


async def dynamic_config(exchange: Exchange) -> Json:
    """Tell the client which features to use from now on."""
    return {"sample_cancel_enabled": True}


async def telemetry(exchange: Exchange) -> Json:
    """Discard the client's telemetry."""
    return {"status": "accepted"}


async def healthz(exchange: Exchange) -> Json:
    """Report that the server answers."""
    return {"status": "ok"}


async def capabilities(exchange: Exchange) -> Json:
    """List the base model, which is the only one."""
    info = tenants_of(exchange).info()
    model = {
        "model_name": info.name,
        "max_context_length": info.max_model_len,
        "trainable": True,
        "sampleable": True,
    }
    return {"supported_models": [model]}


async def create_session(exchange: Exchange) -> Json:
    """Begin a session."""
    sessions = tenants_of(exchange).sessions
    sessions.training()
    session = sessions.begin(owner_of(exchange))
    return {"type": "create_session", "session_id": session.session_id}


async def heartbeat(exchange: Exchange) -> Json:
    """Keep a session alive."""
    session_of(exchange, exchange.take_body().checked(OfSession).session_id)
    return {"type": "session_heartbeat"}


async def finish(exchange: Exchange) -> Json:
    """End a session."""
    session = session_of(exchange, exchange.request.path_params["session"])
    tenants_of(exchange).sessions.end(session)
    return {}


# Results.


async def retrieve(exchange: Exchange) -> None:
    """Wait for a result.

    Raises:
        QueueFullError: See ``Call.send``.
    """
    body = exchange.take_body().checked(OfRequest)
    future = tenants_of(exchange).futures.find(owner_of(exchange), body.request_id)
    if future is None:
        raise gone()
    result: Result | None = None
    end = time.monotonic() + POLL_SECONDS
    while result is None:
        left = end - time.monotonic()
        result = await future.wait(max(0.0, min(left, _LOOK_SECONDS)))
        if left <= 0 or not exchange.services.gate.is_open:
            break
    if result is None:
        again = {"type": "try_again", "request_id": body.request_id, "queue_state": "active"}
        await exchange.reply.json(again, 408)
        return
    # The result may be dropped elsewhere before the client has read it, so this call counts its
    # bytes.
    exchange.call.send(len(result.body))
    future.fetched()
    await exchange.reply.whole(result.body, 200, {"content-type": result.kind})


async def cancel(exchange: Exchange) -> Json:
    """Cancel sampling; other work runs to its end."""
    body = exchange.take_body().checked(OfRequest)
    future = tenants_of(exchange).futures.find(owner_of(exchange), body.request_id)
    if future is not None:
        future.cancel()
    return {}
