"""A fault in gRPC's form: the rich status that a client receives."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from typing import Any

from google.protobuf import duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from turret.server.api.faults import Fault
from turret.server.errors import VIOLATION_COUNT, DeadlineExceededError, InvalidRequestError
from turret.server.words import Text, say

# Request messages on their way from gRPC to a handler.

# A client that sends a message more slowly has gone, or holds a slot that others wait for.
MESSAGE_SECONDS = 60.0


@dataclasses.dataclass(slots=True)
class Received:
    """A message that gRPC keeps until the call ends.

    ``parsed`` is None for what is no valid protobuf (such as a string that is not UTF-8).
    """

    parsed: Message | bytes | None
    num_bytes: int

    def take(self) -> Message | bytes:
        """Return the message, once, so that the caller decides how long it is kept.

        Raises:
            InvalidRequestError: It is malformed.
        """
        parsed, self.parsed = self.parsed, None
        if parsed is None:
            raise InvalidRequestError(say("MESSAGE_MALFORMED"))
        return parsed


def tolerant(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Received]:
    """A deserialiser that passes invalid bytes on, so that the handler reports them.

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
        raise InvalidRequestError(say("MESSAGE_MISSING"))
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
        raise DeadlineExceededError(say("NO_MESSAGE_IN_TIME", seconds=most_seconds)) from None


ERROR_DOMAIN = "turret"
DETAILS_KEY = "grpc-status-details-bin"

# Clients refuse response headers over 8 KiB. The message travels twice (percent-encoded on its own
# and in the details, which grow by a third in base64), so both are cut well below that.
MAX_MESSAGE_BYTES = 800
MAX_VIOLATION_BYTES = 3000
MAX_METADATA_BYTES = 600


def _shortened(text: str, limit: int) -> str:
    """``text`` as valid UTF-8 of at most about ``limit`` bytes on the wire.

    gRPC percent-encodes everything but printable ASCII, which triples it.
    """
    text = text.encode("utf-8", "replace").decode()
    cost = 0
    for index, character in enumerate(text):
        cost += 1 if " " <= character <= "~" else 3 * len(character.encode())
        if cost > limit:
            return text[:index] + "..."
    return text


def _bad_request(
    violations: tuple[tuple[str, str], ...], count: int
) -> error_details_pb2.BadRequest:
    """The invalid fields that fit; there are ``count`` in all."""
    detail = error_details_pb2.BadRequest()
    used = 0
    for index, (field, description) in enumerate(violations):
        reason = description.reason if isinstance(description, Text) else ""
        field, description = _shortened(field, 200), _shortened(description, 400)
        used += len(field.encode()) + len(description.encode()) + len(reason) + 8
        if used > MAX_VIOLATION_BYTES:
            detail.field_violations.add(field="*", description=say("MORE", count=count - index))
            break
        detail.field_violations.add(field=field, description=description, reason=reason)
    return detail


def to_rich_status(fault: Fault) -> status_pb2.Status:
    """The ``google.rpc.Status`` of a fault, cut to what fits into the headers of an answer."""
    status = status_pb2.Status(
        code=fault.code.value, message=_shortened(fault.message, MAX_MESSAGE_BYTES)
    )
    info = error_details_pb2.ErrorInfo(reason=fault.reason, domain=ERROR_DOMAIN)
    room = MAX_METADATA_BYTES
    for key, value in fault.metadata.items():
        shown = _shortened(str(value), 200)
        room -= len(key) + len(shown.encode())
        if room < 0:
            break
        info.metadata[key] = shown
    status.details.add().Pack(info)
    if fault.violations:
        count = int(fault.metadata.get(VIOLATION_COUNT, len(fault.violations)))
        status.details.add().Pack(_bad_request(fault.violations, count))
    if fault.retry_after_seconds is not None:
        wait = duration_pb2.Duration()
        wait.FromNanoseconds(round(fault.retry_after_seconds * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=wait))
    return status
