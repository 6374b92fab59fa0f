"""A call as Ray Serve hands it over: whose it is, and its gRPC context as turret's code has it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from ipaddress import ip_address
from typing import Any, Protocol

import grpc
from starlette.types import Scope

FORWARDED_FOR = "x-forwarded-for"
# Messages that may wait for the client. The engine's thread never waits for this queue.
_AHEAD = 1

Metadata = tuple[tuple[str, str | bytes], ...]


def client_address(values: Iterable[str]) -> str | None:
    """The address of who called the ingress; None if that does not say.

    Args:
        values: Those of every ``x-forwarded-for``, in order. The ingress writes the last one, and
            what comes before is what its caller claims.
    """
    last = None
    for value in values:
        last = value
    if last is None:
        return None
    try:
        return str(ip_address(last.rpartition(",")[2].strip()))
    except ValueError:
        return None


def as_peer(address: str) -> str:
    """An address in gRPC's words; its port is not known."""
    return f"ipv6:[{address}]:0" if ":" in address else f"ipv4:{address}:0"


def from_client(scope: Scope) -> Scope:
    """An HTTP request as its client made it, and not as the ingress did."""
    name = FORWARDED_FOR.encode()
    sent = (value.decode("latin-1") for key, value in scope["headers"] if key == name)
    address = client_address(sent)
    return scope if address is None else {**scope, "client": (address, 0)}


class ServeContext(Protocol):
    """What is used of Serve's context (``ray.serve.grpc_util.RayServegRPCContext``)."""

    def code(self) -> Any: ...
    def peer(self) -> str: ...
    def invocation_metadata(self) -> Any: ...
    def set_code(self, code: grpc.StatusCode) -> None: ...
    def set_details(self, details: str) -> None: ...
    def set_trailing_metadata(self, trailing_metadata: Any) -> None: ...


class CallContext:
    """What turret's servicers and interceptor use of grpc's context.

    A handler on Serve that raises loses its error details; one that sets the status and returns
    does not. The interceptor only ever sets.

    Args:
        inner: Serve's.
    """

    def __init__(self, inner: ServeContext) -> None:
        self._inner = inner
        self._sent: asyncio.Queue[Any] = asyncio.Queue(_AHEAD)

    def invocation_metadata(self) -> Metadata:
        return tuple(self._inner.invocation_metadata())

    def peer(self) -> str:
        """The client, which called the ingress; the ingress itself if it does not say for whom."""
        sent = (v for k, v in self._inner.invocation_metadata() if k == FORWARDED_FOR)
        address = client_address(v for v in sent if isinstance(v, str))
        return self._inner.peer() if address is None else as_peer(address)

    def time_remaining(self) -> float | None:
        """Unknown: Serve does not tell. A client whose deadline passes cancels the call."""
        return None

    def code(self) -> grpc.StatusCode | None:
        code = self._inner.code()
        return code if isinstance(code, grpc.StatusCode) else None

    def set_code(self, code: grpc.StatusCode) -> None:
        self._inner.set_code(code)

    def set_details(self, details: str) -> None:
        self._inner.set_details(details)

    def set_trailing_metadata(self, trailing_metadata: Metadata) -> None:
        self._inner.set_trailing_metadata(list(trailing_metadata))

    async def write(self, message: Any) -> None:
        """Sends a message of a stream, and waits while others wait."""
        await self._sent.put(message)

    async def messages(self, run: Callable[[], Any]) -> AsyncIterator[Any]:
        """What ``run`` writes, until it ends; it is cancelled if nobody reads on."""
        over = object()

        async def work() -> None:
            try:
                await run()
            finally:
                # If nobody reads any more, the queue may be full, and the end is not needed.
                if not working.cancelling():
                    await self._sent.put(over)

        working = asyncio.ensure_future(work())
        try:
            while (message := await self._sent.get()) is not over:
                yield message
            await working
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
