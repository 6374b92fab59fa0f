"""Settings that every call of a client uses: metadata, TLS and deadlines."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from numbers import Real

import grpc

from turret.clients.calls.retries import RetryPolicy
from turret.clients.channel import Tls
from turret.clients.errors import CallCancelledError, DeadlineExceededError, TurretRpcError
from turret.clients.messages.fields import ArgumentTypeError, ArgumentValueError
from turret.clients.messages.mix import routing_key
from turret.clients.words import say
from turret.v1 import adapters_pb2

_TOKEN_KEY = "authorization"
# Metadata of calls that run on adapters: where possible, requests of one mix go to one server.
ROUTING_KEY = "x-turret-mix"
# Thirty years. gRPC counts nanoseconds and treats a deadline beyond its range as passed.
_MOST_SECONDS = 1e9


@dataclass(frozen=True, slots=True)
class CallSettings:
    """Settings that every call of a client uses.

    Attributes:
        metadata: Sent with each call; holds the token.
        timeout: Deadline in seconds of calls that return one response and set none themselves.
        policy: Which failed calls are tried again.
        tls: How the server is verified; None means not at all.
        closed: Set once the client is closed, whatever calls run.
    """

    metadata: tuple[tuple[str, str], ...]
    timeout: float | None
    policy: RetryPolicy
    tls: Tls | None
    closed: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def of(
        cls, token: str | None, timeout: float | None, policy: RetryPolicy, tls: Tls | None
    ) -> CallSettings:
        if not isinstance(token, str | None):
            raise ArgumentTypeError("token", say("NOT_A_STRING", value=type(token).__name__))
        if token and not (token.isascii() and token.isprintable()):
            raise ArgumentValueError("token", say("NOT_ASCII"))
        if token and token.lower().startswith("bearer "):
            raise ArgumentValueError("token", say("INCLUDES_BEARER"))
        metadata = ((_TOKEN_KEY, f"Bearer {token}"),) if token else ()
        return cls(metadata, stream_timeout(timeout), policy, tls)

    def routed(self, mix: Iterable[adapters_pb2.AdapterWeight]) -> CallSettings:
        """The settings of a call that runs on a mix."""
        key = routing_key(mix)
        # Metadata cannot contain such names. No adapter has them, which the server reports.
        if not (key and key.isascii() and key.isprintable()):
            return self
        return replace(self, metadata=(*self.metadata, (ROUTING_KEY, key)))

    def unary_timeout(self, timeout: float | None) -> float | None:
        """The deadline of a call with one response."""
        return stream_timeout(self.timeout if timeout is None else timeout)

    def failure(self, error: grpc.RpcError, seconds: float | None) -> TurretRpcError:
        """The error for a failed call, with details that only the client knows.

        Args:
            error: Of a synchronous or an asyncio call.
            seconds: The deadline of the call, all its tries together.
        """
        failure = TurretRpcError.from_grpc(error)
        if isinstance(failure, CallCancelledError) and self.closed.is_set():
            return closed_under_a_call()
        if isinstance(failure, DeadlineExceededError) and seconds:
            failure.metadata["timeout"] = f"{seconds:g}"
        if failure.reason == "CONNECTION_CLOSED" and self.tls is not None:
            # A server that requires a certificate reports a wrong one only by closing.
            failure.reason = "CLIENT_CERTIFICATE"
        return failure


def closed_under_a_call() -> CallCancelledError:
    """The error of a call whose client is closed while it runs."""
    said = "the client was closed while the call was running"
    return CallCancelledError(grpc.StatusCode.CANCELLED, said)


def stream_timeout(timeout: float | None) -> float | None:
    """The deadline of a stream; None, infinity and values too large for a clock mean none.

    Raises:
        TypeError: The value is not a number.
        ValueError: The number is not positive.
    """
    if timeout is None:
        return None
    # numpy's numbers are Real too, and in Python so is a bool.
    if not isinstance(timeout, Real) or isinstance(timeout, bool):
        raise ArgumentTypeError("timeout", say("NOT_A_NUMBER", value=repr(timeout)))
    if not timeout > 0:
        raise ArgumentValueError("timeout", say("NOT_ABOVE", bound=0, value=timeout))
    return float(timeout) if timeout < _MOST_SECONDS else None
