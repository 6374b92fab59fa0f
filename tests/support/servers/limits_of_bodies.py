"""Every list and object in the bodies of HTTP requests that has a limit, found in the routes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from turret.server.api.admin.adapters import Adapters
from turret.server.api.faults import Failures
from turret.server.api.gate import Gate
from turret.server.api.inference.inference import Inference
from turret.server.http.exchange.endpoint import Route
from turret.server.http.exchange.shape import MAX_ENTRIES, Shape
from turret.server.http.server import routes
from turret.server.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Place:
    """A list or an object in the body of a request.

    Attributes:
        path: Of the endpoint.
        steps: From the body to it: names of fields, and 0 for the first entry of a list.
        most: Entries that it may have.
    """

    path: str
    steps: tuple[str | int, ...]
    most: int

    @property
    def blamed(self) -> str:
        """The field as an error names it."""
        said = "".join(f".{step}" if isinstance(step, str) else f"[{step}]" for step in self.steps)
        return said.removeprefix(".") or "the body"

    def __str__(self) -> str:
        return f"{self.path}:{self.blamed}"


def posts() -> list[Route]:
    """Every endpoint that takes a body."""
    made = routes(
        Inference(Gate()),
        Adapters(Gate()),
        metrics=Metrics(),
        failures=Failures(),
        has_admin=True,
    )
    return [route for route in made if route.method == "POST"]


def places() -> list[Place]:
    """All of them, with a field that no endpoint knows for the limit that is common to the rest."""
    found = []
    for route in posts():
        unknown = {"unknown": Shape(MAX_ENTRIES)}
        fields = dataclasses.replace(route.shape, fields={**route.shape.fields, **unknown})
        found += list(_within(route.path, (), fields))
    return found


def _within(path: str, steps: tuple[str | int, ...], shape: Shape) -> Iterator[Place]:
    yield Place(path, steps, shape.most)
    for name, inside in shape.fields.items():
        yield from _within(path, (*steps, name), inside)
    if shape.items is not None:
        yield from _within(path, (*steps, 0), shape.items)


def body_of(place: Place, count: int, *, most_bytes: int, entry: bytes = b"0") -> bytes:
    """A body with ``count`` entries at a place, or as many as there is room for.

    Args:
        place: Where they are.
        count: Of the entries.
        most_bytes: Of the body.
        entry: What each is; of an object, each value.
    """
    is_object = not place.steps or place.steps[-1] in ("logit_bias", "metadata")
    start, end = (b"{", b"}") if is_object else (b"[", b"]")
    room = most_bytes - 200
    if is_object:
        size = len(entry) + 10
        parts = [b'"%d":%b' % (number, entry) for number in range(min(count, room // size))]
    else:
        parts = [entry] * min(count, room // (len(entry) + 1))
    inner = start + b",".join(parts) + end
    for step in reversed(place.steps):
        inner = b"[%b]" % inner if step == 0 else b'{"%b":%b}' % (str(step).encode(), inner)
    return inner


def beside(place: Place) -> Mapping[str, Any]:
    """What else a body needs to be right."""
    turn = [{"role": "user", "content": "a"}]
    return {"model": "base", "messages": turn, "prompt": "a", "input": "a", "tokens": [1]}


def with_others(place: Place, body: bytes) -> bytes:
    """The same body with the fields that the endpoint cannot do without."""
    own = place.steps[0] if place.steps else None
    others = {name: value for name, value in beside(place).items() if name != own}
    return json.dumps(others)[:-1].encode() + b"," + body[1:]
