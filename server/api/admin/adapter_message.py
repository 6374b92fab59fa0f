"""A registered adapter, domain to proto."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from google.protobuf import timestamp_pb2

from turret.server.adapters.chat_template import origin_of
from turret.server.errors import InvalidRequestError
from turret.server.words import say
from turret.v1 import adapters_pb2

if TYPE_CHECKING:
    from turret.server.adapters.adapter_info import AdapterInfo


RESIDENCIES = {
    "disk": adapters_pb2.Adapter.DISK,
    "host": adapters_pb2.Adapter.HOST,
    "device": adapters_pb2.Adapter.DEVICE,
}


def _sendable(text: str) -> str:
    """The text with a question mark for each half of a surrogate pair, which protobuf rejects.

    Reading refuses such text, but a state directory may hold what an earlier version let in.
    """
    return text.encode("utf-8", "replace").decode()


def adapter_message(record: AdapterInfo) -> adapters_pb2.Adapter:
    """A registry record in the form of the API."""
    facts = record.facts
    message = adapters_pb2.Adapter(
        name=record.name,
        uuid=record.uuid,
        generation=record.generation,
        digest=_sendable(facts.digest),
        method=_sendable(facts.method),
        ranks=facts.ranks,
        target_modules=map(_sendable, facts.target_modules),
        bytes_disk=facts.bytes_disk,
        bytes_host=record.bytes_host,
        bytes_device=record.bytes_device,
        residency=RESIDENCIES[record.residency],
        pinned=record.pinned,
        in_flight=record.in_flight,
        base_model=_sendable(facts.base_model),
        warnings=map(_sendable, record.facts.warnings),
        state=record.state,
        source=_sendable(record.source),
        invocation_token_ids=facts.invocation,
        labels=map(_sendable, facts.labels),
        vocab_size=facts.vocab_size,
        chat_template=origin_of(facts.chat_template),
    )
    if record.last_used_time is not None:
        stamp = timestamp_pb2.Timestamp()
        stamp.FromNanoseconds(round(record.last_used_time * 1e9))
        message.last_used_time.CopyFrom(stamp)
    return message


# Page tokens of ``ListAdapters``: the last name of the page before, tied to its filters.

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
# gRPC clients accept 4 MiB by default.
MAX_PAGE_BYTES = 3 << 20
_CHECK_BYTES = 8


def _check(name: bytes, filters: str) -> bytes:
    return hashlib.sha256(filters.encode() + b"\0" + name).digest()[:_CHECK_BYTES]


def make_page_token(last_name: str, filters: str) -> str:
    """A token for the page after ``last_name`` under the same filters."""
    name = last_name.encode()
    return base64.urlsafe_b64encode(_check(name, filters) + name).decode()


def read_page_token(token: str, filters: str) -> str:
    """The name that the page starts after; empty for the first page.

    Raises:
        InvalidRequestError: Not a token of this server, or one for other filters.
    """
    if not token:
        return ""
    try:
        data = base64.b64decode(token.encode(), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        data = b""
    check, name = data[:_CHECK_BYTES], data[_CHECK_BYTES:]
    if not name or check != _check(name, filters):
        raise InvalidRequestError.of("page_token", say("NOT_A_PAGE_TOKEN"))
    return name.decode("ascii", "replace")


def page_length(page_size: int) -> int:
    """0 means the default; more than the maximum means the maximum.

    Raises:
        InvalidRequestError: Negative.
    """
    if page_size < 0:
        raise InvalidRequestError.of("page_size", say("TOO_SMALL", least=0, value=page_size))
    return min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)


def cut_page(messages: Iterable[adapters_pb2.Adapter]) -> list[adapters_pb2.Adapter]:
    """As many of the first adapters as fit into one message, and at least one."""
    page: list[adapters_pb2.Adapter] = []
    left = MAX_PAGE_BYTES
    for message in messages:
        left -= message.ByteSize()
        if page and left < 0:
            break
        page.append(message)
    return page
