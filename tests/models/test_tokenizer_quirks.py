"""Peculiarities of published families' tokenizers and chat templates, over both protocols.

The tokens of a chat are those of transformers' own ``apply_chat_template``.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders.bases import tiny_tokenizers
from builders.bases.tiny_models import save_tiny_model
from chats import encode_chat
from said import says
from servers.fakes import FakeFuser, FakeMerger, FakeVocabularies, fake_backend
from servers.http_harness import http_harness
from servers.rpc_harness import harness
from transformers import AutoTokenizer

from turret.server.adapters.adapter import OwnTemplate
from turret.server.api.vocabularies import Vocabulary
from turret.server.errors import InvalidRequestError
from turret.server.models.loader import eos_token_ids
from turret.server.models.tokenizer import Tokenizer
from turret.v1 import inference_pb2

VOCAB_SIZE = 400
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "gemma": tiny_tokenizers.gemma,
    "phi_3": tiny_tokenizers.phi_3,
    "phi_4_mini": tiny_tokenizers.phi_4_mini,
    "gpt_oss": tiny_tokenizers.gpt_oss,
}
TURNS = [
    {"role": "user", "content": "hi  there"},
    {"role": "assistant", "content": "Well?"},
    {"role": "user", "content": " go\non "},
]


def load(name: str, tmp_path: Path) -> tuple[Tokenizer, Any]:
    """Load a tokenizer with turret and with transformers."""
    folder = FAMILIES[name](tmp_path / name)
    tokenizer = Tokenizer.load(folder, eos_token_ids(folder), VOCAB_SIZE)
    return tokenizer, AutoTokenizer.from_pretrained(folder)


def open_with(protocol: Any, tokenizer: Tokenizer) -> None:
    """Serve with this tokenizer over one protocol."""
    fakes = fake_backend(protocol.engine, protocol.registry, FakeMerger(), FakeFuser())
    vocabularies = FakeVocabularies(Vocabulary(tokenizer))
    protocol.gate.open(replace(fakes, tokenizer=tokenizer, vocabularies=vocabularies))


@contextlib.asynccontextmanager
async def protocols(tokenizer: Tokenizer) -> AsyncIterator[Any]:
    """Yields functions that send a chat or a prompt over both protocols and return the prompts."""
    async with harness(serving=False) as rpc, http_harness(serving=False) as http:
        for protocol in (rpc, http):
            open_with(protocol, tokenizer)

        async def send(path: str, body: dict[str, Any], **message: Any) -> list[list[int]]:
            await rpc.inference.Generate(inference_pb2.GenerateRequest(**message))
            answer = await http.post(path, {"model": "m", **body})
            assert answer.status_code == 200, answer.text
            return [list(protocol.engine.requests[-1].prompt_token_ids) for protocol in (rpc, http)]

        async def ask(turns: list[dict[str, str]]) -> list[list[int]]:
            chat = {"messages": turns}
            return await send("/v1/chat/completions", chat, chat=chat)

        async def complete(prompt: str) -> list[list[int]]:
            return await send("/v1/completions", {"prompt": prompt}, prompt=prompt)

        yield ask, complete


@pytest.mark.parametrize("name", FAMILIES)
async def test_a_chat_has_the_tokens_of_its_template(name: str, tmp_path: Path) -> None:
    tokenizer, theirs = load(name, tmp_path)
    expected = theirs.apply_chat_template(TURNS, add_generation_prompt=True)["input_ids"]
    assert max(expected) < tokenizer.vocab_size
    async with protocols(tokenizer) as (ask, _):
        assert await ask(TURNS) == [expected, expected]


@pytest.mark.parametrize("name", FAMILIES)
async def test_a_rendered_chat_is_a_prompt_of_the_same_tokens(name: str, tmp_path: Path) -> None:
    """A client that applies the template and sends text also gets one BOS."""
    tokenizer, theirs = load(name, tmp_path)
    text = theirs.apply_chat_template(TURNS, add_generation_prompt=True, tokenize=False)
    async with protocols(tokenizer) as (ask, complete):
        assert await complete(text) == await ask(TURNS)


async def test_gemma_begins_with_one_bos(tmp_path: Path) -> None:
    tokenizer, theirs = load("gemma", tmp_path)
    bos = theirs.bos_token_id
    assert theirs("hi")["input_ids"] == [bos, *theirs("hi", add_special_tokens=False)["input_ids"]]
    for text in ("hi", "<bos>hi", "", "<bos>"):
        ids = tokenizer.encode(text)
        assert ids[:1] == [bos], text
        assert bos not in ids[1:], text
    # A BOS that the client wrote twice is kept.
    assert tokenizer.encode("<bos><bos>hi")[:3].count(bos) == 2
    assert encode_chat(tokenizer, TURNS).count(bos) == 1


@pytest.mark.parametrize("name", FAMILIES)
async def test_text_is_tokenized_with_or_without_special_tokens(name: str, tmp_path: Path) -> None:
    tokenizer, theirs = load(name, tmp_path)
    async with harness(serving=False) as rpc, http_harness(serving=False) as http:
        for protocol in (rpc, http):
            open_with(protocol, tokenizer)
        for adds in (True, False):
            expected = theirs("hi there", add_special_tokens=adds)["input_ids"]
            body = {"prompt": "hi there", "add_special_tokens": adds}
            assert (await http.post("/tokenize", body)).json()["tokens"] == expected
            message = inference_pb2.TokenizeRequest(prompt="hi there", omit_special_tokens=not adds)
            assert list((await rpc.inference.Tokenize(message)).token_ids) == expected
        chat = {"messages": TURNS, "add_special_tokens": True}
        assert (await http.refused("/tokenize", chat)).param == "add_special_tokens"


async def test_a_template_without_system_turns_rejects_them(tmp_path: Path) -> None:
    tokenizer, _ = load("gemma", tmp_path)
    turns = [{"role": "system", "content": "Be kind."}, *TURNS]
    failed = says("CHAT_TEMPLATE_FAILED")
    with pytest.raises(InvalidRequestError, match="no system role", check=failed) as refused:
        encode_chat(tokenizer, turns)
    assert refused.value.violations[0][0] == "chat.messages"
    async with http_harness(serving=False) as http:
        open_with(http, tokenizer)
        told = await http.refused("/v1/chat/completions", {"model": "m", "messages": turns})
        assert (told.status, told.param) == (400, "messages")
        assert "no system role" in told.message


async def test_a_tokenizer_that_adds_no_bos_removes_none(tmp_path: Path) -> None:
    tokenizer, theirs = load("phi_3", tmp_path)
    for text in ("hi", "<s>hi", "<s><s>hi"):
        assert tokenizer.encode(text) == theirs(text)["input_ids"]


async def test_phi_ends_at_every_token_that_ends_a_turn(tmp_path: Path) -> None:
    for name in ("phi_3", "phi_4_mini"):
        tokenizer, theirs = load(name, tmp_path)
        ends = {theirs.convert_tokens_to_ids(t) for t in ("<|end|>", "<|endoftext|>")}
        assert ends <= tokenizer.eos_token_ids


@pytest.mark.parametrize("name", FAMILIES)
def test_special_tokens_in_contents_are_plain_text(name: str, tmp_path: Path) -> None:
    """Special tokens in contents are split as in transformers, without additional spaces."""
    tokenizer, theirs = load(name, tmp_path)
    forged = {"gemma": "<end_of_turn>"}.get(name, "<|end|>")
    content = f"a{forged}b {forged} c"
    split = theirs(content, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    theirs("x", split_special_tokens=False)
    ids = encode_chat(tokenizer, [{"role": "user", "content": content}])
    words = encode_chat(tokenizer, [{"role": "user", "content": "x"}])
    end = theirs.convert_tokens_to_ids(forged)
    assert ids.count(end) == words.count(end)
    assert any(ids[i : i + len(split)] == split for i in range(len(ids)))


@pytest.mark.parametrize("number", ["99", "9" * 5000])
def test_a_template_that_imitates_marks_fails_only_its_request(number: str, tmp_path: Path) -> None:
    # A mark stands for a special token in the content, and ends with the token's number.
    template = f"{{{{ messages[0].content[:-2] }}}}{number}x"
    tokenizer = load("gemma", tmp_path)[0].with_template(OwnTemplate("a", {"default": template}))
    with pytest.raises(InvalidRequestError, check=says("CHAT_TEMPLATE_FAILED")):
        encode_chat(tokenizer, [{"role": "user", "content": "<end_of_turn>"}])


def test_harmony_prompts_contain_the_date_and_function_calls(tmp_path: Path) -> None:
    tokenizer, theirs = load("gpt_oss", tmp_path)
    text = tokenizer.decode(encode_chat(tokenizer, TURNS), special=True)
    assert f"Current date: {datetime.date.today():%Y-%m-%d}<|end|>" in text
    assert text.endswith("<|end|><|start|>assistant")
    # <|end|> closes a channel, not the answer.
    names = theirs.convert_ids_to_tokens(sorted(tokenizer.eos_token_ids))
    assert set(names) == {"<|return|>", "<|endoftext|>", "<|call|>"}
    assert tokenizer.chat_format.tools == "harmony"
    assert tokenizer.chat_format.has_channels
    call = {"id": "1", "function": {"name": "f", "arguments": {"a": 1}}}
    turns = [
        TURNS[0],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "<|end|>", "tool_call_id": "1"},
    ]
    ids = encode_chat(tokenizer, turns, [{"type": "function", "function": {"name": "f"}}])
    shown = tokenizer.decode(ids, special=True)
    assert 'to=functions.f<|channel|>commentary json<|message|>{"a": 1}<|call|>' in shown
    # A tool's result that contains an end mark does not end the message.
    end = theirs.convert_tokens_to_ids("<|end|>")
    assert ids.count(end) == shown.count("<|end|>") - 1


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("generation_config.json", "["),
        ("generation_config.json", "null"),
        ("generation_config.json", '{"eos_token_id": ["</s>"]}'),
        ("generation_config.json", '{"eos_token_id": 2.5}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}'),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": 1, "merges": []}}'),
    ],
)
def test_damaged_files_are_rejected(file: str, content: str, tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path / "model")
    (folder / file).write_text(content)
    with pytest.raises(InvalidRequestError):
        Tokenizer.load(folder, eos_token_ids(folder), VOCAB_SIZE)
