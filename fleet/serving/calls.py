"""Calls that Ray Serve hands over: their client, and their gRPC context in turret's form.

Every process of Serve that answers calls imports this module, so it needs neither torch nor Ray.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from ipaddress import ip_address
from typing import Any, Protocol

import grpc
from starlette.types import Scope

from turret.server.api.gate import ServingGate
from turret.server.api.services import Services
from turret.server.rpc import CallInterceptor

FORWARDED_FOR = "x-forwarded-for"
# The number of messages that may wait for the client. The engine's thread never waits for them.
_AHEAD = 1

Metadata = tuple[tuple[str, str | bytes], ...]


def client_address(values: Iterable[str]) -> str | None:
    """The address of the ingress's client; None if the ingress does not report it.

    Args:
        values: The values of all ``x-forwarded-for`` headers, in order. The ingress writes the last
            one; the ones before it are claims of its caller.
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
    """An address in gRPC's form; its port is unknown."""
    return f"ipv6:[{address}]:0" if ":" in address else f"ipv4:{address}:0"


def from_client(scope: Scope) -> Scope:
    """An HTTP request with its client's address instead of the ingress's."""
    name = FORWARDED_FOR.encode()
    sent = (value.decode("latin-1") for key, value in scope["headers"] if key == name)
    address = client_address(sent)
    return scope if address is None else {**scope, "client": (address, 0)}


class ServeContext(Protocol):
    """The parts of Serve's context in use (``ray.serve.grpc_util.RayServegRPCContext``)."""

    def code(self) -> Any: ...
    def peer(self) -> str: ...
    def invocation_metadata(self) -> Any: ...
    def set_code(self, code: grpc.StatusCode) -> None: ...
    def set_details(self, details: str) -> None: ...
    def set_trailing_metadata(self, trailing_metadata: Any) -> None: ...


class CallContext:
    """The parts of grpc's context that turret's servicers and interceptor use.

    A handler on Serve that raises loses its error details; one that sets the status and returns
    does not. The interceptor therefore only sets the status.

    Args:
        inner: Serve's context.
    """

    def __init__(self, inner: ServeContext) -> None:
        self._inner = inner
        self._sent: asyncio.Queue[Any] = asyncio.Queue(_AHEAD)

    def invocation_metadata(self) -> Metadata:
        return tuple(self._inner.invocation_metadata())

    def peer(self) -> str:
        """The client of the ingress, or the ingress itself if it does not report the client."""
        sent = (v for k, v in self._inner.invocation_metadata() if k == FORWARDED_FOR)
        address = client_address(v for v in sent if isinstance(v, str))
        return self._inner.peer() if address is None else as_peer(address)

    def time_remaining(self) -> float | None:
        """None, because Serve does not report deadlines. Clients cancel a call at its deadline."""
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
        """Sends a message of a stream; waits while others are queued."""
        await self._sent.put(message)

    async def messages(self, run: Callable[[], Any]) -> AsyncIterator[Any]:
        """The messages that ``run`` writes; ``run`` is cancelled if the reader stops."""
        over = object()

        async def work() -> None:
            try:
                await run()
            finally:
                # If the reader has stopped, the queue may be full, and nobody needs the end marker.
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


# The interceptor that checks the calls of this process. This default is for Serve's fallback proxy,
# which has no replica: it checks no tokens but limits the size of messages.
_interceptor = CallInterceptor(Services(gate=ServingGate()))


def check_with(interceptor: CallInterceptor) -> None:
    """Makes the replica's interceptor check the calls of this process."""
    global _interceptor
    _interceptor = interceptor


def receiving(method: str, handler: Any) -> Any:
    """The handler, which runs once the message has arrived; see ``CallInterceptor.receiving``."""
    return _interceptor.receiving(method, handler, CallContext)
