"""Typed access to the fields of a JSON object. Errors are noted and none is raised."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterable, Mapping
from typing import Any

from turret.server.api.violations import Violations

UINT32 = (1 << 32) - 1
_HALF_A_PAIR = "holds half of a surrogate pair"
_TOO_LARGE = "holds a number that is too large: at most 1.8e308"
# Maximum length of a client's own field name within a reported path.
_SHOWN_CHARS = 40


class Fields:
    """One object of a request. A field that is null counts as absent.

    Args:
        body: The object.
        violations: Takes in what is wrong.
        path: Where the object lies in the request, with a dot at the end; empty for the whole.

    Attributes:
        read: The fields that were asked for, whether they were sent or not.
        path: See above.
        within: The objects in it that were read, by their paths from it.
    """

    def __init__(self, body: Mapping[str, Any], violations: Violations, path: str = "") -> None:
        self._body = body
        self.path = path
        self.violations = violations
        # A dict used as an ordered set.
        self.read: dict[str, None] = {}
        self.within: dict[str, Fields] = {}

    @property
    def sent(self) -> Iterable[str]:
        """The fields that are there."""
        return self._body.keys()

    def is_null(self, name: str) -> bool:
        """Whether a field is absent or null."""
        return self._body.get(name) is None

    def is_any_of(self, name: str, values: Iterable[Any]) -> bool:
        """Whether a field has one of the values."""
        return self._body.get(name) in values

    def get(self, name: str) -> Any:
        """The value as it was sent, or None."""
        self.read[name] = None
        return self._body.get(name)

    def refuse(self, name: str, description: str) -> None:
        """Note that a field is wrong."""
        self.violations.add(self.path + name, description)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.refuse(name, "must be true or false")
            return default
        return value

    def text(self, name: str) -> str | None:
        value = self.get(name)
        if value is None:
            return None
        why = why_no_text(value)
        if why is not None:
            self.refuse(name, why)
            return None
        return value

    def number(self, name: str) -> float | None:
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(name, "must be a number")
            return None
        try:
            return float(value)
        except OverflowError:
            return math.inf

    def integer(self, name: str, least: int = 0, most: int | None = UINT32) -> int | None:
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            self.refuse(name, "must be an integer")
            return None
        if value < least or (most is not None and value > most):
            bounds = f"at least {least}" if most is None else f"in [{least}, {most}]"
            self.refuse(name, f"must be {bounds}")
            return None
        return value

    def count(self, name: str, least: int = 0) -> int | None:
        """A count, lowered to what a message can hold; the context limit rejects it anyway."""
        found = self.integer(name, least, None)
        return None if found is None else min(found, UINT32)

    def array(self, name: str) -> list[Any] | None:
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list):
            self.refuse(name, "must be a list")
            return None
        return value

    def object(self, name: str) -> dict[str, Any] | None:
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.refuse(name, "must be an object")
            return None
        return value

    def inner(self, name: str) -> Fields:
        """The fields of the object in a field; without it, the fields of an empty object."""
        if name not in self.within:
            self.nested(name, self.object(name) or {})
        return self.within[name]

    def nested(self, path: str, value: Mapping[str, Any]) -> Fields:
        """The fields of an object at ``path`` within this one."""
        self.within[path] = Fields(value, self.violations, f"{self.path}{path}.")
        return self.within[path]


def why_no_text(value: Any) -> str | None:
    """What keeps a value from being text, or None.

    JSON can write halves of surrogate pairs, which are no characters and which no message holds.
    """
    if not isinstance(value, str):
        return "must be a string"
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            return _HALF_A_PAIR
    return None


def json_text(value: Any) -> tuple[str, str | None]:
    """A parsed value as JSON again, or what prevents that.

    JSON is read with numbers that are larger than any float, which it cannot write.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except UnicodeEncodeError:
        return "", _HALF_A_PAIR
    except ValueError:
        return "", _TOO_LARGE
    return text, None


def unwritable(value: Any, path: str) -> tuple[str, str] | None:
    """The path of the first value that JSON cannot represent, and why; None if there is none."""
    _, why = json_text(value)
    return _unwritable(value, path) if why is not None else None


def _unwritable(value: Any, path: str) -> tuple[str, str] | None:
    if isinstance(value, dict):
        inside = ((f"{path}.{name[:_SHOWN_CHARS]}", each) for name, each in value.items())
    elif isinstance(value, list):
        inside = ((f"{path}[{index}]", each) for index, each in enumerate(value))
    else:
        _, why = json_text(value)
        return None if why is None else (path, why)
    return next((found for place, each in inside if (found := _unwritable(each, place))), None)


def is_token_id(value: Any) -> bool:
    """Whether a value is an integer that a message can hold as a token id."""
    return type(value) is int and 0 <= value <= UINT32


def are_token_ids(values: list[Any]) -> bool:
    """Whether ``is_token_id`` holds for all of them, of which there may be a million."""
    if values and set(map(type, values)) != {int}:
        return False
    try:
        array("I", values)
    except OverflowError:
        return False
    return True


def is_longer(value: Any, most: int) -> bool:
    """Whether a parsed value has more than ``most`` characters as JSON, blanks left out.

    It looks at no more than it must, where ``json_text`` would write all of it.
    """
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            most -= sum(map(len, each))
            waiting.extend(each.values())
        elif isinstance(each, list):
            waiting.extend(each)
        elif isinstance(each, str):
            most -= len(each)
        most -= 1
        if most < len(waiting):
            return True
    return False
