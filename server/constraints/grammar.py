"""Turns a constraint into the grammar that llguidance reads."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from turret.server.errors import InvalidRequestError
from turret.server.words import Text, say

ConstraintKind = Literal["json_schema", "json_object", "regex", "grammar", "choice"]

# Maximum length of a constraint, because compiling and following a constraint takes time and stack
# in proportion to its length.
MAX_CONSTRAINT_CHARS = 1 << 16
MAX_CHOICES = 1024


@dataclass(frozen=True, slots=True)
class ConstraintSpec:
    """A constraint as a client sends it.

    Attributes:
        kind: The kind of the constraint, which is also the name of its request field.
        texts: A schema, a regular expression, a grammar, or the texts to choose from.
    """

    kind: ConstraintKind
    texts: tuple[str, ...] = ()

    @property
    def num_chars(self) -> int:
        return sum(map(len, self.texts))

    @property
    def digest(self) -> bytes:
        """A digest of kind and texts: constraints with the same digest share one compiled form."""
        # Each answer to each prompt looks up its constraint, so do not loop over a thousand texts.
        lengths = ",".join(map(str, map(len, self.texts)))
        whole = f"{self.kind} {lengths} {''.join(self.texts)}"
        return hashlib.sha256(whole.encode()).digest()


# The functions below find the places in a JSON schema that llguidance rejects, because llguidance's
# message contains only the keyword.

# Keywords that hold a schema, a list of schemas, or schemas by name.
_ONE = frozenset(
    (
        *("items", "additionalItems", "additionalProperties", "contains", "propertyNames", "not"),
        *("if", "then", "else", "unevaluatedItems", "unevaluatedProperties"),
    )
)
_LISTED = frozenset(("allOf", "anyOf", "oneOf", "prefixItems", "items"))
_NAMED = frozenset(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"))
MAX_FAULTS = 20

_Finder = Callable[[str, Any], bool]


def schema_faults(schema: dict[str, Any], why: str) -> list[tuple[str, Text]]:
    """Find the places in a schema that llguidance's message ``why`` is about.

    Returns:
        Paths within the schema (``.properties.tags.uniqueItems``) and what is wrong with each;
        empty if the place is not known.
    """
    for pattern, kind in _COMPLAINTS:
        found = re.search(pattern, why)
        if found is None:
            continue
        is_at_fault, said = kind(found)
        places = (
            f"{path}.{key}"
            for path, part in _schemas(schema)
            for key, value in part.items()
            if is_at_fault(key, value)
        )
        return [(path, said) for path, _ in zip(places, range(MAX_FAULTS), strict=False)]
    return []


def _unsupported(found: re.Match[str]) -> tuple[_Finder, Text]:
    names = set(json.loads(found[1]))
    return lambda key, _: key in names, say("KEYWORD_UNSUPPORTED")


def _format(found: re.Match[str]) -> tuple[_Finder, Text]:
    name = found[1]
    said = say("FORMAT_UNSUPPORTED", value=name)
    return lambda key, value: key == "format" and value == name, said


def _reference(found: re.Match[str]) -> tuple[_Finder, Text]:
    target = found[1]

    def is_it(key: str, value: Any) -> bool:
        return key == "$ref" and isinstance(value, str) and value.endswith(target)

    return is_it, say("REFERENCE_UNKNOWN")


def _one_of(found: re.Match[str]) -> tuple[_Finder, Text]:
    return lambda key, _: key == "oneOf", say("ONE_OF_UNSUPPORTED")


def _pattern(found: re.Match[str]) -> tuple[_Finder, Text]:
    pattern, said = found[1], say("PATTERN_INVALID", problem=" ".join(found[2].split()))
    return lambda key, value: key == "pattern" and value == pattern, said


_COMPLAINTS: tuple[tuple[str, Callable[[re.Match[str]], tuple[_Finder, Text]]], ...] = (
    (r"Unimplemented keys: (\[.*\])", _unsupported),
    (r"Unknown format: (.*)", _format),
    (r"Pointer '(.*)' does not exist", _reference),
    (r"Resource '([^'#]*)", _reference),
    (r"oneOf constraints are not supported", _one_of),
    (r"regex parse error:\n    (.*)\n *\^+\nerror: (.*)", _pattern),
)


def _schemas(schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """A schema and all schemas in it, with their paths."""
    left = [("", schema)]
    while left:
        path, part = left.pop()
        if not isinstance(part, dict):
            continue
        yield path, part
        inner: list[tuple[str, Any]] = []
        for key, value in part.items():
            where = f"{path}.{key}"
            if key in _LISTED and isinstance(value, list):
                inner += [(f"{where}[{i}]", one) for i, one in enumerate(value)]
            elif key in _NAMED and isinstance(value, dict):
                inner += [(f"{where}.{name}", one) for name, one in value.items()]
            elif key in _ONE:
                inner.append((where, value))
        left += reversed(inner)


# Whitespace between the tokens of JSON. Its length is limited, because a model that has begun to
# write blanks may never stop.
WHITESPACE = r"[\x20\x0A\x0D\x09]{0,32}"
# Formats of Pydantic's schemas that describe the purpose of a string, not its form.
_NOTES = ("password", "binary", "path", "file-path", "directory-path")
_JSON_OPTIONS: Any = {
    "whitespace_flexible": True,
    "whitespace_pattern": WHITESPACE,
    "item_separator": ",",
    "key_separator": ":",
    "lenient": False,
}
_ANY_OBJECT = '{"type":"object"}'
_META = re.compile(r"([\\.+*?()|\[\]{}^$#&~/-])")
# A grammar that is added to the constraint's own, because its option applies to both.
_UNFORCED = {"name": "unforced", "lark_grammar": '%llguidance {"no_forcing": true}\nstart: "x"'}
# Matches a grammar that llguidance reads as Lark; it reads any other as GBNF. This expression and
# the next one match leading blanks on one line only. With ``\s*``, a search through many line
# breaks would take quadratic time, and no other thread could run meanwhile.
_LARK = re.compile(r"(?m)^[^\S\n]*(?:%llguidance\b|start\s*:)")
# Matches a rule of a Lark grammar, on one line, whose body is a JSON schema.
_SCHEMA_RULE = re.compile(r"(?m)^[^\S\n]*(\w+)\s*:\s*%json (\{.*\})\s*$")
# Extracts the regex error from llguidance's message, which quotes the grammar around it.
_REGEX_FAULT = re.compile(
    r"\nerror: (.+)|\(in regex\): (?!regex parse error)(.+?)(?: in regex|\n|$)"
)
# Lines that show where an error is; without their line breaks, they are unreadable.
_EXCERPT = re.compile(r"(?m)^ +(?:\d+ \|.*|\^)$")
# llguidance's messages repeat the whole grammar, so they are cut to this length.
MAX_FAULT_CHARS = 300


def any_of(texts: Iterable[str]) -> str:
    """A regular expression that matches exactly these texts."""
    escaped = "|".join(_META.sub(r"\\\1", text) for text in texts)
    return f"(?:{escaped})"


def grammar_of(spec: ConstraintSpec) -> str:
    """The grammar of a constraint. llguidance may still reject it.

    Raises:
        InvalidRequestError: The constraint cannot be read.
    """
    # Import llguidance only where it is used: the GPU benchmark runs without it.
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if spec.kind == "json_object":
        return LLMatcher.grammar_from_json_schema(_ANY_OBJECT, overrides=_JSON_OPTIONS)
    if spec.kind == "json_schema":
        return _schema_grammar(spec.texts[0])
    if spec.kind == "choice":
        # Use one alternation, because with a rule per choice the parser would follow all of them at
        # once.
        return LLMatcher.grammar_from_regex(any_of(spec.texts))
    if spec.kind == "regex":
        return LLMatcher.grammar_from_regex(spec.texts[0])
    text = spec.texts[0]
    try:
        return LLMatcher.grammar_from_lark(text if is_lark(text) else gbnf_to_lark(text))
    except Exception as error:
        # llguidance's converter is written in Python and may raise any exception.
        why = say("GRAMMAR_INVALID", problem=shortened(str(error)))
        raise InvalidRequestError.of("grammar", why) from None


def is_lark(text: str) -> bool:
    """Whether llguidance reads a grammar as Lark, and not as GBNF."""
    return _LARK.search(text) is not None


def unforced(grammar: str) -> str:
    """The same grammar, but forced text may be spelled with any tokens."""
    grammars: list[dict[str, Any]]
    try:
        grammars = json.loads(grammar)["grammars"]
    except ValueError:
        grammars = [{"name": "grammar", "lark_grammar": grammar}]
    return json.dumps({"grammars": [*grammars, _UNFORCED]})


def refusal(spec: ConstraintSpec, why: str) -> InvalidRequestError:
    """The error for a constraint that llguidance cannot compile; it lists the invalid parts."""
    faults: list[tuple[str, Text]] = []
    if spec.kind == "json_schema":
        faults = schema_faults(json.loads(spec.texts[0]), why)
    elif spec.kind == "grammar":
        faults = _rule_faults(spec.texts[0], why)
    elif spec.kind == "regex" and (said := _REGEX_FAULT.search(why)):
        faults = [("", say("PATTERN_INVALID", problem=shortened(said[1] or said[2])))]
    faults = faults or [("", say("CONSTRAINT_INVALID", problem=shortened(why)))]
    return InvalidRequestError.of_all([(f"{spec.kind}{path}", what) for path, what in faults])


def shortened(text: str) -> str:
    """A message on one line, without excerpts and the state of llguidance's parser."""
    text = " ".join(_EXCERPT.sub("", text.partition("<non-verbose/>")[0]).split())
    return text if len(text) <= MAX_FAULT_CHARS else text[:MAX_FAULT_CHARS] + "..."


def _rule_faults(text: str, why: str) -> list[tuple[str, Text]]:
    """``schema_faults`` for each rule that is a schema; paths begin with the rule's name."""
    faults: list[tuple[str, Text]] = []
    for rule, schema in _SCHEMA_RULE.findall(text):
        try:
            found = schema_faults(json.loads(schema), why)
            faults += [(f".{rule}{path}", what) for path, what in found]
        except (ValueError, RecursionError):
            continue
    return faults


def _schema_grammar(text: str) -> str:
    from llguidance import LLMatcher

    try:
        schema = json.loads(text)
        if not isinstance(schema, dict):
            raise InvalidRequestError.of("json_schema", say("NOT_A_JSON_OBJECT"))
        notes = [part for _, part in _schemas(schema) if part.get("format") in _NOTES]
        for part in notes:
            del part["format"]
        text = json.dumps(schema) if notes else text
        return LLMatcher.grammar_from_json_schema(text, overrides=_JSON_OPTIONS)
    # Python parses some input that llguidance rejects, such as NaN.
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError.of("json_schema", say("NOT_JSON", problem=error)) from None
