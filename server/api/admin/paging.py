"""Page tokens of ``ListAdapters``: the last name of the page before, tied to its filters."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable

from turret.server.errors import InvalidRequestError
from turret.v1 import adapters_pb2

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
# gRPC's clients take 4 MiB unless they are told otherwise.
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
        raise InvalidRequestError.of(
            "page_token", "is not a next_page_token of a list with the same filters"
        )
    return name.decode("ascii", "replace")


def page_length(page_size: int) -> int:
    """0 means the default; more than the maximum means the maximum.

    Raises:
        InvalidRequestError: Negative.
    """
    if page_size < 0:
        raise InvalidRequestError.of("page_size", "must be >= 0")
    return min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)


def cut_page(messages: Iterable[adapters_pb2.Adapter]) -> list[adapters_pb2.Adapter]:
    """As many of the first as may be sent together; one at least, if there is one."""
    page: list[adapters_pb2.Adapter] = []
    left = MAX_PAGE_BYTES
    for message in messages:
        left -= message.ByteSize()
        if page and left < 0:
            break
        page.append(message)
    return page
