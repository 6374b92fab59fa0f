"""The meaning of ``model``: the base model, an adapter, or a mix of adapters."""

from __future__ import annotations

import re
from typing import Any

from turret.server.api.limits import MAX_MIX_MEMBERS, MAX_NAME_CHARS
from turret.server.api.violations import Violations, adapter_refs
from turret.server.basics.closest import did_you_mean
from turret.server.basics.hub_id import ADAPTER_NAME, BASE
from turret.server.errors import AdapterNotFoundError, InvalidRequestError
from turret.server.http.bodies.fields import Fields
from turret.v1 import adapters_pb2

# Reject other fields: with a misspelt ``weight`` the request would run with a different weight.
_MEMBER_FIELDS = ("name", "weight", "generation")
_SHOWN_CHARS = 40
# No weight needs more digits. The limit on the model leaves room for blanks, stars and a prefix.
_MOST_WEIGHT_CHARS = 32
_MOST_MODEL_CHARS = 2 * MAX_MIX_MEMBERS * (MAX_NAME_CHARS + _MOST_WEIGHT_CHARS)

# Adapter names contain no plus, star or colon.
_MEMBER = re.compile(rf"(?P<name>{ADAPTER_NAME.pattern})(?:\*(?P<weight>.*))?", re.DOTALL)
_WEIGHT = re.compile(r"-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
_WEIGHT_RULE = "is a decimal number without an exponent, such as 2, 0.5 or -0.5"


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
    named, wrong = _read_model(model, base_name) if model is not None else ([], [])
    for why in wrong:
        fields.refuse("model", why)
    # Report violations of the whole mix under the field that contains it.
    names["adapters"] = "model"
    typed = fields.get("adapters")
    if typed is None or typed == []:
        return named
    names.update(name="adapters", adapters="adapters")
    if not isinstance(typed, list):
        fields.refuse("adapters", "must be a list of objects with a name")
        return []
    if named:
        fields.refuse("adapters", "goes with the base model's name as model")
    return [_member(fields, index, value) for index, value in enumerate(typed)]


def parse_model(model: str, base_name: str) -> list[adapters_pb2.AdapterWeight]:
    """The mix that a model name refers to; empty for the base model.

    ``base`` and the base model's name are the base, ``sql`` is an adapter, ``sql+json*-0.5`` a mix;
    ``BASE:`` with the base model's name (or ``base:``) may stand before either.

    Raises:
        AdapterNotFoundError: It has none of these forms.
        InvalidRequestError: It has one, but for a weight that is none, or a member comes twice.
    """
    members, wrong = _read_model(model, base_name)
    if wrong:
        raise InvalidRequestError.of("model", "; ".join(wrong))
    return members


def _read_model(model: str, base_name: str) -> tuple[list[adapters_pb2.AdapterWeight], list[str]]:
    """Like ``parse_model``, but with the errors; a member with an error has no weight."""
    if model in (BASE, base_name):
        return [], []
    if len(model) > _MOST_MODEL_CHARS:
        return [], [f"at most {_MOST_MODEL_CHARS} characters, not {len(model)}"]
    if (num_members := model.count("+") + 1) > MAX_MIX_MEMBERS:
        return [], [f"at most {MAX_MIX_MEMBERS} members, not {num_members}"]
    rest = model
    for prefix in (base_name, BASE):
        if model.startswith(f"{prefix}:"):
            rest = model[len(prefix) + 1 :]
            break
    members: dict[str, adapters_pb2.AdapterWeight] = {}
    wrong = []
    for part in rest.split("+"):
        match = _MEMBER.fullmatch(part.strip())
        if match is None:
            raise _no_model(model, base_name)
        name = match["name"]
        if name in members:
            wrong.append(f"{name!r} occurs twice")
            continue
        members[name] = adapters_pb2.AdapterWeight(name=name)
        if match["weight"] is None:
            continue
        why = _why_no_weight(name, match["weight"])
        if why:
            wrong.append(why)
        else:
            members[name].weight = float(match["weight"])
    return list(members.values()), wrong


def _why_no_weight(name: str, text: str) -> str:
    """What is wrong with a weight; empty if nothing is."""
    if len(text) > _MOST_WEIGHT_CHARS or _WEIGHT.fullmatch(text) is None:
        return f"{text[:_SHOWN_CHARS]!r} is no weight of {name!r}: one {_WEIGHT_RULE}"
    violations = Violations()
    adapter_refs([adapters_pb2.AdapterWeight(name=name, weight=float(text))], violations)
    return violations.found[0][1] if violations.found else ""


def _no_model(model: str, base_name: str) -> AdapterNotFoundError:
    """The error for a model name of no known form."""
    lower = model.lower()
    if lower == base_name.lower():
        form = f"; did you mean {base_name!r}?"
    elif all(_MEMBER.fullmatch(part.strip()) for part in lower.split("+")):
        form = ": adapters are named in lower case"
    elif not set("=*+@").isdisjoint(model):
        form = "; a mix is written as sql+json*-0.5"
    else:
        form = ""
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
