"""Grammars, in llguidance's Lark, of answers that are calls of tools."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from turret.server.basics.channels import CHANNEL, FUNCTIONS, MARKS, MESSAGE
from turret.server.http.tools.forms import ARGUMENTS, CALL_ID, FORMS, Form
from turret.server.http.tools.schemas import json_rule
from turret.server.http.tools.xml_grammar import xml_call

_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}

Schema = Mapping[str, Any]


class CallsGrammar:
    """The grammar of answers that are nothing but calls.

    Args:
        form: How the model writes calls: a key of ``FORMS``.
        tools: Those that may be called, with their arguments' JSON schemas.
        is_parallel: Whether there may be several calls.
        marks: Special tokens that stand around calls, by their texts.
        has_call_ids: Whether a call has an id of the model's own.
    """

    def __init__(
        self,
        form: str,
        tools: Mapping[str, Schema],
        *,
        is_parallel: bool,
        marks: Mapping[str, int] | None = None,
        has_call_ids: bool = False,
    ) -> None:
        self._form = FORMS[form]
        self._tools = tools
        self._is_parallel = is_parallel
        self._marks = marks or {}
        self._has_call_ids = has_call_ids

    @property
    def is_object(self) -> bool:
        """Whether a call begins as any JSON object does, with nothing before it."""
        return self._form.is_bare and not self._form.is_list

    def alone(self) -> str:
        """A grammar for calls and nothing else.

        Raises:
            UnenforceableError: A tool's parameters cannot be kept to in this form.
        """
        return "\n".join(["start: calls", *self._rules()])

    def beside(self, answer: str) -> str:
        """A grammar for calls, or for an answer that matches a rule.

        Args:
            answer: The right side of the answer's rule; its first token is none of a call's.

        Raises:
            UnenforceableError: As ``alone``.
        """
        return "\n".join(["start: calls | answer", *self._rules(), f"answer: {answer}"])

    def schema_beside(self, answer: Schema) -> dict[str, Any]:
        """One call, or an answer that a JSON schema describes, where calls are JSON alone."""
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": name},
                    # The id makes references in each schema relative to that schema.
                    self._form.parameters: {"$id": f"urn:turret:arguments{index}", **schema},
                },
                "required": ["name", self._form.parameters],
                "additionalProperties": False,
            }
            for index, (name, schema) in enumerate(self._schemas())
        ]
        return {"anyOf": [{"$id": "urn:turret:answer", **answer}, *calls]}

    def places(self) -> dict[str, tuple[str, str]]:
        """By rule made from a schema: the tool, and the path within the schema of its arguments."""
        found: dict[str, tuple[str, str]] = {}
        for index, (name, schema) in enumerate(self._schemas()):
            if self._form.syntax != "xml":
                found[f"arguments{index}"] = name, ""
                continue
            properties = schema.get("properties")
            for number, key in enumerate(properties if isinstance(properties, dict) else ()):
                found[f"value{index}_{number}_json"] = name, f".properties.{key}"
        return found

    def _schemas(self) -> Iterator[tuple[str, Schema]]:
        for name, parameters in self._tools.items():
            yield name, parameters or _NO_ARGUMENTS

    def _rules(self) -> Iterator[str]:
        for index, (name, schema) in enumerate(self._schemas()):
            if self._form.syntax == "xml":
                yield from xml_call(index, name, schema)
            else:
                yield from self._call(index, name)
                yield f"arguments{index}: {json_rule(schema)}"
        yield "call: " + " | ".join(f"call{index}" for index in range(len(self._tools)))
        yield from _all_calls(self._form, self._mark, self._is_parallel)

    def _call(self, index: int, name: str) -> Iterator[str]:
        if self._form.syntax == "json":
            head = f'{{"name": {json.dumps(name)}, "{self._form.parameters}": '
            yield f'call{index}: {json.dumps(head)} arguments{index} "}}"'
            return
        if self._form.syntax == "channels":
            head = json.dumps(f"commentary to={FUNCTIONS}{name} ")
            kind = f'{self._mark("<|constrain|>")} "json" {self._mark(MESSAGE)}'
            yield f"call{index}: {self._mark(CHANNEL)} {head} {kind} arguments{index}"
            return
        call_id = f"{self._mark(CALL_ID)} /[a-zA-Z0-9]{{9}}/ " if self._has_call_ids else ""
        yield f"call{index}: {json.dumps(name)} {call_id}{self._mark(ARGUMENTS)} arguments{index}"

    def _mark(self, text: str) -> str:
        """A mark as a token of its own, where the model has one for it."""
        return f"<[{self._marks[text]}]>" if text in self._marks else json.dumps(text)


def _all_calls(form: Form, mark: Callable[[str], str], is_parallel: bool) -> Iterator[str]:
    """The rule ``calls``, of one or several ``call``."""
    if form.end:
        yield f'wrapped: {mark(form.begin)} "\\n" call "\\n" {mark(form.end)}'
        yield "calls: " + ('wrapped ("\\n" wrapped)*' if is_parallel else "wrapped")
    elif form.is_list:
        more = ' (", " call)*' if is_parallel else ""
        yield f'calls: {mark(form.begin)} "[" call{more} "]"'
    elif form.syntax == "channels":
        # When every mark is a special token, the free text of a thought cannot contain one.
        if all(mark(text).startswith("<") for text in MARKS):
            yield f'thought: {mark(CHANNEL)} "analysis" {mark(MESSAGE)} /(?s:.*)/ {mark("<|end|>")}'
            yield f'calls: (thought {mark("<|start|>")} "assistant")? call'
        else:
            yield "calls: call"
    elif form.syntax == "named":
        yield f"wrapped: {mark(form.begin)} call"
        yield "calls: " + ("wrapped+" if is_parallel else "wrapped")
    else:
        yield "calls: " + ('call ("; " call)*' if is_parallel else "call")
