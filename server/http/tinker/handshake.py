"""Handlers of all calls except training and sampling: features, capabilities, sessions, results."""

from __future__ import annotations

import time
from typing import Any

from turret.server.api.tenants.futures import Result
from turret.server.api.tenants.reading import MAX_DATUMS
from turret.server.http.endpoint import Exchange, Json
from turret.server.http.schemas.fields import Body
from turret.server.http.tinker.schemas import OfRequest, OfSession
from turret.server.http.tinker.state import TinkerState, gone

# The client divides lists of sequences into requests of this size, which leaves room for the rest
# of a body of 4 MiB.
_CHUNK_BYTES = 3_000_000
_CONFIG: dict[str, Any] = {
    "fwdbwd_max_chunk_len": min(256, MAX_DATUMS),
    "fwdbwd_max_chunk_bytes_count": _CHUNK_BYTES,
    "sample_max_concurrent_requests": 256,
}
_DYNAMIC_CONFIG: dict[str, Any] = {"sample_cancel_enabled": True}
# Clients wait for 45 seconds.
POLL_SECONDS = 20.0
# How often a waiting call checks whether the server is shutting down.
_LOOK_SECONDS = 1.0


async def config(state: TinkerState, exchange: Exchange, _body: Body) -> Json:
    """Tell the client which features to use; all others are off."""
    return _CONFIG


async def dynamic_config(state: TinkerState, exchange: Exchange, _body: Body) -> Json:
    """Tell the client which features to use from now on."""
    return _DYNAMIC_CONFIG


async def telemetry(state: TinkerState, exchange: Exchange, _body: Body) -> Json:
    """Discard the client's telemetry."""
    return {"status": "accepted"}


async def healthz(state: TinkerState, exchange: Exchange) -> Json:
    """Report that the server answers."""
    return {"status": "ok"}


async def capabilities(state: TinkerState, exchange: Exchange) -> Json:
    """List the base model, which is the only one."""
    info = state.tenants.info()
    model = {
        "model_name": info.name,
        "max_context_length": info.max_model_len,
        "trainable": True,
        "sampleable": True,
    }
    return {"supported_models": [model]}


async def create_session(state: TinkerState, exchange: Exchange, _body: Body) -> Json:
    """Begin a session."""
    state.tenants.sessions.training()
    session = state.tenants.sessions.begin(state.owner(exchange))
    return {"type": "create_session", "session_id": session.session_id}


async def heartbeat(state: TinkerState, exchange: Exchange, body: OfSession) -> Json:
    """Keep a session alive."""
    state.session(exchange, body.session_id)
    return {"type": "session_heartbeat"}


async def finish(state: TinkerState, exchange: Exchange, _body: Body) -> Json:
    """End a session."""
    session = state.session(exchange, exchange.request.path_params["session"])
    state.tenants.sessions.end(session)
    return {}


# Results.


async def retrieve(state: TinkerState, exchange: Exchange, body: OfRequest) -> None:
    """Wait for a result."""
    future = state.tenants.futures.find(state.owner(exchange), body.request_id)
    if future is None:
        raise gone()
    result: Result | None = None
    end = time.monotonic() + POLL_SECONDS
    while result is None:
        left = end - time.monotonic()
        result = await future.wait(max(0.0, min(left, _LOOK_SECONDS)))
        if left <= 0 or not state.services.gate.is_open:
            break
    if result is None:
        again = {"type": "try_again", "request_id": body.request_id, "queue_state": "active"}
        await exchange.reply.json(again, 408)
        return
    future.fetched()
    await exchange.reply.whole(result.body, 200, {"content-type": result.kind})


async def cancel(state: TinkerState, exchange: Exchange, body: OfRequest) -> Json:
    """Cancel sampling; other work runs to its end."""
    future = state.tenants.futures.find(state.owner(exchange), body.request_id)
    if future is not None and future.task is not None:
        future.task.cancel()
    return {}
