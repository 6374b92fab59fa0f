"""Tool calls and reasoning: inputs of the template and the engine, and the parsing of answers."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from builders.bases.tiny_models import EOS, VOCAB_SIZE, tiny_tokenizer
from builders.constraints import compiled, make_tokenizer
from chats import encode_chat
from servers.answer_pieces import cut, put_together
from servers.fakes import knows_tools, saying
from servers.http_harness import TURNS, HttpHarness

from turret.server.errors import InvalidRequestError
from turret.server.http.tool_calls import AnswerReader, message_of
from turret.server.http.tool_grammar import CallsGrammar
from turret.server.models.tokenizer import Tokenizer

CHAT = "/v1/chat/completions"
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "tells the time"}}
NAMES: dict[str, dict[str, Any]] = {
    "weather": PARAMETERS,
    "clock": {},
    "mix": {
        "type": "object",
        "properties": {
            "text": {"type": "string"},
            "count": {"type": "integer"},
            "flag": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
            "either": {"type": ["string", "number"]},
            "things": {"$ref": "#/$defs/things"},
        },
        "$defs": {"things": {"type": "array", "items": {"type": "string"}}},
    },
}
# The form, the answer, its text, its calls.
ANSWERS: list[tuple[str, str, str, list[tuple[str, str]]]] = [
    ("hermes", "hi", "hi", []),
    (
        "hermes",
        'Sure.\n<tool_call>\n{"name": "weather", "arguments": {"city": "}<\\""}}\n</tool_call>\n'
        '<tool_call>\n{"arguments": {"b": [1]}, "name": "clock"}\n</tool_call>',
        "Sure.\n",
        [("weather", '{"city": "}<\\""}'), ("clock", '{"b": [1]}')],
    ),
    (
        "hermes",
        '<tool_call>{"name":"clock","arguments":{}}</tool_call> bye',
        "bye",
        [("clock", "{}")],
    ),
    ("hermes", "<tool_call>oops</tool_call>", "<tool_call>oops</tool_call>", []),
    (
        "hermes",
        '<tool_call>{"name": "rm", "arguments": {}}',
        '<tool_call>{"name": "rm", "arguments": {}}',
        [],
    ),
    ("hermes", "a <tool b", "a <tool b", []),
    ("hermes", '<tool_call>\n{"name": "clock", "arguments": {"a": "x', "", [("clock", '{"a": "x')]),
    ("hermes", '<tool_call>\n{"name": "clo', '<tool_call>\n{"name": "clo', []),
    ("hermes", '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_c', "", [("clock", "{}")]),
    ("llama3", "hi { there", "hi { there", []),
    ("llama3", '{"name": "clock", "parameters": {"a": 1}}', "", [("clock", '{"a": 1}')]),
    (
        "llama3",
        '<|python_tag|>{"name": "clock", "parameters": {}}; {"name": "weather", "parameters": {}}',
        "",
        [("clock", "{}"), ("weather", "{}")],
    ),
    (
        "llama3",
        ' {"type": "function", "name": "clock", "parameters": {"x": 1}}',
        "",
        [("clock", '{"x": 1}')],
    ),
    ("llama3", '{"a": 3} is JSON', '{"a": 3} is JSON', []),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "clock", "arguments": {"a": 1}},'
        ' {"name": "weather", "arguments": {}}]',
        "",
        [("clock", '{"a": 1}'), ("weather", "{}")],
    ),
    ("mistral", '[{"name": "clock", "arguments": {}}]', "", [("clock", "{}")]),
    ("mistral", "[1, 2]", "[1, 2]", []),
    ("mistral", "well [TO", "well [TO", []),
    ("mistral", "[TOOL_CALLS] nothing", "[TOOL_CALLS] nothing", []),
    (
        "mistral11",
        'So.[TOOL_CALLS]clock[ARGS]{"a": "}"}[TOOL_CALLS]weather[CALL_ID]123456789[ARGS]{}\n',
        "So.",
        [("clock", '{"a": "}"}'), ("weather", "{}")],
    ),
    ("mistral11", '[TOOL_CALLS]clock{"a": 1} bye', "bye", [("clock", '{"a": 1}')]),
    ("mistral11", "[TOOL_CALLS]rm[ARGS]{}", "[TOOL_CALLS]rm[ARGS]{}", []),
    ("mistral11", "[TOOL_CALLS]clock[ARGS]", "[TOOL_CALLS]clock[ARGS]", []),
    ("mistral11", "a [TOOL_CALLS] " + "b" * 300, "a [TOOL_CALLS] " + "b" * 300, []),
    ("mistral11", '[{"name": "clock"}]', '[{"name": "clock"}]', []),
    (
        "xml",
        "Sure.\n<tool_call>\n<function=mix>\n<parameter=text>\n<b>\n"
        'say "hi"\n</parameter>\n<parameter=count>\n3\n</parameter>\n<parameter=flag>\nTrue\n'
        "</parameter>\n</function>\n</tool_call>\n<tool_call><function=clock></function></tool_call>",
        "Sure.\n",
        [("mix", '{"text": "<b>\\nsay \\"hi\\"", "count": 3, "flag": true}'), ("clock", "{}")],
    ),
    (
        "xml",
        "<tool_call>\n<function=mix>\n<parameter=flag>None</parameter>\n<parameter=either>\n[1]\n"
        '</parameter>\n<parameter=things>\n["é"]\n</parameter>\n<parameter=new>\n7\n</parameter>'
        "\n</function>\n</tool_call> bye",
        "bye",
        [("mix", '{"flag": null, "either": "[1]", "things": ["é"], "new": "7"}')],
    ),
    ("xml", "<tool_call>\n<function=rm>\n", "<tool_call>\n<function=rm>\n", []),
    ("xml", "<tool_call>\n<func", "<tool_call>\n<func", []),
    ("xml", '<tool_call>{"name": "clock"}', '<tool_call>{"name": "clock"}', []),
    ("xml", "<tool_call><function=mix><parameter=text>a</param", "", [("mix", '{"text": "a')]),
    ("xml", "<tool_call><function=clock>oops", "oops", [("clock", "{}")]),
]


@pytest.mark.parametrize(("form", "text", "said", "calls"), ANSWERS)
def test_calls_are_found_however_the_text_is_split(
    form: str, text: str, said: str, calls: list[tuple[str, str]]
) -> None:
    rng = random.Random(0)
    for parts in ([text], list(text), *(cut(text, rng) for _ in range(30))):
        assert put_together(AnswerReader(form, NAMES), parts) == ("", said, calls), parts
    message = message_of(AnswerReader(form, NAMES), text)
    assert message["content"] == (said or None if calls else said)
    assert [c["function"]["name"] for c in message.get("tool_calls", [])] == [n for n, _ in calls]
    first = message_of(AnswerReader(form, NAMES, is_parallel=False), text)
    assert len(first.get("tool_calls", [])) == min(len(calls), 1)


@pytest.mark.parametrize(
    ("text", "is_open", "thought", "said"),
    [
        ("<think>\nab\n</think>\n\nhi", False, "\nab\n", "hi"),
        ("hi <think>x</think>", False, "", "hi <think>x</think>"),
        ("ab</think>\n\nyes", True, "ab", "yes"),
        (" <thi", False, "", " <thi"),
        ("<think>a</thin", False, "a</thin", ""),
        ("  x", False, "", "  x"),
    ],
)
def test_reasoning_is_separated_from_the_text(
    text: str, is_open: bool, thought: str, said: str
) -> None:
    def reader() -> AnswerReader:
        return AnswerReader("hermes", NAMES, has_reasoning=True, is_open=is_open)

    for parts in ([text], list(text)):
        assert put_together(reader(), parts) == (thought, said, [])
    call = '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'
    if said == "hi":
        assert put_together(reader(), list(text + call))[1:] == ("hi", [("clock", "{}")])


@pytest.mark.parametrize("form", ["hermes", "llama3", "mistral", "mistral11", "xml"])
def test_the_parser_reads_forced_calls(form: str) -> None:
    parameters = {"weather": PARAMETERS, "clock": {}}
    tokenizer = make_tokenizer()
    for is_parallel in (True, False):
        grammar = CallsGrammar(form, parameters, is_parallel=is_parallel, has_call_ids=is_parallel)
        constraint = compiled("grammar", grammar.alone())
        rng, counts = random.Random(1), set()
        for _ in range(12):
            matcher, answer = constraint.matcher(), []
            while len(answer) < 400:
                words = matcher.mask()
                allowed = [t for t in range(VOCAB_SIZE) if int(words[t // 32]) >> (t % 32) & 1]
                if allowed == [EOS] or (EOS in allowed and rng.random() < 0.5):
                    break
                blanks = {*tokenizer.encode(" \n\t\r"), EOS}
                answer.append(rng.choice([t for t in allowed if t not in blanks] or allowed))
                matcher.advance(answer[-1])
            _, said, calls = put_together(AnswerReader(form, NAMES), [tokenizer.decode(answer)])
            assert (said.strip(), bool(calls)) == ("", True)
            counts.add(len(calls))
            for name, arguments in calls:
                city = json.loads(arguments).get("city")
                assert city in ("Oslo", "Rome") if name == "weather" else arguments == "{}"
        assert (max(counts) > 1) is is_parallel


def test_the_template_gets_tools_and_calls_and_no_special_tokens() -> None:
    inner: Any = tiny_tokenizer()
    inner.chat_template = (
        "{% for t in tools %}{{ t | tojson }}<tool_call>{% endfor %}{% for m in messages %}"
        "{{ m.role }}:{{ m.content }}{{ m.tool_call_id }}{% for c in m.tool_calls %}"
        "{{ c.function.arguments.city }}{% endfor %}{% endfor %}<bos>"
    )
    tokenizer = Tokenizer(inner, frozenset({EOS}), VOCAB_SIZE)
    function = {"name": "f", "arguments": {"city": "Oslo<eos>"}}
    turns = [
        {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": function}]},
        {"role": "tool", "content": "r<eos>", "tool_call_id": "1"},
    ]
    ids = encode_chat(tokenizer, turns, [{"description": "<eos>"}])
    assert EOS not in ids
    text = '{"description": "<eos>"}<tool_call>assistant:Oslo<eos>tool:r<eos>1<bos>'
    assert tokenizer.decode(ids, special=True) == text
    deep: Any = {}
    for _ in range(3000):
        deep = {"a": deep}
    with pytest.raises(InvalidRequestError, match="recursion"):
        encode_chat(tokenizer, TURNS, [deep])
    inner.chat_template = "{{ messages }}"
    plain = Tokenizer(inner, frozenset({EOS}), VOCAB_SIZE)
    for messages, tools, path in ((TURNS, [{}], "chat.tools"), (turns, [], "chat.messages")):
        with pytest.raises(InvalidRequestError) as refused:
            encode_chat(plain, messages, tools)
        ((found, why),) = refused.value.violations
        assert (found, getattr(why, "reason", None)) == (path, "TOOLS_UNSUPPORTED")


async def answered(server: HttpHarness, **body: Any) -> dict[str, Any]:
    answer = await server.post(CHAT, {"model": "base", "messages": TURNS, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


async def test_a_conversation_with_tools(
    monkeypatch: pytest.MonkeyPatch, http: HttpHarness
) -> None:
    rendered = knows_tools(monkeypatch, has_reasoning=True)
    call = {
        "id": "a1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
    }
    turns = [
        *TURNS,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a1", "content": "sunny"},
    ]
    text = '<think>hm</think>Well. <tool_call>{"name": "clock", "arguments": {}}</tool_call>'
    http.engine.script = saying(*text)
    choice = await answered(http, messages=turns, tools=[WEATHER, CLOCK])
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm", "Well. ")
    (made,) = message["tool_calls"]
    assert made["function"] == {"name": "clock", "arguments": "{}"}
    assert (made["type"], len(made["id"]) > 5) == ("function", True)
    messages, tools, _ = rendered[0]
    function = {"name": "weather", "arguments": {"city": "Oslo"}}
    assert messages[1]["tool_calls"] == [{**call, "function": function}]
    assert messages[2] == {"role": "tool", "content": "sunny", "tool_call_id": "a1"}
    assert [tool["function"]["name"] for tool in tools] == ["weather", "clock"]
    assert tools[0]["function"]["parameters"] == PARAMETERS
    # Calls are not forced, and with "none" the model does not see the tools.
    assert http.engine.requests[-1].constraint is None
    choice = await answered(http, tools=[CLOCK], tool_choice="none")
    assert "tool_calls" not in choice["message"]
    assert choice["finish_reason"] == "stop"
    assert rendered[-1][1] == []
    for choice_sent, names in (
        ("required", {"weather", "clock"}),
        ({"type": "function", "function": {"name": "clock"}}, {"clock"}),
    ):
        await answered(http, tools=[WEATHER, CLOCK], tool_choice=choice_sent)
        spec: Any = http.engine.requests[-1].constraint
        assert spec.kind == "grammar"
        assert {name for name in NAMES if json.dumps(name)[1:-1] in spec.texts[0]} == names
