"""Answers in gpt-oss' channels: reasoning is never part of the text, over both protocols."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders.bases import tiny_tokenizers
from builders.constraints import compiled, is_followed, make_tokenizer
from servers.answer_pieces import put_together
from servers.fakes import FakeFuser, FakeMerger, FakeVocabularies, fake_backend, finish
from servers.http_harness import TURNS, HttpHarness, http_harness
from servers.rpc_harness import harness

from turret.server.api.vocabularies import Vocabulary
from turret.server.constraints.compiler import ConstraintCompiler
from turret.server.constraints.grammar import ConstraintSpec
from turret.server.engine.scheduling.request import Output, Request
from turret.server.http.tool_calls import AnswerReader
from turret.server.http.tool_grammar import CallsGrammar
from turret.server.models.loader import eos_token_ids
from turret.server.models.tokenizer import RenderedChat, Tokenizer
from turret.v1 import inference_pb2

VOCAB_SIZE = 400
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
THOUGHT = "<|channel|>analysis<|message|>Hm. <b>\n<|end|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>Hi, é!"
CALL = '<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}'
# The answer, its reasoning, its text, its calls.
ANSWERS: list[tuple[str, str, str, list[tuple[str, str]]]] = [
    (THOUGHT + FINAL, "Hm. <b>\n", "Hi, é!", []),
    ("<|channel|>final<|message|>Hi", "", "Hi", []),
    ("<|message|>Hi<|end|>", "", "Hi", []),
    # A model trained to answer without channels; marks are text there.
    ("Hi <|end|> <", "", "Hi <|end|> <", []),
    (" <|chan", "", " <|chan", []),
    ("Hi <|chan", "", "Hi <|chan", []),
    ("to be", "", "to be", []),
    # Cut off by max_tokens.
    ("<|channel|>analysis<|message|>a <|en", "a <|en", "", []),
    ("<|channel|>ana", "", "", []),
    (THOUGHT + CALL, "Hm. <b>\n", "", [("f", '{"a": 1}')]),
    (THOUGHT + CALL + "<|call|>", "Hm. <b>\n", "", [("f", '{"a": 1}')]),
    # The form in which the template writes a call of an earlier turn.
    (" to=functions.f<|channel|>commentary json<|message|> {}", "", "", [("f", "{}")]),
    ("<|channel|>commentary to=functions.f<|message|><|call|>", "", "", [("f", "{}")]),
    (
        "<|channel|>commentary<|message|>I look.<|end|>" + CALL + "<|call|>" + CALL,
        "",
        "I look.",
        [("f", '{"a": 1}'), ("f", '{"a": 1}')],
    ),
    # Built-in tools of OpenAI's servers are called in the reasoning.
    ("<|channel|>analysis to=python code<|message|>1+1<|end|>" + FINAL, "1+1", "Hi, é!", []),
    (
        "<|channel|>commentary to=functions.rm <|constrain|>json<|message|>{}",
        "",
        "<|channel|>commentary to=functions.rm <|constrain|>json<|message|>{}",
        [],
    ),
    ("<|channel|>" + "x" * 300, "", "<|channel|>" + "x" * 300, []),
]


def reader(*, is_parallel: bool = True) -> AnswerReader:
    return AnswerReader("harmony", {"f": SCHEMA}, is_parallel=is_parallel, has_channels=True)


@pytest.mark.parametrize(("text", "thought", "said", "calls"), ANSWERS)
def test_an_answer_is_parsed_however_it_is_split(
    text: str, thought: str, said: str, calls: list[tuple[str, str]]
) -> None:
    rng = random.Random(0)
    cuts = [sorted(rng.choices(range(len(text) + 1), k=6)) for _ in range(30)]
    parts = [[text[a:b] for a, b in zip([0, *cut], [*cut, len(text)], strict=True)] for cut in cuts]
    for some in ([text], list(text), *parts):
        assert put_together(reader(), some) == (thought, said, calls), some
    assert put_together(reader(is_parallel=False), [text])[2] == calls[:1]


def load(folder: Path) -> Tokenizer:
    folder = tiny_tokenizers.gpt_oss(folder / "gpt_oss")
    return Tokenizer.load(folder, eos_token_ids(folder), VOCAB_SIZE)


def tokens_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a text, with marks as special tokens."""
    return tokenizer.encode_rendered(RenderedChat([text]))


@pytest.mark.parametrize("text", [THOUGHT + FINAL, THOUGHT + CALL, "<|message|>Hi", "Hi, é!"])
def test_the_text_of_a_chat_is_the_final_channel(text: str, tmp_path: Path) -> None:
    """Answers are not split over gRPC; with ``call_marks``, the text includes all marks."""
    tokenizer = load(tmp_path)
    ids = tokens_of(tokenizer, text)

    def streamed(**how: bool) -> str:
        stream = tokenizer.stream(**how)
        return "".join(stream.push(token) for token in ids)

    assert streamed(user_text_only=True) == put_together(reader(), [text])[1]
    assert streamed(call_marks=True) == streamed(call_marks=True, user_text_only=True) == text
    # The answer to a raw prompt is text without special tokens, as usual.
    assert streamed() == tokenizer.decode(ids)


def test_text_of_other_models_is_left_unchanged(tmp_path: Path) -> None:
    folder = tiny_tokenizers.gemma(tmp_path / "gemma")
    tokenizer = Tokenizer.load(folder, eos_token_ids(folder), VOCAB_SIZE)
    stream = tokenizer.stream(user_text_only=True)
    assert "".join(stream.push(token) for token in tokenizer.encode("a b")) == "a b"


async def test_a_chat_over_grpc_requests_only_the_final_channel() -> None:
    chat = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content="hi")])
    marks = inference_pb2.ResponseOptions(call_marks=True)
    async with harness() as protocol:
        for message, user_text_only in (
            (inference_pb2.GenerateRequest(chat=chat), True),
            (inference_pb2.GenerateRequest(chat=chat, options=marks), False),
            (inference_pb2.GenerateRequest(prompt="hi"), False),
        ):
            await protocol.inference.Generate(message)
            assert protocol.engine.requests[-1].options.user_text_only is user_text_only


async def asked(http: HttpHarness, tokenizer: Tokenizer, text: str, **body: Any) -> Any:
    """The first choice of a conversation, which the engine answers with a text."""
    fakes = fake_backend(http.engine, http.registry, FakeMerger(), FakeFuser())
    vocabularies = FakeVocabularies(Vocabulary(tokenizer))
    http.gate.open(replace(fakes, tokenizer=tokenizer, vocabularies=vocabularies))

    async def script(request: Request) -> AsyncIterator[Output]:
        # The text is computed as in the engine.
        options = request.options
        stream = tokenizer.stream(options.call_marks, options.user_text_only)
        *first, last = tokens_of(tokenizer, text)
        for token in first:
            yield Output(text=stream.push(token), token_ids=(token,))
        yield Output(text=stream.push(last), token_ids=(last,), finish=finish(request))

    http.engine.script = script
    answer = await http.post("/v1/chat/completions", {"model": "m", "messages": TURNS, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


async def test_a_chat_over_http(tmp_path: Path) -> None:
    tokenizer = load(tmp_path)
    async with http_harness(serving=False) as http:
        choice = await asked(http, tokenizer, THOUGHT + FINAL)
        message = choice["message"]
        assert (message["content"], message["reasoning_content"]) == ("Hi, é!", "Hm. <b>\n")
        assert choice["finish_reason"] == "stop"
        choice = await asked(http, tokenizer, THOUGHT + CALL, tools=[TOOL])
        (call,) = choice["message"]["tool_calls"]
        assert call["function"] == {"name": "f", "arguments": '{"a": 1}'}
        assert choice["message"]["content"] is None
        assert choice["finish_reason"] == "tool_calls"
        # Without tools in the request, a call is text, with its marks.
        message = (await asked(http, tokenizer, THOUGHT + CALL))["message"]
        assert "to=functions.f" in message["content"]
        assert message["reasoning_content"] == "Hm. <b>\n"
        # A constrained answer is not a message in a channel.
        message = (await asked(http, tokenizer, '{"a": 1}', guided_json=SCHEMA))["message"]
        assert message["content"] == '{"a": 1}'


async def test_the_other_endpoint_over_http(tmp_path: Path) -> None:
    tokenizer = load(tmp_path)
    async with http_harness(serving=False) as http:
        await asked(http, tokenizer, THOUGHT + FINAL)
        answer = await http.post("/v1/responses", {"model": "m", "input": "hi"})
        thought, said = answer.json()["output"]
        assert thought["type"] == "reasoning"
        assert thought["content"][0]["text"] == "Hm. <b>\n"
        assert said["content"][0]["text"] == "Hi, é!"


def test_reasoning_may_precede_a_forced_call(tmp_path: Path) -> None:
    tokenizer = load(tmp_path)
    marks = tokenizer.chat_format.marks
    grammar = CallsGrammar("harmony", {"f": SCHEMA}, is_parallel=True, marks=marks)
    compiler = ConstraintCompiler(tokenizer)
    try:
        constraint = compiler._compile(ConstraintSpec("grammar", (grammar.alone(),)))
    finally:
        compiler.close()
    end = next(iter(tokenizer.eos_token_ids))

    def fits(text: str) -> bool:
        matcher = constraint.matcher()
        for token in [*tokens_of(tokenizer, text), end]:
            if not int(matcher.mask()[token // 32]) >> (token % 32) & 1:
                return False
            matcher.advance(token)
        return True

    called = CALL.removeprefix("<|start|>assistant")
    assert fits(called)
    assert fits(THOUGHT + CALL)
    assert not fits(THOUGHT + FINAL)
    assert not fits(called.replace("1", '"x"'))
    assert not fits("Hi")
    assert json.loads(put_together(reader(), [THOUGHT + CALL])[2][0][1]) == {"a": 1}


def test_forced_calls_work_without_mark_tokens() -> None:
    grammar = CallsGrammar("harmony", {"f": SCHEMA}, is_parallel=True)
    constraint, tokenizer = compiled("grammar", grammar.alone()), make_tokenizer()
    assert is_followed(constraint, tokenizer.encode(CALL.removeprefix("<|start|>assistant")))
    assert not is_followed(constraint, tokenizer.encode(FINAL))
