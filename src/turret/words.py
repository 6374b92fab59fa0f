"""Sentences for people, which keep the reason and the values from which they were made.

Programs use ``reason`` and ``params``, never the words of a sentence. With ``PSEUDOLOCALE=rot13``
in the environment, every sentence is unreadable, so that tests that compare words fail.
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
# Sentences about any field, value or file. All other sentences are in the catalogues of the
# packages.
TEXTS = {
    "DID_YOU_MEAN": "; did you mean {closest!q}?",
    # Fields.
    "UNKNOWN_FIELD": "unknown field",
    "REQUIRED": "is required",
    "NEEDS_FIELD": "requires {other}",
    "CONFLICTS_WITH": "cannot be combined with {other}",
    "EMPTY": "must not be empty",
    "DUPLICATE": "{value!q} is listed more than once",
    "SEVERAL_CONSTRAINTS": "only one of these constraints is allowed: {names}",
    # Values.
    "NOT_ONE_OF": "must be {choices!o}, not {value!q}",
    "NOT_IN_RANGE": "must be between {least!q:.30} and {most!q:.30}, not {value!q:.30}",
    "NOT_ABOVE": "must be greater than {bound}, not {value}",
    "TOO_SMALL": "must be at least {least}, not {value}",
    "TOO_LARGE": "must be at most {most}, not {value}",
    "TOO_MANY_CHARACTERS": "must have at most {most} characters, not {found}",
    "WRONG_TYPE": "must be {expected}, not {value}",
    "NOT_A_LIST": "must be a list, not {value}",
    "NOT_A_STRING": "must be a string, not {value}",
    "NOT_A_NUMBER": "must be a number, not {value}",
    "NOT_A_WHOLE_NUMBER": "must be an integer, not {value}",
    "NOT_TRUE_OR_FALSE": "must be true or false, not {value}",
    "NOT_A_JSON_OBJECT": "must be a JSON object",
    "NOT_JSON": "is not valid JSON: {problem}",
    # Files.
    "NOT_UTF8": "is not UTF-8",
    "FILE_UNREADABLE": "cannot read {path}: {why}",
    "PATH_UNUSABLE": "{path} {problem}",
    "FOLDER_MISSING": "{path} is not a directory",
}


def printable(text: str) -> str:
    """The text with control characters escaped, so that names in files cannot steer a terminal."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


class _Count(int):
    """A number whose format is the noun that it counts."""


class _Sentences(Formatter):
    """``str.format`` with four more conversions.

    ``!q`` is text in double quotes, escaped to one line. ``!b`` is a number of bytes with a unit.
    ``!n:token`` is a number of tokens, singular or plural. ``!o`` is one of several choices, or the
    only choice. Other floats have up to seven digits, as many as single precision has. Control
    characters in other values are escaped, except for line ends.
    """

    def format_field(self, value: Any, format_spec: str) -> str:
        if isinstance(value, _Count):
            return counted(value, format_spec)
        if isinstance(value, float) and not format_spec:
            format_spec = ".7g"
        return "\n".join(map(printable, super().format_field(value, format_spec).split("\n")))

    def convert_field(self, value: Any, conversion: Any) -> Any:
        if conversion == "q" and isinstance(value, float):
            return f"{value:.7g}"
        if conversion == "q":
            text = json.dumps(value, ensure_ascii=False, default=str)
            # JSON leaves some line ends and control characters of Unicode as they are.
            return text if text.isprintable() else json.dumps(value, default=str)
        if conversion == "b":
            return about_bytes(value)
        if conversion == "n":
            return _Count(value)
        if conversion == "o":
            return f"one of {value}" if ", " in value else f'"{value}"'
        return super().convert_field(value, conversion)


class Text(str):
    """A sentence.

    Attributes:
        reason: Its key in the catalogue, an AIP-193 identifier.
        params: The values in the sentence.
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
    """The function that makes a text by its reason; ``closest`` adds a suggestion.

    Args:
        catalogues: Templates for ``str.format`` by their reasons, in addition to those of this
            module.
    """
    templates = {reason: each[reason] for each in (TEXTS, *catalogues) for reason in each}

    def say(reason: str, /, *, closest: str | None = None, **params: Any) -> Text:
        template = templates[reason]
        if closest is not None:
            template, params["closest"] = template + templates[SUGGESTION], closest
        return Text.of(reason, template, params)

    return say


def counted(count: int, thing: str) -> str:
    """A count and its noun, such as ``2 tokens``; the plural of ``thing`` must end in an s."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def about_bytes(count: int) -> str:
    """A readable size with three digits and a binary unit: 707610 → ``691 KiB``."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    # Format 1010 with three digits, not as 1.01e+03.
    return f"{size:.0f} {unit}" if size >= 100 else f"{size:.3g} {unit}"


def _scrambled(template: str) -> str:
    """The template with its words in rot13 and its fields as they are."""
    parts = []
    for words, name, form, conversion in Formatter().parse(template):
        parts.append(codecs.encode(words, "rot13").replace("{", "{{").replace("}", "}}"))
        if name is not None:
            form = codecs.encode(form or "", "rot13") if conversion == "n" else form
            spec = f":{form}" if form else ""
            parts.append(f"{{{name}{'!' + conversion if conversion else ''}{spec}}}")
    return "".join(parts)
