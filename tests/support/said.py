"""Checks of errors by reason and parameters instead of words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from turret.server.errors import TurretError
from turret.server.words import Text


def texts_of(value: object) -> Iterator[Text]:
    """The texts of an error, of its violations, and of their parameters."""
    if isinstance(value, BaseException):
        violations = (text for _, text in getattr(value, "violations", ()))
        for part in (*value.args, getattr(value, "problem", None), *violations):
            yield from texts_of(part)
    elif isinstance(value, Text):
        yield value
        for part in value.params.values():
            yield from texts_of(part)


def fields_of(error: TurretError) -> list[str]:
    """The fields of an error's violations."""
    return [field for field, _ in error.violations]


def says(reason: str, **params: Any) -> Callable[[object], bool]:
    """A check for ``pytest.raises``: the error has a text of this reason with these parameters."""

    def check(error: object) -> bool:
        return any(
            text.reason == reason and params.items() <= dict(text.params).items()
            for text in texts_of(error)
        )

    return check
