"""HTTP on a whole server while it loads and while it stops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx2
from servers.app_parts import Parts, make_app
from servers.fakes import hello
from servers.rpc_harness import soon

from turret.server.config import ListenConfig
from turret.server.engine.scheduling.request import Output, Request

LISTEN = ListenConfig(address="127.0.0.1:0", metrics_address=None, http_address="127.0.0.1:0")
BODY = {"model": "base", "prompt": "a"}


async def test_the_server_listens_while_loading_and_finishes_requests_while_stopping() -> None:
    parts = Parts()
    finishing = asyncio.Event()

    async def slow(request: Request) -> AsyncIterator[Output]:
        yield Output(text="H", token_ids=(72,))
        await finishing.wait()
        async for output in hello(request):
            yield output

    parts.engine.script = slow
    parts.may_finish.clear()
    app = make_app(parts, listen=LISTEN)
    running = asyncio.ensure_future(app.startup())
    await soon(parts.building)
    assert app.http is not None
    seen: dict[str, Any] = {}
    async with httpx2.AsyncClient(base_url=f"http://{app.http.address}") as client:
        answer = await client.get("/health")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "server_starting")
        assert (await client.post("/v1/completions", json=BODY)).status_code == 503
        parts.may_finish.set()
        await running
        assert (await client.get("/health")).status_code == 200

        async def drain(grace_seconds: float) -> None:
            """Like the engine, let the running request finish; check the server in the meantime."""
            parts.engine.drained.append(grace_seconds)
            seen["health"] = (await client.get("/health")).status_code
            seen["refused"] = await client.post("/v1/completions", json=BODY)
            finishing.set()

        parts.engine.drain = drain  # type: ignore[method-assign]
        async with client.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as stream:
            lines = stream.aiter_lines()
            assert '"text":"H"' in await anext(lines)
            app.stop()
            assert await app.main_loop() == 0
            stopping = asyncio.ensure_future(app.shutdown())
            rest = [line async for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"stop"' in rest[-2]
        await asyncio.wait_for(stopping, 20)
    assert parts.engine.drained == [7]
    assert seen["health"] == 503
    assert seen["refused"].status_code == 503
    assert seen["refused"].json()["error"]["code"] == "unavailable"
    assert seen["refused"].headers["retry-after"] == "1"
