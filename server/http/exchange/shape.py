"""How large the lists and objects of a body may be, checked before anything else looks at them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from turret.server.errors import InvalidRequestError

# Maximum nesting of lists and objects; the API itself needs five levels.
MAX_DEPTH = 64
# Maximum number of lists and objects in a body; 4096 turns with tool calls have 30,000.
MAX_CONTAINERS = 1 << 15
# Maximum number of entries in a list or object for which a path states no limit of its own.
MAX_ENTRIES = 1 << 14
MANY = f"the body holds more than {MAX_CONTAINERS} lists and objects"
_SHOWN_CHARS = 40


@dataclass(frozen=True, slots=True)
class Shape:
    """The limits of one list or object, and of those within it.

    Attributes:
        most: Entries of the list, or fields of the object.
        items: The lists and objects in the list; None stands for ``Shape()``.
        fields: Those in fields of the object; a field that is missing has the shape ``Shape()``.
    """

    most: int = MAX_ENTRIES
    items: Shape | None = None
    fields: Mapping[str, Shape] = dataclasses.field(default_factory=dict)


ANY = Shape()


def check_shape(body: dict[str, Any], shape: Shape, *, checks_names: bool) -> None:
    """Refuse a parsed body that is larger than its shape.

    Args:
        body: The body.
        shape: Its limits.
        checks_names: Whether a name may hold half of a surrogate pair, which no answer can repeat.

    Raises:
        InvalidRequestError: It is too large, is nested too deeply, or has such a name.
    """
    waiting: list[tuple[Any, Shape, str, int]] = [(body, shape, "", 1)]
    num_met = 1
    while waiting:
        value, shape, path, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise InvalidRequestError(f"the body is nested more than {MAX_DEPTH} deep")
        if len(value) > shape.most:
            why = f"at most {shape.most} entries, not {len(value)}"
            raise InvalidRequestError.of(path or "the body", why)
        if checks_names and isinstance(value, dict):
            _check_names(value, path)
        for each, inside, place in _inside(value, shape, path):
            num_met += 1
            if num_met > MAX_CONTAINERS:
                raise InvalidRequestError(MANY)
            waiting.append((each, inside, place, depth + 1))


def _inside(value: Any, shape: Shape, path: str) -> Iterator[tuple[Any, Shape, str]]:
    """The lists and objects directly in one, each with its shape and its path."""
    # Most lists hold only numbers or texts: skip them without a loop.
    kinds = map(type, value.values() if isinstance(value, dict) else value)
    if {dict, list}.isdisjoint(kinds):
        return
    if isinstance(value, dict):
        for name, each in value.items():
            if isinstance(each, dict | list):
                yield each, shape.fields.get(name, ANY), _joined(path, name)
        return
    for index, each in enumerate(value):
        if isinstance(each, dict | list):
            yield each, shape.items or ANY, f"{path}[{index}]"


def _joined(path: str, name: str) -> str:
    name = name[:_SHOWN_CHARS]
    return f"{path}.{name}" if path else name


def _check_names(value: Mapping[str, Any], path: str) -> None:
    for name in value:
        try:
            name.encode()
        except UnicodeEncodeError:
            why = f"the name {name[:_SHOWN_CHARS]!r} holds half of a surrogate pair"
            if not path:
                raise InvalidRequestError(why) from None
            raise InvalidRequestError.of(path, why) from None
