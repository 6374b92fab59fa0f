"""Adapters from which another adapter is built, identified by the digest of their content."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from turret.server.adapters.operators.adapter_operators import AdapterOperators
from turret.server.adapters.peft_format.config_rules import invalid, listed_twice
from turret.server.errors import AdapterComponentError
from turret.server.words import Text, say

# Config key that lists an adapter's components.
COMPONENTS_KEY = "components"
MIN_COMPONENTS, MAX_COMPONENTS = 2, 16
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FIELDS = {"name", "digest"}
_MAX_NAME_CHARS = 128


@dataclass(frozen=True, slots=True)
class ComponentRef:
    """A config's reference to one component.

    Attributes:
        name: The component's name in training, for messages.
        digest: SHA-256 over its config and weights, hex, which identifies it.
    """

    name: str
    digest: str


@dataclass(frozen=True, slots=True)
class Component:
    """A component that was found.

    Attributes:
        ref: The config's reference to it.
        method: The name of its method.
        operators: Its operators.
        ranks: Distinct ranks.
        scalings: The scaling that is folded into a module's ``b``, by module path; 1 for modules
            that are missing here.
    """

    ref: ComponentRef
    method: str
    operators: AdapterOperators
    ranks: tuple[int, ...]
    scalings: Mapping[str, float] = field(default_factory=dict)


FindComponent = Callable[[ComponentRef], Component]


def fault_of_components(value: Any) -> Text | None:
    """The fault in the value of ``components``, or None."""
    if not isinstance(value, list) or not MIN_COMPONENTS <= len(value) <= MAX_COMPONENTS:
        return invalid(value, f"a list of {MIN_COMPONENTS} to {MAX_COMPONENTS} components")
    for i, item in enumerate(value):
        if not isinstance(item, dict) or item.keys() != _FIELDS:
            return _entry(i, item, "an object with the keys name and digest alone")
        name, digest = item["name"], item["digest"]
        if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME_CHARS:
            return _entry(i, name, f"a name of 1 to {_MAX_NAME_CHARS} characters")
        if not isinstance(digest, str) or _DIGEST.fullmatch(digest) is None:
            return _entry(i, digest, "a SHA-256 in lower-case hex")
    return listed_twice([item["digest"] for item in value])


def _entry(index: int, value: Any, wanted: str) -> Text:
    return say("INVALID_ENTRY", entry=index, why=invalid(value, wanted))


def unfit(component: Component, why: str) -> Text:
    """The fault of a component that cannot be part of this adapter."""
    return say("UNFIT_COMPONENT", component=component.ref.name, method=component.method, why=why)


def component_refs(config: Mapping[str, Any]) -> tuple[ComponentRef, ...]:
    """The components that a config lists; empty if there are none or the list is malformed."""
    value = config.get(COMPONENTS_KEY)
    if value is None or fault_of_components(value) is not None:
        return ()
    return tuple(ComponentRef(item["name"], item["digest"]) for item in value)


def find_no_component(ref: ComponentRef) -> NoReturn:
    """Rejects every component, for checkpoints that are read without a registry.

    Raises:
        AdapterComponentError: Always.
    """
    text = say("COMPONENT_NOT_REGISTERED", component=ref.name, digest=ref.digest)
    raise AdapterComponentError(text, violations=[(COMPONENTS_KEY, text)])
