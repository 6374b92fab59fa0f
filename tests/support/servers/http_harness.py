"""An in-process HTTP server with fake services, and a client for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx2
import uvicorn.server
from servers.fakes import Fakes

from turret.server.config import ListenConfig, SecurityConfig
from turret.server.http.server import HttpServer

NOTHING: Mapping[str, str] = {}
ANSWER_SECONDS = 20.0
TURNS = [{"role": "user", "content": "hi"}]
# Path → a valid body.
VALID: Mapping[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "base", "messages": TURNS},
    "/v1/completions": {"model": "base", "prompt": "a"},
    "/v1/responses": {"model": "base", "input": "a"},
    "/v1/messages": {"model": "base", "max_tokens": 4, "messages": TURNS},
    "/v1/messages/count_tokens": {"model": "base", "messages": TURNS},
    "/v1/embeddings": {"model": "sql", "input": "a"},
    "/classify": {"model": "sql", "input": "a"},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1]},
    "/v1/load_lora_adapter": {"lora_name": "a", "lora_path": "a"},
    "/v1/pin_lora_adapter": {"lora_name": "a"},
    "/v1/unpin_lora_adapter": {"lora_name": "a"},
    "/v1/unload_lora_adapter": {"lora_name": "a"},
}
# By default a client reads the certificates of all authorities, which takes longer than most tests.
NO_AUTHORITIES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


class _QuickAsyncio:
    """asyncio, except that uvicorn notices a stop within milliseconds."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds / 20)


uvicorn.server.asyncio = _QuickAsyncio()  # type: ignore[assignment]


def posted(path: str, body: Any, version: str = "1.1", more: str = "") -> bytes:
    """A request with this body and these further headers."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/{version}\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return f"{head}{more}content-length: {len(content)}\r\n\r\n".encode() + content


@dataclass
class HttpHarness(Fakes):
    """A running server, its fake services, and a client."""

    server: HttpServer
    client: httpx2.AsyncClient

    async def settle(self) -> None:
        """Wait until a call has been counted and logged, which happens after its last byte."""
        assert self.server._server is not None
        while tasks := self.server._server.server_state.tasks:
            await asyncio.wait(list(tasks))

    async def sample(self, name: str, **labels: str) -> float | None:
        await self.settle()
        return self.metrics.registry.get_sample_value(name, labels)

    async def post(
        self, path: str, body: Any, headers: Mapping[str, str] = NOTHING
    ) -> httpx2.Response:
        return await self.client.post(path, json=body, headers=dict(headers))

    async def opened(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection with a small read buffer."""
        host, _, port = self.server.address.rpartition(":")
        return await asyncio.open_connection(host, int(port), limit=1024)

    async def answered(self, sent: bytes) -> bytes:
        """All bytes that arrive until the server closes the connection."""
        reader, writer = await self.opened()
        writer.write(sent)
        try:
            return await asyncio.wait_for(reader.read(), 20)
        finally:
            writer.close()

    async def refused(self, path: str, body: Any, headers: Mapping[str, str] = NOTHING) -> Refused:
        """Post a request that must be rejected, and return the error."""
        return Refused.of(await self.post(path, body, headers))

    async def events(self, path: str, body: Any) -> list[Any]:
        """The events of a stream; ``[DONE]`` as text."""
        answer = await self.post(path, {**body, "stream": True})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        parts = answer.text.split("\n\n")
        assert parts.pop() == ""
        data = [part.removeprefix("data: ") for part in parts]
        return [one if one == "[DONE]" else json.loads(one) for one in data]


@dataclass(frozen=True, slots=True)
class Refused:
    """The parts of an error response."""

    status: int
    message: str
    kind: str
    param: str | None
    code: str
    headers: Mapping[str, str]
    violations: Mapping[str, str]

    @classmethod
    def of(cls, answer: httpx2.Response) -> Refused:
        body = answer.json()
        # Errors of Anthropic's API have further fields around them.
        assert body.keys() - {"type", "request_id"} == {"error"}
        error = body["error"]
        assert error.keys() - {"violations"} == {"message", "type", "param", "code"}
        return cls(
            answer.status_code,
            error["message"],
            error["type"],
            error["param"],
            error["code"],
            answer.headers,
            {each["param"]: each["code"] for each in error.get("violations", ())},
        )


@contextlib.asynccontextmanager
async def http_harness(
    *,
    listen: ListenConfig | None = None,
    security: SecurityConfig | None = None,
    serving: bool = True,
    fakes: Fakes | None = None,
    **parts: Any,
) -> AsyncIterator[HttpHarness]:
    """A server on a free port with fakes; ``parts`` are the arguments of ``Fakes.make``."""
    fakes = fakes or Fakes.make(**parts)
    listen = listen or ListenConfig(http_address="127.0.0.1:0")
    server = HttpServer(listen, security or SecurityConfig(), fakes.services)
    await server.start()
    if serving:
        fakes.gate.open(fakes.backend)
    try:
        base = f"http://{server.address}"
        async with httpx2.AsyncClient(
            base_url=base, timeout=ANSWER_SECONDS, verify=NO_AUTHORITIES
        ) as client:
            yield HttpHarness(*fakes.fields, server=server, client=client)
    finally:
        fakes.services.adapters.close()
        await server.stop(0.2)
