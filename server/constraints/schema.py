"""Finds where in a JSON schema something is that llguidance refuses: it names the thing alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

# Keywords that hold a schema, a list of schemas, or schemas by name.
_ONE = frozenset(
    (
        *("items", "additionalItems", "additionalProperties", "contains", "propertyNames", "not"),
        *("if", "then", "else", "unevaluatedItems", "unevaluatedProperties"),
    )
)
_LISTED = frozenset(("allOf", "anyOf", "oneOf", "prefixItems", "items"))
_NAMED = frozenset(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"))
MAX_FAULTS = 20

_Finder = Callable[[str, Any], bool]


def schema_faults(schema: dict[str, Any], why: str) -> list[tuple[str, str]]:
    """Where the complaint ``why`` about a schema comes from.

    Returns:
        Paths within the schema (``.properties.tags.uniqueItems``) and what is wrong with each; none
        if the place is not known.
    """
    for pattern, kind in _COMPLAINTS:
        found = re.search(pattern, why)
        if found is None:
            continue
        is_at_fault, said = kind(found)
        places = (path for path, key, value in _keywords(schema) if is_at_fault(key, value))
        return [(path, said) for path, _ in zip(places, range(MAX_FAULTS), strict=False)]
    return []


def _unsupported(found: re.Match[str]) -> tuple[_Finder, str]:
    names = set(json.loads(found[1]))
    return lambda key, _: key in names, "is not supported"


def _format(found: re.Match[str]) -> tuple[_Finder, str]:
    name = found[1]
    return lambda key, value: key == "format" and value == name, f"{name!r} is not supported"


def _reference(found: re.Match[str]) -> tuple[_Finder, str]:
    target = found[1]

    def is_it(key: str, value: Any) -> bool:
        return key == "$ref" and isinstance(value, str) and value.endswith(target)

    return is_it, "points to nothing in this schema"


def _one_of(found: re.Match[str]) -> tuple[_Finder, str]:
    return lambda key, _: key == "oneOf", "is supported where its members exclude each other: anyOf"


def _pattern(found: re.Match[str]) -> tuple[_Finder, str]:
    pattern, what = found[1], " ".join(found[2].split())
    return lambda key, value: key == "pattern" and value == pattern, what


_COMPLAINTS: tuple[tuple[str, Callable[[re.Match[str]], tuple[_Finder, str]]], ...] = (
    (r"Unimplemented keys: (\[.*\])", _unsupported),
    (r"Unknown format: (.*)", _format),
    (r"Pointer '(.*)' does not exist", _reference),
    (r"Resource '([^'#]*)", _reference),
    (r"oneOf constraints are not supported", _one_of),
    (r"regex parse error:\n    (.*)\n *\^+\n(error: .*)", _pattern),
)


def _keywords(schema: Any) -> Iterator[tuple[str, str, Any]]:
    """Path, name and value of every keyword of a schema and of those in it."""
    left = [("", schema)]
    while left:
        path, part = left.pop()
        if not isinstance(part, dict):
            continue
        inner: list[tuple[str, Any]] = []
        for key, value in part.items():
            where = f"{path}.{key}"
            yield where, key, value
            if key in _LISTED and isinstance(value, list):
                inner += [(f"{where}[{i}]", one) for i, one in enumerate(value)]
            elif key in _NAMED and isinstance(value, dict):
                inner += [(f"{where}.{name}", one) for name, one in value.items()]
            elif key in _ONE:
                inner.append((where, value))
        left += reversed(inner)
