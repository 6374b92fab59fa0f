"""What every call of a client carries, and how long it may take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from numbers import Real

from turret.clients.calls.retries import RetryPolicy
from turret.clients.messages.mix import routing_key
from turret.v1 import adapters_pb2

# Metadata of a call that runs on adapters: requests of one mix go to one server as far as they can.
ROUTING_KEY = "x-turret-mix"
# Thirty years. gRPC counts nanoseconds: a deadline for which it has too few reads as one passed.
_MOST_SECONDS = 1e9


@dataclass(frozen=True, slots=True)
class CallSettings:
    """What every call of a client carries.

    Attributes:
        metadata: Sent with each call; holds the token.
        timeout: Deadline in seconds of calls that return one response and set none themselves.
        policy: Which failed calls are tried again.
    """

    metadata: tuple[tuple[str, str], ...]
    timeout: float | None
    policy: RetryPolicy

    @classmethod
    def of(cls, token: str | None, timeout: float | None, policy: RetryPolicy) -> CallSettings:
        if not isinstance(token, str | None):
            raise TypeError(f"token: a text, not {type(token).__name__}")
        if token and not (token.isascii() and token.isprintable()):
            raise ValueError("token: holds characters that no header can carry")
        metadata = (("authorization", f"Bearer {token}"),) if token else ()
        return cls(metadata, stream_timeout(timeout), policy)

    def routed(self, mix: Iterable[adapters_pb2.AdapterWeight]) -> CallSettings:
        """Those of a call that runs on a mix."""
        key = routing_key(mix)
        # Others are no adapters' names, and no metadata either: the server says so.
        if not (key and key.isascii() and key.isprintable()):
            return self
        return replace(self, metadata=(*self.metadata, (ROUTING_KEY, key)))

    def unary_timeout(self, timeout: float | None) -> float | None:
        """The deadline of a call with one response."""
        return stream_timeout(self.timeout if timeout is None else timeout)


def stream_timeout(timeout: float | None) -> float | None:
    """The deadline of a stream: None, infinity and what no clock can hold mean none.

    Raises:
        TypeError: It is no number of seconds.
        ValueError: It is none that lies ahead.
    """
    if timeout is None:
        return None
    # Real are numpy's numbers too, and a bool is one to Python.
    if not isinstance(timeout, Real) or isinstance(timeout, bool):
        raise TypeError(f"timeout: seconds, not {timeout!r}")
    if not timeout > 0:
        raise ValueError(f"timeout: more than 0 seconds, or None for the default, not {timeout!r}")
    return float(timeout) if timeout < _MOST_SECONDS else None
