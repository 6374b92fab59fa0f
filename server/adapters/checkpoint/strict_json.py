"""JSON as these files need it: one object, no repeated key, no NaN."""

from __future__ import annotations

import json
from typing import Any


class _Repeated(ValueError):
    pass


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _Repeated(f"key {key!r} appears twice")
        result[key] = value
    return result


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def parse_object(data: bytes) -> dict[str, Any]:
    """Parses UTF-8 JSON whose top level is an object.

    Raises:
        ValueError: Anything else; the text is fit for a client.
    """
    try:
        value = json.loads(data.decode(), object_pairs_hook=_pairs, parse_constant=_constant)
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError("must hold a JSON object")
    return value
