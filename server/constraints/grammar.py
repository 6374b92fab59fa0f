"""From a constraint to the grammar that llguidance reads."""

from __future__ import annotations

import json
import re
from typing import Any

from turret.server.constraints.schema import schema_faults
from turret.server.constraints.spec import ConstraintSpec
from turret.server.errors import InvalidRequestError

# Between the tokens of JSON. Bounded: a model that has begun to write blanks may never stop.
WHITESPACE = r"[\x20\x0A\x0D\x09]{0,32}"
_JSON_OPTIONS: Any = {
    "whitespace_flexible": True,
    "whitespace_pattern": WHITESPACE,
    "item_separator": ",",
    "key_separator": ":",
    "lenient": False,
}
_ANY_OBJECT = '{"type":"object"}'
_META = re.compile(r"([\\.+*?()|\[\]{}^$#&~/-])")
# A grammar beside another one that is set for both.
_UNFORCED = {"name": "unforced", "lark_grammar": '%llguidance {"no_forcing": true}\nstart: "x"'}
# A rule of a grammar in Lark, on a line of its own, that is JSON of a schema.
_SCHEMA_RULE = re.compile(r"(?m)^\s*(\w+)\s*:\s*%json (\{.*\})\s*$")
# Extracts the regex error from llguidance's message, which quotes the grammar around it.
_REGEX_FAULT = re.compile(
    r"\nerror: (.+)|\(in regex\): (?!regex parse error)(.+?)(?: in regex|\n|$)"
)
# A complaint repeats the grammar that it is about.
MAX_FAULT_CHARS = 300


def grammar_of(spec: ConstraintSpec) -> str:
    """The grammar of a constraint, not yet checked but for its form.

    Raises:
        InvalidRequestError: It cannot be read.
    """
    # Imported where they are used: the GPU benchmark runs steps where llguidance is not installed.
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    if spec.kind == "json_object":
        return LLMatcher.grammar_from_json_schema(_ANY_OBJECT, overrides=_JSON_OPTIONS)
    if spec.kind == "json_schema":
        return _schema_grammar(spec.texts[0])
    if spec.kind == "choice":
        # One alternation: a rule per choice would make the parser follow all of them at once.
        texts = "|".join(_META.sub(r"\\\1", text) for text in spec.texts)
        return LLMatcher.grammar_from_regex(f"(?:{texts})")
    if spec.kind == "regex":
        return LLMatcher.grammar_from_regex(spec.texts[0])
    try:
        return LLMatcher.grammar_from_lark(any_to_lark(spec.texts[0]))
    except Exception as error:
        # A parser of its own, in Python, which raises what it likes.
        why = f"is neither Lark nor GBNF: {shortened(str(error))}"
        raise InvalidRequestError.of("grammar", why) from None


def unforced(grammar: str) -> str:
    """The same grammar, for which any tokens that spell a text that must come may come."""
    grammars: list[dict[str, Any]]
    try:
        grammars = json.loads(grammar)["grammars"]
    except ValueError:
        grammars = [{"name": "grammar", "lark_grammar": grammar}]
    return json.dumps({"grammars": [*grammars, _UNFORCED]})


def refusal(spec: ConstraintSpec, why: str) -> InvalidRequestError:
    """A constraint that llguidance does not compile, with the parts that are to blame."""
    faults = []
    if spec.kind == "json_schema":
        faults = schema_faults(json.loads(spec.texts[0]), why)
    elif spec.kind == "grammar":
        faults = _rule_faults(spec.texts[0], why)
    elif spec.kind == "regex" and (said := _REGEX_FAULT.search(why)):
        faults = [("", shortened(said[1] or said[2]))]
    faults = [(f"{spec.kind}{path}", what) for path, what in faults]
    faults = faults or [(spec.kind, shortened(why))]
    message = "; ".join(f"{path}: {what}" for path, what in faults)
    return InvalidRequestError(message, violations=faults)


def shortened(text: str) -> str:
    """A fault on one line, without the state of llguidance's parser."""
    text = " ".join(text.partition("<non-verbose/>")[0].split())
    return text if len(text) <= MAX_FAULT_CHARS else text[:MAX_FAULT_CHARS] + "..."


def _rule_faults(text: str, why: str) -> list[tuple[str, str]]:
    """As ``schema_faults``, of the rules that are a schema; the rule's name begins the path."""
    faults: list[tuple[str, str]] = []
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
            raise InvalidRequestError.of("json_schema", "must be an object")
        return LLMatcher.grammar_from_json_schema(text, overrides=_JSON_OPTIONS)
    # llguidance refuses some of what Python reads, such as NaN.
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError.of("json_schema", f"is no JSON: {error}") from None
