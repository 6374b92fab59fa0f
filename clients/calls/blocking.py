"""The blocking client's use of gRPC; ``calls.aio`` has the same for asyncio."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import grpc

from turret.clients.calls.settings import CallSettings, closed_under_a_call
from turret.clients.channel import ClosedStub, Tls, check_address, open_channel
from turret.v1 import adapters_pb2_grpc, inference_pb2_grpc

Flag = threading.Event


class Connection:
    """The channels of one client, and the stubs of both services.

    Args:
        address: Where the server is.
        admin_address: Where the ``Adapters`` service is; None means ``address``.
        tls: How to verify the server; None means a plain connection.

    Raises:
        ArgumentTypeError, ArgumentValueError: As :func:`check_address`.
    """

    def __init__(self, address: str, admin_address: str | None, tls: Tls | None) -> None:
        check_address(address, tls)
        if admin_address is not None:
            check_address(admin_address, tls, "admin_address")
        addresses = [address] if admin_address is None else [address, admin_address]
        self._channels = [open_channel(grpc, each, tls) for each in addresses]
        self.inference: Any = inference_pb2_grpc.InferenceStub(self._channels[0])
        self.adapters: Any = adapters_pb2_grpc.AdaptersStub(self._channels[-1])

    def close(self) -> None:
        """Cancel running calls, and make later ones raise RuntimeError."""
        self.inference = self.adapters = ClosedStub()
        for channel in self._channels:
            channel.close()


class StreamClosedError(Exception):
    """The caller closed the stream while waiting for it."""


class waiting:
    """Raise an error of its own for a stream that is closed while it is waited for.

    Args:
        settings: Of the client; a call says itself that its client was closed.
        closed: Set if the stream is closed.
    """

    def __init__(self, settings: CallSettings, closed: Flag | None = None) -> None:
        self._closed = closed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._closed is not None and self._closed.is_set() and isinstance(error, grpc.RpcError):
            raise StreamClosedError from None


def pause(settings: CallSettings, seconds: float) -> None:
    """Wait before the next attempt.

    Raises:
        CallCancelledError: The client was closed meanwhile.
    """
    if settings.closed.wait(seconds):
        raise closed_under_a_call()


def told_early(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that takes a stream of messages; gRPC itself reports an early rejection."""
    return method
