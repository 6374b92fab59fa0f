"""JSON as these files need it: one object, no repeated key, no NaN, nothing that is not text."""

from __future__ import annotations

import json
from typing import Any

from turret.server.words import Text, say

# Longest key of the outermost object: error messages repeat it, and no format needs more.
MAX_KEY_CHARS = 512


class FormatError(ValueError):
    """A file breaks its format.

    Attributes:
        why: The fault, fit for a client.
    """

    def __init__(self, why: Text) -> None:
        super().__init__(why)
        self.why = why


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise FormatError(say("JSON_DUPLICATE_KEY", key=key))
        result[key] = value
    return result


def _constant(name: str) -> Any:
    raise FormatError(say("JSON_NOT_FINITE", value=name))


def parse_object(data: bytes) -> dict[str, Any]:
    """Parses UTF-8 JSON whose top level is an object.

    Returns:
        The object. Every string in it can be encoded as UTF-8, so it can be sent to a client.

    Raises:
        FormatError: Anything else.
    """
    try:
        value = json.loads(data.decode(), object_pairs_hook=_pairs, parse_constant=_constant)
    except UnicodeDecodeError:
        raise FormatError(say("NOT_UTF8")) from None
    except RecursionError:
        raise FormatError(say("JSON_TOO_NESTED")) from None
    except FormatError:
        raise
    except ValueError as error:
        raise FormatError(say("NOT_JSON", problem=str(error))) from None
    if not isinstance(value, dict):
        raise FormatError(say("NOT_A_JSON_OBJECT"))
    for key in value:
        if len(key) > MAX_KEY_CHARS:
            raise FormatError(say("JSON_KEY_TOO_LONG", most=MAX_KEY_CHARS, key=key))
    # UTF-8 cannot encode surrogates, so only a \u escape can produce one.
    if b"\\u" in data:
        for key, item in value.items():
            if not (_is_text(key) and _is_text(item)):
                raise FormatError(say("JSON_HALF_CHARACTER", key=ascii(key)[1:-1]))
    return value


def _is_text(value: Any) -> bool:
    """Whether UTF-8 can encode every string in a parsed value."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, str):
            try:
                part.encode()
            except UnicodeEncodeError:
                return False
        elif isinstance(part, dict):
            waiting += (*part.keys(), *part.values())
        elif isinstance(part, list):
            waiting += part
    return True
