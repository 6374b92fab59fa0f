"""A sentence made for people that still knows what it was made of.

Programs use ``reason`` and ``params``; nobody looks for words in the sentence. With
``PSEUDOLOCALE=rot13`` in the environment every sentence is unreadable, so that a test which
compares words fails.
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Callable, Mapping
from string import Formatter
from typing import Any

_IS_SCRAMBLED = os.environ.get("PSEUDOLOCALE") == "rot13"
# Reason of the text that ends a sentence with a suggestion.
SUGGESTION = "DID_YOU_MEAN"


class _Sentences(Formatter):
    """``str.format`` with a conversion ``!q``: text in double quotes, escaped to one line."""

    def convert_field(self, value: Any, conversion: Any) -> Any:
        if conversion == "q":
            text = json.dumps(value, ensure_ascii=False, default=str)
            # JSON leaves some line ends and control characters of Unicode as they are.
            return text if text.isprintable() else json.dumps(value, default=str)
        return super().convert_field(value, conversion)


class Text(str):
    """A sentence.

    Attributes:
        reason: Its key in the catalogue, an AIP-193 identifier.
        params: What was put into it.
    """

    reason: str
    params: Mapping[str, Any]

    @classmethod
    def of(cls, reason: str, template: str, params: Mapping[str, Any]) -> Text:
        shown = _scrambled(template) if _IS_SCRAMBLED else template
        made = cls(_Sentences().vformat(shown, (), params))
        made.reason, made.params = reason, params
        return made


def sayer(*catalogues: Mapping[str, str]) -> Callable[..., Text]:
    """The function that makes a text by its reason; ``closest`` adds a suggestion to it.

    Args:
        catalogues: Templates of ``str.format`` by their reasons.
    """
    templates = {reason: each[reason] for each in catalogues for reason in each}

    def say(reason: str, /, *, closest: str | None = None, **params: Any) -> Text:
        template = templates[reason]
        if closest is not None:
            template, params["closest"] = template + templates[SUGGESTION], closest
        return Text.of(reason, template, params)

    return say


def _scrambled(template: str) -> str:
    """The template with its words in rot13 and its fields as they are."""
    parts = []
    for words, name, form, conversion in Formatter().parse(template):
        parts.append(codecs.encode(words, "rot13").replace("{", "{{").replace("}", "}}"))
        if name is not None:
            spec = f":{form}" if form else ""
            parts.append(f"{{{name}{'!' + conversion if conversion else ''}{spec}}}")
    return "".join(parts)
