"""Handlers of all calls except training and sampling: features, capabilities, sessions, results."""

from __future__ import annotations

import time
from typing import Any

from turret.server.api.tenants.futures import Result
from turret.server.api.tenants.reading import MAX_DATUMS
from turret.server.http.endpoint import Exchange
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
# Clients wait for 45 seconds.
POLL_SECONDS = 20.0
# How often a waiting call checks whether the server is shutting down.
_LOOK_SECONDS = 1.0


async def config(state: TinkerState, exchange: Exchange, _body: Body) -> None:
    """Tell the client which features to use; all others are off."""
    await exchange.reply.json(_CONFIG)


async def dynamic_config(state: TinkerState, exchange: Exchange, _body: Body) -> None:
    """Tell the client which features to use from now on."""
    await exchange.reply.json({"sample_cancel_enabled": True})


async def telemetry(state: TinkerState, exchange: Exchange, _body: Body) -> None:
    """Discard the client's telemetry."""
    await exchange.reply.json({"status": "accepted"})


async def healthz(state: TinkerState, exchange: Exchange) -> None:
    """Report that the server answers."""
    await exchange.reply.json({"status": "ok"})


async def capabilities(state: TinkerState, exchange: Exchange) -> None:
    """List the base model, which is the only one."""
    info = state.tenants.info()
    model = {
        "model_name": info.name,
        "max_context_length": info.max_model_len,
        "trainable": True,
        "sampleable": True,
    }
    await exchange.reply.json({"supported_models": [model]})


async def create_session(state: TinkerState, exchange: Exchange, _body: Body) -> None:
    """Begin a session."""
    state.tenants.sessions.training()
    session = state.tenants.sessions.begin(state.owner(exchange))
    await exchange.reply.json({"type": "create_session", "session_id": session.session_id})


async def heartbeat(state: TinkerState, exchange: Exchange, body: OfSession) -> None:
    """Keep a session alive."""
    state.session(exchange, body.session_id)
    await exchange.reply.json({"type": "session_heartbeat"})


async def finish(state: TinkerState, exchange: Exchange, _body: Body) -> None:
    """End a session."""
    session = state.session(exchange, exchange.path["session"])
    state.tenants.sessions.end(session)
    await exchange.reply.json({})


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


async def cancel(state: TinkerState, exchange: Exchange, body: OfRequest) -> None:
    """Cancel sampling; other work runs to its end."""
    future = state.tenants.futures.find(state.owner(exchange), body.request_id)
    if future is not None and future.task is not None:
        future.task.cancel()
    await exchange.reply.json({})
