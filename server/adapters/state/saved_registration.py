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

# Raise the version when fields change, and keep reading older ones. Version 2 added components to
# the facts, 3 a source's task, 4 the invocation, 5 labels, 6 the size of the vocabulary and the
# tokenizer, 7 the first pass, 8 the chat template.
_VERSION = 8
_READ_VERSIONS = (1, 2, 3, 4, 5, 6, 7, 8)


@functools.lru_cache(maxsize=4096)
def _shared(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """One shared tuple for all adapters with the same values, which most of them have."""
    return values


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedRegistration:
    """The part of a registration that survives a restart; weights are read again when needed."""

    name: str
    uuid: str
    generation: int
    pinned: bool
    source: Source
    facts: AdapterFacts

    def to_json(self) -> bytes:
        fields: dict[str, Any] = {**dataclasses.asdict(self), "version": _VERSION}
        # The registration's own name field holds this already.
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
            raise ValueError(f"is not a registration of version {_VERSION} or earlier")
        try:
            source = Source(**_typed(Source, fields.pop("source")))
            if source.is_upload:
                source = dataclasses.replace(source, adapter=fields["name"])
            facts = AdapterFacts(**_typed(AdapterFacts, fields.pop("facts")))
            return cls(source=source, facts=facts, **_typed(cls, fields))
        except (KeyError, TypeError) as error:
            raise ValueError(f"is not a registration: {error}") from None


# Annotations are strings in this module, so these names identify the types.
_TYPES: Mapping[str, Any] = {"str": str, "int": int, "bool": bool}
_OPTIONAL = " | None"


def _typed(kind: Any, values: Any) -> dict[str, Any]:
    """The values, checked against the fields' types; lists become shared tuples.

    Raises:
        TypeError: They are no object, or one has another type.
    """
    if not isinstance(values, dict):
        raise TypeError("must be an object")
    types = {field.name: str(field.type) for field in dataclasses.fields(kind)}
    checked: dict[str, Any] = {}
    for name, value in values.items():
        wanted = types.get(name, "")
        if wanted.endswith(_OPTIONAL):
            wanted = "" if value is None else wanted.removesuffix(_OPTIONAL)
        if wanted in _TYPES and type(value) is not _TYPES[wanted]:
            raise TypeError(f"{name} must be of type {wanted}")
        if wanted.startswith("tuple"):
            item = _TYPES[wanted.removeprefix("tuple[").removesuffix(", ...]")]
            if not isinstance(value, list) or any(type(part) is not item for part in value):
                raise TypeError(f"{name} must be a list of {item.__name__}")
            value = _shared(tuple(value))
        elif name in ("method", "base_model", "chat_template") and isinstance(value, str):
            value = sys.intern(value)
        checked[name] = value
    return checked
