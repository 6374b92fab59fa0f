"""Grammars of calls: alongside constraints, with marks that are tokens, and rejections."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from builders.bases.tiny_models import EOS, tiny_tokenizer
from builders.constraints import compiled, is_followed, make_tokenizer
from servers.fakes import knows_tools, saying
from servers.http_harness import TURNS, HttpHarness

from turret.server.constraints.compiler import ConstraintCompiler
from turret.server.constraints.grammar import MAX_CONSTRAINT_CHARS, ConstraintSpec
from turret.server.constraints.matcher import Constraint
from turret.server.engine.scheduling.request import FinishReason
from turret.server.errors import InvalidRequestError
from turret.server.http import choices
from turret.server.http.fields import closed
from turret.server.http.tool_calls import (
    AnswerReader,
    CallBegun,
    CallGrown,
    UnenforceableError,
    kinds_of,
)
from turret.server.http.tool_grammar import CallsGrammar
from turret.server.models.tokenizer import Tokenizer

CHAT = "/v1/chat/completions"
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
ASKED: dict[str, Any] = {"model": "base", "messages": TURNS, "tools": [TOOL]}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "kids": {"type": "array", "items": {"$ref": "#"}}},
    "required": ["name"],
    "additionalProperties": False,
}
CALLS = {
    "hermes": '<tool_call>\n{"name": "weather", "arguments": {"city": "CITY"}}\n</tool_call>',
    "xml": "<tool_call>\n<function=weather>\n<parameter=city>\nCITY\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
    "llama3": '{"name": "weather", "parameters": {"city": "CITY"}}',
    "mistral": '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "CITY"}}]',
    "mistral11": '[TOOL_CALLS]weather[ARGS]{"city": "CITY"}',
    "harmony": "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
    '{"city": "CITY"}',
}
# A field, its value, allowed answers, and forbidden answers.
CONSTRAINTS: list[tuple[str, Any, list[str], list[str]]] = [
    (
        "guided_json",
        SCHEMA,
        ['{"name": "x", "kids": [{"name": "weather"}]}', '{"name":"weather"}'],
        ['{"name": 3}', '{"name": "x", "kids": [{}]}', "[]", "hi"],
    ),
    ("guided_json_object", True, ['{"city": "Rome"}', "{}"], ["[1]", "hi"]),
    ("guided_regex", "a/b\\/[\\n]+c", ["a/b/\nc"], ["a/b", "hi"]),
    ("guided_choice", ["yes/no", "a\nb", "(x)"], ["yes/no", "a\nb", "(x)"], ["no", "x"]),
    ("guided_grammar", 'start: B "}"\nB: /b{2,3}/', ["bbb}"], ["b}", "hi"]),
]


@pytest.fixture
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The form in which the simulated tokenizer's template calls tools."""
    knows_tools(monkeypatch, request.param, has_channels=request.param == "harmony")
    return request.param


async def asked(http: HttpHarness, **body: Any) -> tuple[dict[str, Any], Any]:
    """The returned choice, and the engine's constraint."""
    answer = await http.post(CHAT, ASKED | body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0], http.engine.requests[-1].constraint


@pytest.mark.parametrize("form", CALLS, indirect=True)
@pytest.mark.parametrize(("field", "value", "good", "bad"), CONSTRAINTS)
async def test_an_answer_is_calls_or_what_a_constraint_allows(
    form: str, field: str, value: Any, good: list[str], bad: list[str], http: HttpHarness
) -> None:
    tokenizer = make_tokenizer()
    call = CALLS[form].replace("CITY", "Oslo")
    http.engine.script = saying(call)
    choice, spec = await asked(http, **{field: value})
    (made,) = choice["message"]["tool_calls"]
    assert json.loads(made["function"]["arguments"])["city"] == "Oslo"
    http.engine.script = saying(good[0])
    choice, _ = await asked(http, **{field: value})
    assert choice["message"]["content"] == good[0]
    _, forced = await asked(http, tool_choice="required", **{field: value})
    both = compiled(spec.kind, *spec.texts)
    for text in (call, *good):
        assert is_followed(both, tokenizer.encode(text)), text
    # guided_json_object allows any object, even one in the form of Llama 3's calls.
    wrong = CALLS[form].replace("CITY", "Bonn")
    no_call = [] if field == "guided_json_object" and form == "llama3" else [wrong]
    for text in (*bad, *no_call):
        assert not is_followed(both, tokenizer.encode(text)), text
    # A forced call allows nothing else.
    calls = compiled(forced.kind, *forced.texts)
    assert is_followed(calls, tokenizer.encode(call))
    assert not is_followed(calls, tokenizer.encode(wrong))
    assert not is_followed(calls, tokenizer.encode(good[0]))


@pytest.mark.parametrize("form", ["hermes", "llama3"], indirect=True)
async def test_an_unenforceable_schema_is_rejected_with_its_path(
    form: str, http: HttpHarness
) -> None:
    parameters = {**PARAMETERS, "properties": {"city": {"type": "string", "not": {}}}}
    broken = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    for tools, schema, path in (
        ([TOOL, broken], SCHEMA, "tools[1].function.parameters.properties.city.not"),
        ([TOOL], {"type": "object", "if": {}}, "guided_json.if"),
    ):
        _, spec = await asked(http, tools=tools, guided_json=schema)
        with pytest.raises(InvalidRequestError) as refused:
            compiled(spec.kind, *spec.texts)
        assert refused.value.violations
        http.engine.refuse = refused.value
        body = {"tools": tools, "guided_json": schema}
        assert (await http.refused(CHAT, ASKED | body)).param == path
        http.engine.refuse = None


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ({"anyOf": [{}]}, ".anyOf"),
        ({"properties": 3}, ".properties"),
        ({"required": ["a"]}, ".required"),
        ({"required": 3}, ".required"),
        ({"required": [[]]}, ".required"),
        ({"properties": {"a": {"type": "string", "anyOf": 3}}}, ".properties.a.anyOf"),
        ({"properties": {"a": {"type": "string", "oneOf": [3]}}}, ".properties.a.oneOf"),
        ({"properties": {"a": True}}, ".properties.a"),
        ({"properties": {"a>": {}}}, ".properties.a>"),
        ({"properties": {"a": {"type": "string", "pattern": "x"}}}, ".properties.a.pattern"),
        ({"properties": {"a": {"minLength": "x"}}}, ".properties.a"),
        ({"properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"$ref": "#/$defs/a"}}},
         ".properties.a.$ref"),
        ({"properties": {"a": {"$ref": "#/$defs/b"}}}, ".properties.a.$ref"),
        ({"properties": {"a": {"type": "array", "items": {"$ref": "#"}}}}, ".properties.a"),
        ({"properties": {"a": {"anyOf": [{"type": "string", "enum": ["x"]}, {"type": "null"}]}}},
         ".properties.a.anyOf[0]"),
    ],
)  # fmt: skip
def test_schemas_that_xml_cannot_express_are_rejected(schema: dict[str, Any], path: str) -> None:
    with pytest.raises(UnenforceableError) as refused:
        CallsGrammar("xml", {"f": schema}, is_parallel=True).alone()
    assert (refused.value.tool, refused.value.path) == ("f", path)


def test_any_schema_becomes_a_grammar_or_is_refused() -> None:
    rng = random.Random(0)
    words = ["type", "enum", "const", "anyOf", "oneOf", "$ref", "properties", "required"]
    words += ["minLength", "maxLength", "$defs", "items", "string", "integer", "#"]
    words += ["#/$defs/type", "a"]

    def anything(depth: int) -> Any:
        kind = rng.randrange(7 if depth else 4)
        if kind < 2:
            return rng.choice(words)
        if kind < 4:
            return rng.choice([None, True, -1, 2.5, 10**30])
        several = [anything(depth - 1) for _ in range(rng.randrange(4))]
        return several if kind == 4 else {rng.choice(words): one for one in several}

    made = 0
    for _ in range(3000):
        schema = {rng.choice(words): anything(3) for _ in range(4)}
        for form in CALLS:
            grammar = CallsGrammar(form, {"f": schema}, is_parallel=True)
            try:
                places = grammar.places()
                made += len(grammar.alone()) > 0
                assert all(tool == "f" for tool, _ in places.values())
            except UnenforceableError:
                pass
        reader = AnswerReader("xml", {"f": schema})
        call = "<tool_call><function=f><parameter=type>3</parameter></function></tool_call>"
        begun, *grown = reader.feed(call)
        assert isinstance(begun, CallBegun)
        arguments = "".join(piece.text for piece in grown if isinstance(piece, CallGrown))
        assert json.loads(arguments)["type"] in (3, "3")
    assert made > 12000


def test_alternatives_in_xml_take_a_bounded_number_of_steps() -> None:
    # Each alternative refers to all of them, so following each one anew would never end.
    circle = {"anyOf": [{"$ref": "#/properties/a"}] * 2000}
    numbers = {"anyOf": [{"type": "integer"}, {"$ref": "#/properties/b"}, {"type": "null"}]}
    long = {"$ref": "#" + "/a" * 10_000}
    schema = {"properties": {"a": circle, "b": numbers, "c": long}}
    for name, kinds in (("a", {"string"}), ("b", {"number", "null"}), ("c", {"string"})):
        assert kinds_of(schema["properties"][name], schema) == kinds
    with pytest.raises(UnenforceableError) as refused:
        CallsGrammar("xml", {"f": schema}, is_parallel=True).alone()
    assert refused.value.path == ".properties.a.anyOf"
    pieces = AnswerReader("xml", {"f": schema}).feed("<tool_call><function=f><parameter=a>3")
    assert isinstance(pieces[0], CallBegun)


@pytest.mark.parametrize("answer", ["", '"x"'])
def test_a_grammar_ends_soon_after_the_limit(answer: str) -> None:
    parameters = {f"a{number}": {"type": "number"} for number in range(1000)}
    schema = {"properties": parameters, "$defs": {"d": {"const": "x" * 30_000}}}
    grammar = CallsGrammar("xml", {"f": schema}, is_parallel=True)
    text = grammar.beside(answer) if answer else grammar.alone()
    # The complete grammar would have 30 million characters.
    assert MAX_CONSTRAINT_CHARS < len(text) < 2 * MAX_CONSTRAINT_CHARS


@pytest.mark.parametrize("form", ["hermes"], indirect=True)
@pytest.mark.parametrize(
    "field", ["guided_grammar", "guided_regex", "guided_choice", "guided_json"]
)
async def test_a_constraint_that_is_too_long_is_not_read_beside_tools(
    form: str, field: str, monkeypatch: pytest.MonkeyPatch, http: HttpHarness
) -> None:
    def read(*_: Any) -> str:
        raise AssertionError("it was read")

    monkeypatch.setattr(choices, "constrained", read)
    long = "\n" * (MAX_CONSTRAINT_CHARS + 1)
    value = [long] if field == "guided_choice" else long
    refused = await http.refused(CHAT, ASKED | {field: value})
    assert (refused.param, refused.status) == (field, 400)


@pytest.mark.parametrize("form", ["xml", "llama3"], indirect=True)
async def test_deep_schemas_are_refused(form: str, http: HttpHarness) -> None:
    for depth in (100, 900, 990, 3000):
        deep = '{"not":' * depth + "{}" + "}" * depth
        answer = await http.post(CHAT, ASKED | {"guided_json": deep})
        assert answer.status_code in (200, 400), answer.text


@pytest.mark.parametrize("form", ["xml"], indirect=True)
async def test_a_refusal_names_the_parameter(form: str, http: HttpHarness) -> None:
    parameters = {"properties": {"a": {"type": "string", "format": "date"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    refused = await http.refused(CHAT, ASKED | {"tools": [tool], "tool_choice": "required"})
    assert refused.param == "tools[0].function.parameters.properties.a.format"


@pytest.mark.parametrize("ignored", [None, 5, "abc"])
def test_an_enum_that_is_no_list_leaves_the_const(ignored: Any) -> None:
    schema = {"properties": {"x": {"const": 1, "enum": ignored}}, "required": ["x"]}
    grammar = CallsGrammar("xml", {"f": schema}, is_parallel=False).alone()
    assert '"1' in grammar
    assert kinds_of(schema["properties"]["x"], schema) == {"number"}


def test_values_in_xml_follow_the_schema() -> None:
    schema = {
        "properties": {
            "text": {"type": "string", "maxLength": 3},
            "kind": {"enum": ["a b", 3, None]},
            "list": {"type": "array", "items": {"$ref": "#/$defs/n"}},
            "may": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        },
        "required": ["kind"],
        "$defs": {"n": {"type": "integer"}},
    }
    grammar = CallsGrammar("xml", {"f": schema}, is_parallel=False).alone()
    tokenizer, constraint = make_tokenizer(), compiled("grammar", grammar)

    def fits(**values: str) -> bool:
        inside = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in values.items())
        text = f"<tool_call>\n<function=f>\n{inside}</function>\n</tool_call>"
        return is_followed(constraint, tokenizer.encode(text))

    assert fits(kind="a b")
    assert fits(text="é\n", kind="3", list="[1, 2]", may="any <b>")
    assert fits(kind="null", may="")
    assert not fits(text="a")
    assert not fits(kind="b")
    assert not fits(text="long", kind="3")
    assert not fits(kind="3", list='["x"]')
    assert not fits(kind="3", text="a")


def with_marks() -> tuple[Tokenizer, Constraint]:
    """A tokenizer with Mistral's marks as special tokens, which calls must use."""
    inner: Any = tiny_tokenizer()
    inner.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]", "[ARGS]"]})
    inner.chat_template = "{% for t in tools %}[TOOL_CALLS]f[ARGS]{% endfor %}"
    tokenizer = Tokenizer(inner, frozenset({EOS}), 260)
    assert tokenizer.chat_format.marks == {"[TOOL_CALLS]": 258, "[ARGS]": 259}
    tools = {"weather": PARAMETERS}
    marks = tokenizer.chat_format.marks
    grammar = CallsGrammar("mistral11", tools, is_parallel=True, marks=marks).alone()
    compiler = ConstraintCompiler(tokenizer)
    try:
        return tokenizer, compiler._compile(ConstraintSpec("grammar", (grammar,)))
    finally:
        compiler.close()


def test_marks_are_tokens_if_the_model_has_them() -> None:
    tokenizer, constraint = with_marks()
    arguments = tokenizer.encode('{"city": "Rome"}')
    name = tokenizer.encode("weather")
    call = [258, *name, 259, *arguments]
    assert is_followed(constraint, call)
    assert is_followed(constraint, call * 2)
    assert not is_followed(constraint, tokenizer.encode("[TOOL")[:1])
    for shows, text in (
        (True, '[TOOL_CALLS]weather[ARGS]{"city": "Rome"}'),
        (False, 'weather{"city": "Rome"}'),
    ):
        stream = tokenizer.stream(shows)
        # The text never includes the end token.
        assert "".join(stream.push(token) for token in [*call, EOS]) == text


OBJECT: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}}
CLOSED = {**OBJECT, "additionalProperties": False}
PLAIN_TOOL = {"type": "function", "function": {"name": "f", "parameters": OBJECT}}
FORCED: dict[str, Any] = {
    "model": "base",
    "messages": [{"role": "user", "content": "hi"}],
    "tools": [PLAIN_TOOL],
    "tool_choice": "required",
}


@pytest.fixture(autouse=True)
def _knows_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    knows_tools(monkeypatch)


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (OBJECT, CLOSED),
        ({"type": "object"}, {"type": "object"}),
        ({**OBJECT, "additionalProperties": True}, {**OBJECT, "additionalProperties": True}),
        ({"anyOf": [OBJECT, {"type": "null"}]}, {"anyOf": [CLOSED, {"type": "null"}]}),
        ({"type": "array", "items": OBJECT}, {"type": "array", "items": CLOSED}),
        (
            {"$defs": {"A": OBJECT}, "properties": {"properties": {"$ref": "#/$defs/A"}}},
            {
                "$defs": {"A": CLOSED},
                "properties": {"properties": {"$ref": "#/$defs/A"}},
                "additionalProperties": False,
            },
        ),
        ({"enum": [OBJECT]}, {"enum": [OBJECT]}),
        ({"allOf": [OBJECT, OBJECT]}, {"allOf": [OBJECT, OBJECT]}),
        ({**OBJECT, "anyOf": [OBJECT]}, {**OBJECT, "anyOf": [OBJECT]}),
    ],
)
def test_schemas_of_objects_are_closed_unless_they_are_shared(schema: Any, expected: Any) -> None:
    assert closed(schema) == expected


async def test_only_openais_fields_close_objects(http: HttpHarness) -> None:
    schema = {"name": "a", "schema": OBJECT}
    asked = {"model": "base", "messages": FORCED["messages"]}
    for more in (
        {"response_format": {"type": "json_schema", "json_schema": schema}},
        {"guided_json": OBJECT},
    ):
        assert (await http.post("/v1/chat/completions", asked | more)).status_code == 200
    given = [json.loads(each.constraint.texts[0]) for each in http.engine.requests]  # type: ignore[union-attr]
    assert given == [CLOSED, OBJECT]


async def test_a_truncated_forced_call_is_not_returned_as_text(http: HttpHarness) -> None:
    http.engine.script = saying('<tool_call>\n{"name": "', "", reason=FinishReason.LENGTH)
    whole = (await http.post("/v1/chat/completions", FORCED)).json()["choices"][0]
    events = await http.events("/v1/chat/completions", FORCED | {"stream": True})
    free = FORCED | {"tool_choice": "auto"}
    text = (await http.post("/v1/chat/completions", free)).json()["choices"][0]
    assert (whole["finish_reason"], whole["message"]["content"]) == ("length", "")
    assert not any(event["choices"][0]["delta"].get("content") for event in events[:-1])
    assert text["message"]["content"].startswith("<tool_call>")


@pytest.mark.parametrize(("is_parallel", "is_one"), [(None, True), (True, False), (False, True)])
async def test_only_one_call_is_forced_by_default(
    is_parallel: bool | None, is_one: bool, http: HttpHarness
) -> None:
    asked = FORCED | {"parallel_tool_calls": is_parallel}
    assert (await http.post("/v1/chat/completions", asked)).status_code == 200
    rules = http.engine.requests[0].constraint.texts[0].splitlines()  # type: ignore[union-attr]
    assert ("calls: wrapped" in rules) is is_one
