"""Converts messages, and collects all errors of a message to report them together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import Any, TypeVar

from google.protobuf.message import Message

from turret.server.adapters.adapter import AdapterRef
from turret.server.api.limits import MAX_MIX_MEMBERS
from turret.server.basics.names import no_adapter_name
from turret.server.errors import InvalidRequestError
from turret.server.words import say
from turret.v1 import adapters_pb2

_T = TypeVar("_T")
# A message of a few megabytes can break a rule a million times; an answer lists this many.
MAX_VIOLATIONS = 100


@dataclass(slots=True)
class Violations:
    """Collects pairs of a field path and a text while a message is checked."""

    found: list[tuple[str, str]] = field(default_factory=list)

    def add(self, path: str, description: str) -> None:
        # Some fields are read twice: report their violations once.
        if len(self.found) < MAX_VIOLATIONS and (path, description) not in self.found:
            self.found.append((path, description))

    @property
    def is_full(self) -> bool:
        """Whether the limit is reached, so that further violations are dropped."""
        return len(self.found) >= MAX_VIOLATIONS

    def check_count(self, count: int, limit: int, path: str) -> bool:
        """Record a repeated field with more than ``limit`` entries; returns whether it is valid."""
        self.check(count <= limit, path, "TOO_MANY_ENTRIES", most=limit, found=count)
        return count <= limit

    def check_chars(self, text: str, limit: int, path: str) -> None:
        """Record a text of more than ``limit`` characters."""
        self.check(len(text) <= limit, path, "TOO_MANY_CHARACTERS", most=limit, found=len(text))

    def check(self, ok: bool, path: str, reason: str, **params: Any) -> None:
        """Record that a field is invalid for a reason, unless ``ok``."""
        if not ok:
            self.add(path, say(reason, **params))

    def check_enum(self, message: Message, name: str) -> None:
        """Record a number in an enum field that this version does not know."""
        kind, value = message.DESCRIPTOR.fields_by_name[name].enum_type, getattr(message, name)
        assert kind is not None
        choices = ", ".join(each.name for each in kind.values)
        is_known = value in kind.values_by_number
        self.check(is_known, name, "NOT_ONE_OF", value=value, choices=choices)

    def check_name(self, name: str, path: str) -> None:
        """Record a text that cannot be the name of an adapter."""
        if why := no_adapter_name(name):
            self.add(path, why if name else say("REQUIRED"))

    def build(self, kind: Callable[..., _T], values: Mapping[str, Any], path: str) -> _T:
        """Make a domain object; record each value that it rejects, and use the default instead.

        The domain objects check their own ranges and stop at the first violation, hence the loop.

        Args:
            kind: The class of the object.
            values: The object's fields.
            path: The path of the message with the fields; empty for the whole message.
        """
        left = dict(values)
        while True:
            try:
                return kind(**left)
            except InvalidRequestError as error:
                (refused, description) = error.violations[0]
                name = refused.rpartition(".")[2]
                self.add(f"{path}.{name}" if path else name, description)
                if name not in left:
                    raise
                del left[name]

    def raise_if_any(self) -> None:
        """Raise an InvalidRequestError with all violations, if there are any."""
        if self.found:
            raise InvalidRequestError.of_all(self.found)


# Conversion of a request's adapters from proto to domain.


def adapter_refs(
    weights: Sequence[adapters_pb2.AdapterWeight],
    violations: Violations,
    draw: float | None = None,
) -> tuple[AdapterRef, ...]:
    """The members of a mix, in the order of the message; with a draw, names may be aliases."""
    if not violations.check_count(len(weights), MAX_MIX_MEMBERS, "adapters"):
        return ()
    refs: list[AdapterRef] = []
    seen: set[str] = set()
    for index, member in enumerate(weights):
        path = f"adapters[{index}]"
        violations.check_name(member.name, f"{path}.name")
        is_twice = member.name in seen
        violations.check(not is_twice, f"{path}.name", "DUPLICATE", value=member.name)
        seen.add(member.name)
        values: dict[str, Any] = {"name": member.name, "draw": draw}
        for name in ("generation", "weight"):
            if member.HasField(name):
                values[name] = getattr(member, name)
        refs.append(violations.build(AdapterRef, values, path))
    return tuple(refs)


# Conversion of dataclasses to messages whose fields have the same names.

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
