"""Conversion of dataclasses to messages whose fields have the same names."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from functools import cache
from typing import Any, TypeVar

from google.protobuf.message import Message

_M = TypeVar("_M", bound=Message)


def message_of(kind: type[_M], value: Any, **others: Any) -> _M:
    """A message with the values of a dataclass's fields of the same names.

    ``others`` are added, or replace fields of the dataclass.
    """
    shared = {name: getattr(value, name) for name in _shared(kind, type(value))}
    return kind(**(shared | others))


@cache
def _shared(kind: type[Message], source: type) -> tuple[str, ...]:
    known = kind.DESCRIPTOR.fields_by_name
    return tuple(each.name for each in dataclasses.fields(source) if each.name in known)


def timestamp(seconds: float | None) -> datetime | None:
    """Unix seconds as the value of a ``Timestamp`` field; None leaves the field unset."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
