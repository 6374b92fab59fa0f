"""Collects all errors in a message, so that one answer reports them together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from turret.server.adapters.ref import AdapterRef
from turret.server.api.limits import MAX_MIX_MEMBERS
from turret.server.basics.hub_id import no_adapter_name
from turret.server.errors import InvalidRequestError
from turret.server.words import say
from turret.v1 import adapters_pb2

_T = TypeVar("_T")
# A message of a few megabytes can break a rule a million times; an answer lists this many.
MAX_VIOLATIONS = 100


@dataclass(slots=True)
class Violations:
    """Collects (field path, description) pairs until all of a message has been looked at."""

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
        """Note a repeated field of more than ``limit`` entries; returns whether it has no more."""
        self.check(count <= limit, path, say("TOO_MANY_ENTRIES", most=limit, found=count))
        return count <= limit

    def check_chars(self, text: str, limit: int, path: str) -> None:
        """Note a text of more than ``limit`` characters."""
        self.check(
            len(text) <= limit, path, say("TOO_MANY_CHARACTERS", most=limit, found=len(text))
        )

    def check(self, ok: bool, path: str, description: str) -> None:
        if not ok:
            self.add(path, description)

    def build(self, kind: Callable[..., _T], values: Mapping[str, Any], path: str) -> _T:
        """A domain object; every value that it rejects is noted and left at its default.

        The domain objects own the ranges and stop at their first complaint, hence the loop.

        Args:
            kind: Of the object.
            values: Its fields.
            path: Of the message that holds them; empty for the whole.
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
        """Raise one InvalidRequestError that lists them all."""
        if self.found:
            text = "; ".join(f"{path}: {description}" for path, description in self.found)
            raise InvalidRequestError(text, violations=self.found)


# Conversion of a request's adapters from proto to domain.


def adapter_refs(
    weights: Sequence[adapters_pb2.AdapterWeight], violations: Violations
) -> tuple[AdapterRef, ...]:
    """The members of a mix, in the order of the message."""
    if len(weights) > MAX_MIX_MEMBERS:
        violations.add("adapters", f"at most {MAX_MIX_MEMBERS} members, not {len(weights)}")
        return ()
    refs: list[AdapterRef] = []
    seen: set[str] = set()
    for index, member in enumerate(weights):
        path = f"adapters[{index}]"
        if why := no_adapter_name(member.name):
            violations.add(f"{path}.name", why)
        elif member.name in seen:
            violations.add(f"{path}.name", f"{member.name!r} occurs twice")
        seen.add(member.name)
        values: dict[str, Any] = {"name": member.name}
        for name in ("generation", "weight"):
            if member.HasField(name):
                values[name] = getattr(member, name)
        refs.append(violations.build(AdapterRef, values, path))
    return tuple(refs)
