"""A registration as a file of the state directory."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from turret.server.adapters.facts import AdapterFacts
from turret.server.adapters.source import Source

# Raise it when the fields change, and read the older ones still. 2: facts have components. 3: a
# source has a task. 4: facts have an invocation.
# 5: facts have labels. 6: facts have a vocabulary's size and tokenizer.
# 7: and a first pass.
_VERSION = 7
_READ_VERSIONS = (1, 2, 3, 4, 5, 6, 7)


@functools.lru_cache(maxsize=4096)
def _shared(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """One tuple for all adapters that say the same, which is most of them."""
    return values


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedRegistration:
    """What survives a restart. Weights are read again when they are first needed."""

    name: str
    uuid: str
    generation: int
    pinned: bool
    source: Source
    facts: AdapterFacts

    def to_json(self) -> bytes:
        fields: dict[str, Any] = {**dataclasses.asdict(self), "version": _VERSION}
        # The name is there already.
        del fields["source"]["adapter"]
        return json.dumps(fields, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> SavedRegistration:
        """Reads what ``to_json`` wrote.

        Raises:
            ValueError: It is something else.
        """
        fields = json.loads(data)
        if not isinstance(fields, dict) or fields.pop("version", None) not in _READ_VERSIONS:
            raise ValueError(f"is no registration of version {_VERSION} or before")
        try:
            source = Source(**_typed(Source, fields.pop("source")))
            if source.is_upload:
                source = dataclasses.replace(source, adapter=fields["name"])
            facts = AdapterFacts(**_typed(AdapterFacts, fields.pop("facts")))
            return cls(source=source, facts=facts, **_typed(cls, fields))
        except (KeyError, TypeError) as error:
            raise ValueError(f"is no registration: {error}") from None


# The annotations are strings here, which is all that is needed to tell them apart.
_TYPES: Mapping[str, Any] = {"str": str, "int": int, "bool": bool}
_OPTIONAL = " | None"


def _typed(kind: Any, values: Any) -> dict[str, Any]:
    """The values, checked against the fields' types; lists become shared tuples.

    Raises:
        TypeError: They are no object, or one has another type.
    """
    if not isinstance(values, dict):
        raise TypeError("an object is missing")
    types = {field.name: str(field.type) for field in dataclasses.fields(kind)}
    checked: dict[str, Any] = {}
    for name, value in values.items():
        wanted = types.get(name, "")
        if wanted.endswith(_OPTIONAL):
            wanted = "" if value is None else wanted.removesuffix(_OPTIONAL)
        if wanted in _TYPES and type(value) is not _TYPES[wanted]:
            raise TypeError(f"{name} is no {wanted}")
        if wanted.startswith("tuple"):
            item = _TYPES[wanted.removeprefix("tuple[").removesuffix(", ...]")]
            if not isinstance(value, list) or any(type(part) is not item for part in value):
                raise TypeError(f"{name} is no list of {item.__name__}")
            value = _shared(tuple(value))
        elif name in ("method", "base_model") and isinstance(value, str):
            value = sys.intern(value)
        checked[name] = value
    return checked
