"""What ``model`` means: the base, an adapter, or a mix of adapters."""

from __future__ import annotations

import re
from typing import Any

from turret.server.basics.closest import did_you_mean
from turret.server.config import ADAPTER_NAME
from turret.server.errors import AdapterNotFoundError
from turret.server.http.bodies.fields import Fields
from turret.v1 import adapters_pb2

# The base model under any server, whatever its own name.
BASE = "base"

# Of an entry of ``adapters``: one that is misspelt would be served with another weight.
_MEMBER_FIELDS = ("name", "weight", "generation")
_SHOWN_CHARS = 40

# No adapter's name holds a plus, a star or a colon.
_WEIGHT = r"-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_MEMBER = re.compile(rf"(?P<name>{ADAPTER_NAME.pattern})(?:\*(?P<weight>{_WEIGHT}))?")


def mix_of(
    fields: Fields, base_name: str, names: dict[str, str]
) -> list[adapters_pb2.AdapterWeight]:
    """The adapters that a request asks for: those of ``model``, or of the typed ``adapters``.

    Args:
        fields: The request.
        base_name: The base model's own name.
        names: See ``refusal_of``; takes in which field an adapter that is not there stands in.

    Raises:
        AdapterNotFoundError: ``model`` has the form of no name and of no mix.
    """
    model = fields.text("model")
    if fields.get("model") is None:
        fields.refuse("model", "must be set: the base model's name, an adapter, or a mix")
    named = parse_model(model, base_name) if model is not None else []
    typed = fields.array("adapters")
    if not typed:
        return named
    if named:
        fields.refuse("adapters", "goes with the base model's name as model")
    names["name"] = "adapters"
    return [_member(fields, index, value) for index, value in enumerate(typed)]


def parse_model(model: str, base_name: str) -> list[adapters_pb2.AdapterWeight]:
    """The mix that a name stands for; empty for the base model.

    ``base`` and the base model's name are the base, ``sql`` is an adapter, ``sql+json*-0.5`` a mix;
    ``BASE:`` with the base model's name (or ``base:``) may stand before either.

    Raises:
        AdapterNotFoundError: It has none of these forms.
    """
    if model in (BASE, base_name):
        return []
    rest = model
    for prefix in (base_name, BASE):
        if model.startswith(f"{prefix}:"):
            rest = model[len(prefix) + 1 :]
            break
    members = []
    for part in rest.split("+"):
        match = _MEMBER.fullmatch(part.strip())
        if match is None:
            raise no_model(model)
        member = adapters_pb2.AdapterWeight(name=match["name"])
        if match["weight"] is not None:
            member.weight = float(match["weight"])
        members.append(member)
    return members


def no_model(model: str) -> AdapterNotFoundError:
    """The error for a model that there is not."""
    is_mix = not set("=*+@").isdisjoint(model)
    form = "; a mix is written as sql+json*-0.5" if is_mix else ""
    return AdapterNotFoundError(
        f"the model {model[:200]!r} does not exist{form}", metadata={"adapter": model[:200]}
    )


def _member(fields: Fields, index: int, value: Any) -> adapters_pb2.AdapterWeight:
    member = adapters_pb2.AdapterWeight()
    if not isinstance(value, dict):
        fields.refuse(f"adapters[{index}]", "must be an object with a name")
        return member
    entry = Fields(value, fields.violations, f"adapters[{index}].")
    for key in value:
        if key not in _MEMBER_FIELDS:
            meant = did_you_mean(key, _MEMBER_FIELDS) or f"; there are {', '.join(_MEMBER_FIELDS)}"
            fields.refuse(f"adapters[{index}]", f"knows no {key[:_SHOWN_CHARS]!r}{meant}")
    if entry.get("name") is None:
        entry.refuse("name", "must be set")
    member.name = entry.text("name") or ""
    weight = entry.number("weight")
    if weight is not None:
        member.weight = weight
    generation = entry.integer("generation", 0, (1 << 64) - 1)
    if generation is not None:
        member.generation = generation
    return member
