"""Every list and object in the bodies of HTTP requests that has a limit, found in the schemas."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from turret.server.http.endpoint import Route
from turret.server.http.routes import ROUTES
from turret.server.http.tinker import ROUTES as TINKER_ROUTES

# The fields that are objects with names of the client's choice.
_OBJECTS = ("logit_bias", "metadata", "user_metadata")


@dataclass(frozen=True, slots=True)
class Place:
    """A list or an object in the body of a request.

    Attributes:
        path: The path of the endpoint.
        steps: The steps from the body: names of fields, and 0 for the first entry of a list.
        most: The maximum number of entries.
    """

    path: str
    steps: tuple[str | int, ...]
    most: int

    @property
    def blamed(self) -> str:
        """The name of the field in errors."""
        said = "".join(f".{step}" if isinstance(step, str) else f"[{step}]" for step in self.steps)
        return said.removeprefix(".") or "the body"

    def __str__(self) -> str:
        return f"{self.path}:{self.blamed}"


def posts(*, has_training: bool = False) -> list[Route]:
    """Every endpoint that takes a JSON body in a POST; those of the Tinker API on request."""
    found = (*ROUTES, *(TINKER_ROUTES if has_training else ()))
    return [route for route in found if route.body is not None and route.method == "POST"]


def places(*, has_training: bool = False) -> list[Place]:
    """All places with a limit."""
    found = []
    for route in posts(has_training=has_training):
        assert route.body is not None
        schema = route.body.model_json_schema()
        found += list(_within(route.path, (), schema, schema.get("$defs", {})))
    return found


def fields(*, has_training: bool = False) -> dict[str, set[str]]:
    """The fields of the bodies of all endpoints."""
    routes = posts(has_training=has_training)
    schemas = {route.path: route.body.model_json_schema() for route in routes if route.body}
    return {path: set(schema.get("properties", ())) for path, schema in schemas.items()}


def _within(
    path: str, steps: tuple[str | int, ...], schema: Mapping[str, Any], definitions: Any
) -> Iterator[Place]:
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    assert schema.get("type") != "array" or "maxItems" in schema, f"{path} {steps} has no limit"
    if "maxItems" in schema or "maxProperties" in schema:
        yield Place(path, steps, schema.get("maxItems") or schema["maxProperties"])
    for name, inside in schema.get("properties", {}).items():
        yield from _within(path, (*steps, name), inside, definitions)
    for inside in schema.get("anyOf", ()):
        yield from _within(path, steps, inside, definitions)
    if isinstance(schema.get("items"), dict):
        yield from _within(path, (*steps, 0), schema["items"], definitions)


def body_of(
    place: Place, count: int, *, most_bytes: int, entry: bytes = b"0", times: int = 1
) -> bytes:
    """A body with ``count`` entries at a place, or as many as fit.

    Args:
        place: The place of the entries.
        count: The number of entries.
        most_bytes: The maximum size of the body.
        entry: Each entry, or each value of an object.
        times: The number of entries of the list that contains the place, as far as they fit.
    """
    is_object = not place.steps or place.steps[-1] in _OBJECTS
    start, end = (b"{", b"}") if is_object else (b"[", b"]")
    room = most_bytes - 200
    if is_object:
        size = len(entry) + 10
        parts = [b'"%d":%b' % (number, entry) for number in range(min(count, room // size))]
    else:
        parts = [entry] * min(count, room // (len(entry) + 1))
    inner = start + b",".join(parts) + end
    for step in reversed(place.steps):
        if step == 0:
            inner = b"[" + b",".join([inner] * max(1, min(times, room // (len(inner) + 1)))) + b"]"
        else:
            inner = b'{"%b":%b}' % (str(step).encode(), inner)
    return inner


def beside(place: Place) -> Mapping[str, Any]:
    """The other fields of a valid body."""
    turn = [{"role": "user", "content": "a"}]
    return {"model": "base", "messages": turn, "prompt": "a", "input": "a", "tokens": [1]}


def with_others(place: Place, body: bytes) -> bytes:
    """The same body with the required fields of the endpoint."""
    own = place.steps[0] if place.steps else None
    others = {name: value for name, value in beside(place).items() if name != own}
    return json.dumps(others)[:-1].encode() + b"," + body[1:]
