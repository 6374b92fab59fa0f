"""Collects everything wrong with a message, so that one answer names it all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from turret.server.errors import InvalidRequestError

_T = TypeVar("_T")
# A message of a few megabytes can break a rule a million times; an answer lists these many.
MAX_VIOLATIONS = 100


@dataclass(slots=True)
class Violations:
    """Collects (field path, description) pairs until all of a message has been looked at."""

    found: list[tuple[str, str]] = field(default_factory=list)

    def add(self, path: str, description: str) -> None:
        # What is read twice is told once.
        if len(self.found) < MAX_VIOLATIONS and (path, description) not in self.found:
            self.found.append((path, description))

    @property
    def is_full(self) -> bool:
        """Whether nothing more is taken in."""
        return len(self.found) >= MAX_VIOLATIONS

    def check_count(self, count: int, limit: int, path: str) -> bool:
        """Note a repeated field of more than ``limit`` entries; returns whether it has no more."""
        self.check(count <= limit, path, f"at most {limit} entries, not {count}")
        return count <= limit

    def check_chars(self, text: str, limit: int, path: str) -> None:
        """Note a text of more than ``limit`` characters."""
        self.check(len(text) <= limit, path, f"at most {limit} characters, not {len(text)}")

    def check(self, ok: bool, path: str, description: str) -> None:
        if not ok:
            self.add(path, description)

    def build(self, kind: Callable[..., _T], values: Mapping[str, Any], path: str) -> _T:
        """A domain object; each value that it refuses is noted and left at its default.

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
