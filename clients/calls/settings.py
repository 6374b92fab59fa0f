"""Settings that every call of a client uses: metadata, TLS, deadlines, and when it is retried."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from numbers import Real

import grpc

from turret.clients.errors import (
    CallCancelledError,
    DeadlineExceededError,
    RateLimitedError,
    TurretRpcError,
    UnavailableError,
)
from turret.clients.messages.fields import ArgumentTypeError, ArgumentValueError
from turret.clients.words import say
from turret.v1 import adapters_pb2

_TOKEN_KEY = "authorization"
# Metadata of calls that run on adapters: where possible, requests of one mix go to one server.
ROUTING_KEY = "x-turret-mix"
# Thirty years. gRPC counts nanoseconds and treats a deadline beyond its range as passed.
_MOST_SECONDS = 1e9
_FIRST_DELAY_SECONDS = 0.5
_MAX_DELAY_SECONDS = 8.0
# Time limit for resuming an interrupted answer while its server restarts and loads the model, and
# the longest delay between two attempts.
_RESTART_SECONDS = 60.0
_RESTART_DELAY_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a call is retried.

    A call is retried if the server rejected it and sent a delay (``RetryInfo``: a full queue, or a
    server that is starting or stopping), or if it reached no server and may be repeated.

    Attributes:
        max_retries: Maximum number of further attempts.
        unreached: Whether calls that reached no server are retried.
    """

    max_retries: int
    unreached: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.max_retries, int) or self.max_retries < 0:
            text = say("TOO_SMALL", least=0, value=self.max_retries)
            raise ArgumentValueError("max_retries", text)


class Retries:
    """The remaining attempts of one call.

    Args:
        policy: The client's policy.
        seconds: The deadline for all attempts together; None means no deadline.
        repeatable: Whether the call may be executed twice.

    Attributes:
        seconds: The deadline for all attempts together; None means no deadline.
    """

    def __init__(
        self, policy: RetryPolicy, seconds: float | None, *, repeatable: bool = True
    ) -> None:
        self._count = self._left = policy.max_retries
        self.seconds = seconds
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._unreached = policy.unreached and repeatable
        self._delay = _FIRST_DELAY_SECONDS
        self._given_up_at: float | None = None

    def timeout(self) -> float | None:
        """The rest of the deadline, in seconds, for the next attempt."""
        if self._deadline is None:
            return None
        return max(self._deadline - time.monotonic(), 0.0)

    def renew(self) -> None:
        """Restore all attempts, because the last one made progress."""
        self._left, self._delay = self._count, _FIRST_DELAY_SECONDS
        self._given_up_at = None

    def delay_after(self, error: TurretRpcError, *, is_broken: bool = False) -> float | None:
        """Seconds until the next attempt; None if the error is final.

        Args:
            error: The error of the last attempt.
            is_broken: Whether a part of the answer has arrived. If so, attempts that reach no
                server are not counted while the server may be restarting.
        """
        if not self._count or not self._may_help(error):
            return None
        end = self._deadline
        if is_broken and isinstance(error, UnavailableError) and not error.is_lost:
            end = self._end_of_restart()
            self._delay = min(self._delay, _RESTART_DELAY_SECONDS)
        elif self._left:
            self._left -= 1
        else:
            return None
        # Add jitter, so that clients rejected together do not retry together.
        delay = self._delay * random.uniform(0.75, 1.0)
        if error.retry_delay is not None:
            delay = max(delay, error.retry_delay)
        if end is not None and time.monotonic() + delay >= end:
            return None
        self._delay = min(2.0 * self._delay, _MAX_DELAY_SECONDS)
        return delay

    def _end_of_restart(self) -> float:
        if self._given_up_at is None:
            self._given_up_at = time.monotonic() + _RESTART_SECONDS
        return min(self._given_up_at, self._deadline or self._given_up_at)

    def _may_help(self, error: TurretRpcError) -> bool:
        if isinstance(error, RateLimitedError):
            return error.retry_delay is not None
        if isinstance(error, UnavailableError):
            return error.is_of_server or self._unreached
        return False


@dataclass(frozen=True, slots=True)
class CallSettings:
    """Settings that every call of a client uses.

    Attributes:
        metadata: Sent with each call; holds the token.
        timeout: Default deadline in seconds of calls that return one response.
        policy: Decides which failed calls are retried.
        closed: Set once the client is closed, even if calls are still running.
    """

    metadata: tuple[tuple[str, str], ...]
    timeout: float | None
    policy: RetryPolicy
    closed: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def of(cls, token: str | None, timeout: float | None, policy: RetryPolicy) -> CallSettings:
        if not isinstance(token, str | None):
            raise ArgumentTypeError("token", say("NOT_A_STRING", value=type(token).__name__))
        if token and not (token.isascii() and token.isprintable()):
            raise ArgumentValueError("token", say("NOT_ASCII"))
        if token and token.lower().startswith("bearer "):
            raise ArgumentValueError("token", say("INCLUDES_BEARER"))
        metadata = ((_TOKEN_KEY, f"Bearer {token}"),) if token else ()
        return cls(metadata, stream_timeout(timeout), policy)

    def routed(self, mix: Iterable[adapters_pb2.AdapterWeight]) -> CallSettings:
        """The settings of a call that runs on a mix."""
        # Weights are left out, since all mixes of the same adapters need the same memory.
        key = ",".join(sorted(member.name for member in mix))
        # Metadata cannot contain such names. The server reports that no adapter has them.
        if not (key and key.isascii() and key.isprintable()):
            return self
        return replace(self, metadata=(*self.metadata, (ROUTING_KEY, key)))

    def failure(self, error: grpc.RpcError, seconds: float | None) -> TurretRpcError:
        """The error for a failed call, with details that only the client knows.

        Args:
            error: The error of a synchronous or an asyncio call.
            seconds: The deadline of the call, for all of its attempts together.
        """
        failure = TurretRpcError.from_grpc(error)
        if isinstance(failure, CallCancelledError) and self.closed.is_set():
            return closed_during_call()
        if isinstance(failure, DeadlineExceededError) and seconds:
            failure.metadata["timeout"] = f"{seconds:g}"
        return failure


def closed_during_call() -> CallCancelledError:
    """The error of a call whose client is closed while it runs."""
    return CallCancelledError(grpc.StatusCode.CANCELLED, say("CLOSED_DURING_CALL"))


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
