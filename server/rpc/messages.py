"""Request messages on their way from gRPC to a handler."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from typing import Any

from google.protobuf.message import DecodeError, Message

from turret.server.errors import DeadlineExceededError, InvalidRequestError

# A client that sends a message slower than this has gone, or keeps a place that others wait for.
MESSAGE_SECONDS = 60.0


@dataclasses.dataclass(slots=True)
class Received:
    """A message that gRPC keeps until the call ends.

    ``parsed`` is None for what is no valid protobuf (such as a string that is not UTF-8).
    """

    parsed: Message | bytes | None
    num_bytes: int

    def take(self) -> Message | bytes:
        """The message, once: who takes it decides how long it is kept.

        Raises:
            InvalidRequestError: It is malformed.
        """
        parsed, self.parsed = self.parsed, None
        if parsed is None:
            raise InvalidRequestError(
                "the message is malformed: no valid protobuf, or a string that is not UTF-8"
            )
        return parsed


def tolerant(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Received]:
    """A deserialiser that lets the handler answer for bad bytes.

    gRPC itself would report a bug of the server.
    """

    def parse(data: bytes) -> Received:
        try:
            return Received(data if deserialize is None else deserialize(data), len(data))
        except DecodeError:
            return Received(None, len(data))

    return parse


async def one_message(requests: AsyncIterator[Received]) -> tuple[Any, int]:
    """The message of a call that has one, and its size in bytes.

    Raises:
        InvalidRequestError: It is malformed, or none came.
        DeadlineExceededError: It did not arrive within ``MESSAGE_SECONDS``.
    """
    received = await _next(aiter(requests), MESSAGE_SECONDS)
    if received is None:
        raise InvalidRequestError("the call ended without a message")
    return received.take(), received.num_bytes


async def all_messages(
    requests: AsyncIterator[Received], most_seconds: float | None
) -> AsyncIterator[Any]:
    """The messages of a call, one after the other.

    Args:
        requests: From gRPC.
        most_seconds: How long each may take to arrive; None leaves that to who reads them.

    Raises:
        InvalidRequestError: One is malformed.
        DeadlineExceededError: One took longer.
    """
    received = aiter(requests)
    while (each := await _next(received, most_seconds)) is not None:
        yield each.take()


async def _next(requests: AsyncIterator[Received], most_seconds: float | None) -> Received | None:
    try:
        async with asyncio.timeout(most_seconds):
            return await anext(requests, None)
    except TimeoutError:
        raise DeadlineExceededError(f"no message came for {most_seconds:.0f} seconds") from None
