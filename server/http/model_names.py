"""The meaning of ``model``: the base model, an adapter, or a mix of adapters."""

from __future__ import annotations

import re
from typing import Any

from turret.server.api.limits import MAX_MIX_MEMBERS, MAX_NAME_CHARS
from turret.server.api.violations import Violations, adapter_refs
from turret.server.basics.names import ADAPTER_NAME, BASE
from turret.server.errors import AdapterNotFoundError
from turret.server.http.schemas.requests import MixMember
from turret.server.words import Text, say
from turret.v1 import adapters_pb2

_SHOWN_CHARS = 40
# No weight needs more digits. The limit on ``model`` leaves room for generations, blanks, stars and
# a prefix.
_MOST_WEIGHT_CHARS = 32
_MOST_MODEL_CHARS = 2 * MAX_MIX_MEMBERS * (MAX_NAME_CHARS + _MOST_WEIGHT_CHARS)
_MOST_ECHOED = 200

# Adapter names contain no plus, star, colon or at sign.
_MEMBER = re.compile(
    rf"(?P<name>{ADAPTER_NAME.pattern})(?:@(?P<generation>[0-9]{{1,20}}))?(?:\*(?P<weight>.*))?",
    re.DOTALL,
)
_MOST_GENERATION = (1 << 64) - 1
_WEIGHT = re.compile(r"-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")

Mix = list[adapters_pb2.AdapterWeight]


def named_in(raw: dict[str, Any], base_name: str) -> tuple[Mix, list[tuple[str, Text]]]:
    """The mix that a parsed request names, and the errors in it.

    Also works for rejected requests, because metrics count them for the adapters that they name.

    Raises:
        AdapterNotFoundError: See ``read_model``.
    """
    model, typed = raw.get("model"), raw.get("adapters")
    mix, invalid = read_model(model, base_name) if isinstance(model, str) else ([], [])
    wrong = [("model", why) for why in invalid]
    if isinstance(typed, list) and typed:
        if mix:
            wrong.append(("adapters", say("NEEDS_BASE_MODEL")))
        names = (each.get("name") for each in typed[:MAX_MIX_MEMBERS] if isinstance(each, dict))
        mix = [adapters_pb2.AdapterWeight(name=name) for name in names if isinstance(name, str)]
    return mix, wrong


def mix_of(members: list[MixMember]) -> Mix:
    """The mix that the field ``adapters`` lists."""
    return [
        adapters_pb2.AdapterWeight(
            name=member.name, weight=member.weight, generation=member.generation
        )
        for member in members
    ]


def parse_model(model: str, base_name: str) -> Mix:
    """The mix that a model name refers to; empty for the base model.

    ``base`` and the base model's name mean the base. ``sql`` is an adapter, ``sql@2`` one of its
    generations, and ``sql+json*-0.5`` a mix. The prefix ``BASE:`` (``base:`` or the base model's
    name) is allowed before an adapter or a mix.

    Raises:
        AdapterNotFoundError: The name has none of these forms.
        InvalidRequestError: The name has one of these forms, but a weight is invalid or an adapter
            occurs twice.
    """
    mix, wrong = read_model(model, base_name)
    violations = Violations()
    for text in wrong:
        violations.add("model", text)
    violations.raise_if_any()
    return mix


def read_model(model: str, base_name: str) -> tuple[Mix, list[Text]]:
    """Like ``parse_model``, but returns the errors. A member with an error has no weight.

    Raises:
        AdapterNotFoundError: See ``parse_model``.
    """
    if model in (BASE, base_name):
        return [], []
    if model.lower() == base_name.lower():
        raise _no_model(model, base_name)
    if len(model) > _MOST_MODEL_CHARS:
        return [], [say("TOO_MANY_CHARACTERS", most=_MOST_MODEL_CHARS, found=len(model))]
    if (num_members := model.count("+") + 1) > MAX_MIX_MEMBERS:
        return [], [say("TOO_MANY_ENTRIES", most=MAX_MIX_MEMBERS, found=num_members)]
    rest = model
    for prefix in (base_name, BASE):
        if model.startswith(f"{prefix}:"):
            rest = model[len(prefix) + 1 :]
            break
    members: dict[str, adapters_pb2.AdapterWeight] = {}
    wrong: list[Text] = []
    for part in rest.split("+"):
        match = _MEMBER.fullmatch(part.strip())
        if match is None:
            raise _no_model(model, base_name)
        name, weight = match["name"], match["weight"]
        if name in members:
            wrong.append(say("DUPLICATE", value=name))
            continue
        members[name] = adapters_pb2.AdapterWeight(name=name)
        if match["generation"] is not None:
            generation = int(match["generation"])
            if generation > _MOST_GENERATION:
                said = {"least": 0, "most": _MOST_GENERATION, "value": generation}
                wrong.append(say("NOT_IN_RANGE", **said))
                continue
            members[name].generation = generation
        if weight is None:
            continue
        if len(weight) > _MOST_WEIGHT_CHARS or _WEIGHT.fullmatch(weight) is None:
            wrong.append(say("NOT_A_WEIGHT", name=name, weight=weight[:_SHOWN_CHARS]))
            continue
        violations = Violations()
        adapter_refs([adapters_pb2.AdapterWeight(name=name, weight=float(weight))], violations)
        wrong += [why for _, why in violations.found]  # type: ignore[misc]
        if not violations.found:
            members[name].weight = float(weight)
    return list(members.values()), wrong


def _no_model(model: str, base_name: str) -> AdapterNotFoundError:
    """The error for a model name of no known form."""
    shown = model[:_MOST_ECHOED]
    if model.lower() == base_name.lower():
        text = say("NO_SUCH_MODEL", model=shown, closest=base_name)
    elif not set("=*+@").isdisjoint(model):
        text = say("MODEL_NOT_A_MIX", model=shown, step="sql+json*-0.5")
    else:
        text = say("NO_SUCH_MODEL", model=shown)
    return AdapterNotFoundError(text, metadata={"adapter": shown})
