"""A chat template that an adapter brings."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from turret.server.adapters.facts import AdapterFacts

# Origins of a template that is not in the adapter's files: the caller sent it, or it is that of the
# members of a fusion.
REQUEST, MEMBERS = "request", "members"


@dataclass(frozen=True, slots=True)
class OwnTemplate:
    """A chat template that an adapter brings, with the special tokens that it writes.

    Attributes:
        origin: The file that contains it, ``REQUEST`` or ``MEMBERS``.
        templates: The template by its name, ``default``, and perhaps one for conversations with
            tools, ``tool_use``.
        tokens: Texts of special tokens by the template's variables, such as ``eos_token``; None for
            a token that the adapter's tokenizer lacks. The base's are used for the others.
    """

    origin: str
    templates: Mapping[str, str]
    tokens: Mapping[str, str | None] = field(default_factory=dict)

    def to_json(self) -> str:
        """The form that ``AdapterFacts.chat_template`` has."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> OwnTemplate:
        """Reads what ``to_json`` wrote."""
        return cls(**json.loads(text))


def template_of(mix: Iterable[AdapterFacts]) -> str:
    """The chat template for a mix: its first member's that brings one; empty for the base's."""
    return next((facts.chat_template for facts in mix if facts.chat_template), "")


@functools.lru_cache(maxsize=64)
def origin_of(chat_template: str) -> str:
    """Where ``AdapterFacts.chat_template`` comes from; empty if an adapter brings none."""
    return OwnTemplate.from_json(chat_template).origin if chat_template else ""
