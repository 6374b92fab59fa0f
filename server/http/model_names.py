"""The meaning of ``model``: the base model, an adapter, or a mix of adapters."""

from __future__ import annotations

import re
from typing import Any

from turret.server.api.limits import MAX_MIX_MEMBERS, MAX_NAME_CHARS
from turret.server.api.violations import Violations, adapter_refs
from turret.server.basics.names import ADAPTER_NAME, BASE
from turret.server.errors import AdapterNotFoundError
from turret.server.http.schemas.requests import MixMember
from turret.server.words import say
from turret.v1 import adapters_pb2

_SHOWN_CHARS = 40
# The limit leaves room for generations, weights of 32 characters, blanks and a prefix.
_MOST_MODEL_CHARS = 2 * MAX_MIX_MEMBERS * (MAX_NAME_CHARS + 32)
_MOST_ECHOED = 200

# Adapter names contain no plus, star, colon or at sign.
_MEMBER = re.compile(
    rf"(?P<name>{ADAPTER_NAME.pattern})(?:@(?P<generation>[0-9]{{1,19}}))?(?:\*(?P<weight>.*))?",
    re.DOTALL,
)
_WEIGHT = re.compile(r"-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")

NamedMix = list[adapters_pb2.AdapterWeight]


def named_in(raw: dict[str, Any], base_name: str) -> tuple[NamedMix, list[tuple[str, str]]]:
    """The mix that a parsed request names, and the errors in it.

    Also works for rejected requests, because metrics count them for the adapters that they name.

    Raises:
        AdapterNotFoundError: See ``read_model``.
    """
    model, typed = raw.get("model"), raw.get("adapters")
    mix, invalid = read_model(model, base_name) if isinstance(model, str) else ([], [])
    wrong: list[tuple[str, str]] = [("model", why) for why in invalid]
    if isinstance(typed, list) and typed:
        if mix:
            wrong.append(("adapters", say("NEEDS_BASE_MODEL")))
        names = (each.get("name") for each in typed[:MAX_MIX_MEMBERS] if isinstance(each, dict))
        mix = [adapters_pb2.AdapterWeight(name=name) for name in names if isinstance(name, str)]
    return mix, wrong


def mix_of(members: list[MixMember]) -> NamedMix:
    """The mix that the field ``adapters`` lists."""
    return [
        adapters_pb2.AdapterWeight(
            name=member.name, weight=member.weight, generation=member.generation
        )
        for member in members
    ]


def read_model(model: str, base_name: str) -> tuple[NamedMix, list[str]]:
    """The mix that a model name refers to, empty for the base model, and the errors in it.

    ``base`` and the base model's name mean the base. ``sql`` is an adapter, ``sql@2`` one of its
    generations, and ``sql+json*-0.5`` a mix. The prefix ``BASE:`` (``base:`` or the base model's
    name) is allowed before an adapter or a mix.

    Raises:
        AdapterNotFoundError: The name has none of these forms.
    """
    if model in (BASE, base_name):
        return [], []
    if model.lower() == base_name.lower():
        raise _no_model(model, base_name)
    if len(model) > _MOST_MODEL_CHARS:
        return [], [say("TOO_MANY_CHARACTERS", most=_MOST_MODEL_CHARS, found=len(model))]
    rest = model
    for prefix in (base_name, BASE):
        if model.startswith(f"{prefix}:"):
            rest = model[len(prefix) + 1 :]
            break
    mix: NamedMix = []
    wrong: list[str] = []
    for part in rest.split("+"):
        match = _MEMBER.fullmatch(part.strip())
        if match is None:
            raise _no_model(model, base_name)
        name, generation, weight = match["name"], match["generation"], match["weight"]
        number = None if generation is None else int(generation)
        mix.append(adapters_pb2.AdapterWeight(name=name, generation=number))
        if weight is not None and _WEIGHT.fullmatch(weight):
            mix[-1].weight = float(weight)
        elif weight is not None:
            wrong.append(say("NOT_A_WEIGHT", name=name, weight=weight[:_SHOWN_CHARS]))
    violations = Violations()
    adapter_refs(mix, violations)
    return mix, [*wrong, *(why for _, why in violations.found)]


def _no_model(model: str, base_name: str) -> AdapterNotFoundError:
    """The error for a model name that has none of the known forms."""
    shown = model[:_MOST_ECHOED]
    if model.lower() == base_name.lower():
        text = say("NO_SUCH_MODEL", model=shown, closest=base_name)
    elif not set("=*+@").isdisjoint(model):
        text = say("MODEL_NOT_A_MIX", model=shown, step="sql+json*-0.5")
    else:
        text = say("NO_SUCH_MODEL", model=shown)
    return AdapterNotFoundError(text, metadata={"adapter": shown})
