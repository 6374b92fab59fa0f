"""Collects everything wrong with a message, so that one answer names it all."""

from __future__ import annotations

from dataclasses import dataclass, field

from turret.server.errors import InvalidRequestError

# A message of a few megabytes can break a rule a million times; an answer lists these many.
MAX_VIOLATIONS = 100


@dataclass(slots=True)
class Violations:
    """Collects (field path, description) pairs until all of a message has been looked at."""

    found: list[tuple[str, str]] = field(default_factory=list)

    def add(self, path: str, description: str) -> None:
        if len(self.found) < MAX_VIOLATIONS:
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

    def raise_if_any(self) -> None:
        """Raise one InvalidRequestError that lists them all."""
        if self.found:
            text = "; ".join(f"{path}: {description}" for path, description in self.found)
            raise InvalidRequestError(text, violations=self.found)
