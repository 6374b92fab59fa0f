"""Conversations use the adapter's own chat template, rendered as in transformers."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from builders.bases.tiny_models import EOS, tiny_tokenizer
from builders.methods import make_config, save_adapter
from method_oracle import oracle_greedy, twin
from servers.both_protocols import Protocols, serving
from servers.rpc_harness import failure_of
from transformers import AutoTokenizer

from turret.clients.aio import AsyncTurretClient
from turret.v1 import adapters_pb2, inference_pb2

BASE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
OWN = (
    "{% for m in messages %}### {{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:{% endif %}"
)
OTHER = OWN.replace("###", "@@")
TOOLS = "{% for t in tools %}<tool_call>{{ t.function.name }};{% endfor %}" + OWN
ASK: list[dict[str, Any]] = [{"role": "user", "content": "hi <eos>"}]


def save(folder: Path, name: str, seed: int = 1) -> Any:
    config = make_config("lora", target_modules=["q_proj"])
    return save_adapter(twin("llama").model, config, folder / name, seed=seed)


def with_template(folder: Path, template: str | None, **changes: Any) -> None:
    """Save the base's tokenizer with a chat template alongside an adapter, as TRL does."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    for name, token in changes.items():
        setattr(tokenizer, name, token)
    tokenizer.save_pretrained(folder)


def rendered(folder: Path, tools: Any = None) -> list[int]:
    """The tokens of ``ASK``; ``<eos>`` in the user's turn is not a special token."""
    theirs: Any = AutoTokenizer.from_pretrained(folder)
    mark = [{**ASK[0], "content": "hi \x01"}]
    text = theirs.apply_chat_template(mark, tools=tools, tokenize=False, add_generation_prompt=True)
    before, after = text.split("\x01")
    spelled = [token for letter in "<eos>" for token in theirs(letter)["input_ids"]]
    return [*theirs(before)["input_ids"], *spelled, *theirs(after)["input_ids"]]


async def template_of(protocols: Protocols, name: str) -> str:
    question = adapters_pb2.GetAdapterRequest(name=name)
    return (await protocols.rpc.adapters.GetAdapter(question)).chat_template


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test model with a chat template."""
    folder = tmp_path_factory.mktemp("models") / "base"
    shutil.copytree(twin("llama").folder, folder)
    (folder / "chat_template.jinja").write_text(BASE)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for number, name in enumerate(("plain", "own", "config", "named", "same", "ends")):
        save(folder, name, seed=number)
    with_template(folder / "own", OWN)
    with_template(folder / "same", BASE)
    with_template(folder / "ends", OTHER, eos_token="a")
    (folder / "ends" / "chat_template.jinja").write_bytes(OTHER.replace("\n", "\r\n").encode())
    for name, template in (
        ("config", OTHER),
        ("named", [{"name": "default", "template": OWN}, {"name": "tool_use", "template": TOOLS}]),
    ):
        with_template(folder / name, None)
        file = folder / name / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    return folder


NAMES = ("plain", "own", "config", "named", "same", "ends")


@pytest.fixture
async def protocols(base: Path, root: Path, tmp_path: Path) -> AsyncIterator[Protocols]:
    async with serving(base, root, *NAMES, state=tmp_path / "state") as protocols:
        yield protocols


async def test_the_adapters_template_renders_like_transformers(
    protocols: Protocols, base: Path
) -> None:
    expected = {
        name: rendered(protocols.root / name) for name in ("own", "config", "named", "ends")
    }
    expected["same"] = expected["plain"] = rendered(base)
    for name, tokens in expected.items():
        assert await protocols.tokens(name, ASK) == tokens, name
    assert len({tuple(tokens) for tokens in expected.values()}) == 4
    tool = {"type": "function", "function": {"name": "look", "description": "", "parameters": {}}}
    shown = await protocols.tokens("named", ASK, tools=[tool])
    assert shown == rendered(protocols.root / "named", [tool])
    origins = {name: await template_of(protocols, name) for name in NAMES}
    assert origins == {
        "plain": "",
        "own": "chat_template.jinja",
        "config": "tokenizer_config.json",
        "named": "tokenizer_config.json",
        "same": "chat_template.jinja",
        "ends": "chat_template.jinja",
    }


async def test_a_mix_has_the_template_of_its_first_member_with_one(protocols: Protocols) -> None:
    own, other = await protocols.tokens("own", ASK), await protocols.tokens("config", ASK)
    assert await protocols.tokens("plain+own+config", ASK) == own
    assert await protocols.tokens("config*0.5+own", ASK) == other
    assert await protocols.tokens("same+own", ASK) == await protocols.tokens("base", ASK)


async def test_every_protocol_answers_a_chat_in_the_adapters_template(protocols: Protocols) -> None:
    prompt = await protocols.tokens("own", ASK)
    oracle = save(protocols.root.parent / "again", "own", seed=1)
    expected, _ = oracle_greedy(oracle, prompt, 6)
    text = tiny_tokenizer().decode(expected[: expected.index(EOS)] if EOS in expected else expected)
    fields = {"model": "own", "temperature": 0}
    chat = await protocols.http.post(
        "/v1/chat/completions", {**fields, "messages": ASK, "max_tokens": 6}
    )
    assert chat.json()["usage"]["prompt_tokens"] == len(prompt)
    assert chat.json()["choices"][0]["message"]["content"] == text
    response = await protocols.http.post(
        "/v1/responses", {**fields, "input": ASK, "max_output_tokens": 6}
    )
    assert response.json()["usage"]["input_tokens"] == len(prompt)
    embedded = await protocols.http.post("/v1/embeddings", {"model": "own", "messages": ASK})
    assert embedded.json()["usage"]["prompt_tokens"] == len(prompt)
    async with AsyncTurretClient(protocols.rpc.rpc.address) as client:
        answer = await client.chat(ASK, adapters="own", temperature=0.0, max_tokens=6)
        assert (answer.usage.prompt_tokens, answer.text) == (len(prompt), text)
        assert len((await client.score(ASK, adapters="own")).tokens) == len(prompt)


async def test_answers_end_at_the_adapters_end_token(protocols: Protocols) -> None:
    """``a`` ends conversations of the adapter that defines it, and is text for the others."""
    (letter,) = tiny_tokenizer()("a")["input_ids"]
    body = {"messages": ASK, "max_tokens": 4, "temperature": 0, "logit_bias": {str(letter): 100}}
    for name, reason in (("ends", "stop"), ("own", "length")):
        answer = await protocols.http.post("/v1/chat/completions", {"model": name, **body})
        assert answer.json()["choices"][0]["finish_reason"] == reason
    chosen = {**body, "model": "ends", "structured_outputs": {"choice": ["ba", "b"]}}
    answer = await protocols.http.post("/v1/chat/completions", {**chosen, "logit_bias": {}})
    assert answer.json()["choices"][0]["message"]["content"] in ("ba", "b")


async def test_a_template_changes_with_the_weights_and_survives_a_restart(
    base: Path, root: Path, tmp_path: Path
) -> None:
    files = tmp_path / "root"
    shutil.copytree(root / "own", files / "a")
    state = tmp_path / "state"
    async with serving(base, files, "a", state=state) as protocols:
        own = await protocols.tokens("a", ASK)
        with_template(files / "a", OTHER)
        # A changed file has no effect before it is loaded again, and then makes a new generation.
        assert await protocols.tokens("a", ASK) == own
        again = adapters_pb2.LoadAdapterRequest(name="a", path="a")
        assert (
            await failure_of(protocols.rpc.adapters.LoadAdapter(again))
        ).reason == "ADAPTER_EXISTS"
        change = adapters_pb2.ReplaceAdapterRequest(name="a", path="a")
        assert (await protocols.rpc.adapters.ReplaceAdapter(change)).generation == 2
        other = await protocols.tokens("a", ASK)
        assert other == rendered(files / "a") != own
        assert (await protocols.rpc.adapters.ReplaceAdapter(change)).generation == 2
        change.chat_template = BASE
        replaced = await protocols.rpc.adapters.ReplaceAdapter(change)
        assert (replaced.generation, replaced.chat_template) == (3, "request")
        assert await protocols.tokens("a", ASK) == await protocols.tokens("base", ASK)
        # A request that was rendered before a replacement is not answered after it.
        vocabulary = await protocols.engine.vocabulary_of("a")
        again = adapters_pb2.LoadAdapterRequest(name="b", path="a", chat_template=OWN)
        assert (await protocols.rpc.adapters.LoadAdapter(again)).chat_template == "request"
        assert await protocols.tokens("b", ASK) == own
        assert vocabulary.own is not None
        with pytest.MonkeyPatch.context() as patch:

            async def before(*asked: Any, **more: Any) -> Any:
                return vocabulary

            patch.setattr(protocols.engine.backend.vocabularies, "of", before)
            body = {"model": "b", "messages": ASK, "max_tokens": 1}
            assert (await protocols.http.refused("/v1/chat/completions", body)).status == 503
    (files / "a" / "chat_template.jinja").unlink()
    async with serving(base, files, state=state) as protocols:
        assert await protocols.tokens("b", ASK) == own
        assert await template_of(protocols, "b") == "request"
        assert await protocols.tokens("a", ASK) == await protocols.tokens("base", ASK)


async def test_a_template_is_uploaded_and_exported_with_its_adapter(
    protocols: Protocols, tmp_path: Path
) -> None:
    own = await protocols.tokens("own", ASK)
    async with AsyncTurretClient(protocols.rpc.rpc.address) as client:
        await client.adapters.upload("up", protocols.root / "own")
        assert await protocols.tokens("up", ASK) == own
        await client.adapters.export("up", tmp_path / "out")
        assert not (tmp_path / "out" / "tokenizer.json").exists()
        await client.adapters.upload("again", tmp_path / "out")
        assert await protocols.tokens("again", ASK) == own
        given = await client.adapters.upload("given", protocols.root / "own", chat_template=OTHER)
        assert given.chat_template == "request"
        assert await protocols.tokens("given", ASK) == await protocols.tokens("config", ASK)
        await client.adapters.export("given", tmp_path / "given")
        fused = await client.adapters.fuse("fused", ["plain", "own"])
        assert fused.adapter.chat_template == "members"
        assert await protocols.tokens("fused", ASK) == own
        await client.adapters.export("fused", tmp_path / "fused")


async def test_a_broken_template_is_refused_at_load(protocols: Protocols) -> None:
    for file, content, reason in (
        ("chat_template.jinja", b"a\n{% for %}", "CHAT_TEMPLATE_INVALID"),
        ("chat_template.jinja", b"x" * (256 << 10) + b"x", "FILE_TOO_LARGE"),
        ("chat_template.jinja", b"\xff", "NOT_UTF8"),
        ("tokenizer_config.json", b'{"chat_template": "\\n{{ a"}', "CHAT_TEMPLATE_INVALID"),
        (
            "tokenizer_config.json",
            json.dumps({"chat_template": "é" * (128 << 10) + "x"}).encode(),
            "CHAT_TEMPLATE_TOO_LARGE",
        ),
        ("tokenizer_config.json", b'{"chat_template"', "NOT_JSON"),
    ):
        folder = protocols.root / f"broken-{reason.lower()}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(protocols.root / "plain", folder)
        (folder / file).write_bytes(content)
        load = adapters_pb2.LoadAdapterRequest(name="broken", path=folder.name)
        failure = await failure_of(protocols.rpc.adapters.LoadAdapter(load))
        assert (failure.reason, failure.reasons) == ("ADAPTER_CHECKPOINT", {file: reason})
        if reason == "CHAT_TEMPLATE_INVALID":
            assert "line 2" in failure.violations[file]
            # A template in the call replaces the broken one.
            load.name, load.chat_template = f"given-{file}", OWN
            await protocols.rpc.adapters.LoadAdapter(load)
            assert await protocols.tokens(load.name, ASK) == await protocols.tokens("own", ASK)
    load = adapters_pb2.LoadAdapterRequest(name="broken", path="plain", chat_template="{{ a")
    failure = await failure_of(protocols.rpc.adapters.LoadAdapter(load))
    assert failure.reasons == {"chat_template": "CHAT_TEMPLATE_INVALID"}
    load = adapters_pb2.LoadAdapterRequest(name="long", path="plain", chat_template="é" * (1 << 18))
    assert (await protocols.rpc.adapters.LoadAdapter(load)).chat_template == "request"


async def test_adapters_can_bring_a_template_to_a_base_without_one(
    root: Path, tmp_path: Path
) -> None:
    model = twin("llama").folder
    async with serving(model, root, "own", "plain", state=tmp_path / "state") as protocols:
        assert await protocols.tokens("own", ASK) == rendered(root / "own")
        for name in ("base", "plain"):
            refused = await protocols.http.refused("/tokenize", {"model": name, "messages": ASK})
            assert refused.code == "no_chat_template"
        chat = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content="hi")])
        question = inference_pb2.TokenizeRequest(chat=chat)
        failure = await failure_of(protocols.rpc.inference.Tokenize(question))
        assert failure.reasons == {"chat": "NO_CHAT_TEMPLATE"}


async def test_a_template_can_be_set_for_the_base(root: Path, base: Path, tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    file.write_text(OTHER)
    names = ("own", "plain")
    async with serving(base, root, *names, state=tmp_path / "a", chat_template=file) as protocols:
        other = rendered(root / "config")
        assert await protocols.tokens("base", ASK) == await protocols.tokens("plain", ASK) == other
        assert await protocols.tokens("own", ASK) == rendered(root / "own")
    built_in = Path("chatml")
    async with serving(
        base, root, *names, state=tmp_path / "b", chat_template=built_in
    ) as protocols:
        answer = await protocols.http.post("/tokenize", {"model": "base", "messages": ASK})
        back = await protocols.http.post("/detokenize", {"model": "base", **answer.json()})
        text = "<|im_start|>user\nhi <eos><|im_end|>\n<|im_start|>assistant\n"
        assert back.json()["prompt"] == text


THINKING = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if reasoning_effort %}effort={{ reasoning_effort }};{% endif %}{{ extra }}"
    "{% if add_generation_prompt %}[assistant]"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>"
    "{% else %}<think>{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def thinking(base: Path, root: Path) -> Path:
    save(root, "thinking")
    with_template(root / "thinking", THINKING)
    return root / "thinking"


def as_text(folder: Path, messages: Any, **variables: Any) -> str:
    theirs: Any = AutoTokenizer.from_pretrained(folder)
    how = {"add_generation_prompt": True, **variables}
    return str(theirs.apply_chat_template(messages, tokenize=False, **how))


async def test_variables_of_the_template_are_set_as_in_transformers(
    protocols: Protocols, thinking: Path
) -> None:
    load = adapters_pb2.LoadAdapterRequest(name="thinking", path="thinking")
    await protocols.rpc.adapters.LoadAdapter(load)
    asked = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " so far "}]

    async def text_of(**fields: Any) -> str:
        body = {"model": "thinking", "messages": asked, **fields}
        answer = await protocols.http.post("/tokenize", body)
        assert answer.status_code == 200, answer.text
        text: Any = tiny_tokenizer().decode(answer.json()["tokens"])
        return text

    for fields, variables in (
        ({"chat_template_kwargs": {"enable_thinking": False, "extra": "x"}}, None),
        ({"reasoning_effort": "low"}, {"reasoning_effort": "low", "enable_thinking": True}),
        ({"reasoning_effort": "none"}, {"reasoning_effort": "none", "enable_thinking": False}),
        ({"add_generation_prompt": False}, {"add_generation_prompt": False}),
        ({"continue_final_message": True}, None),
        (
            {
                "reasoning_effort": "high",
                "chat_template_kwargs": {"enable_thinking": False, "extra": [1]},
            },
            {"reasoning_effort": "high", "enable_thinking": False, "extra": [1]},
        ),
    ):
        expected: dict[str, Any] = variables or dict(fields)
        expected = expected.pop("chat_template_kwargs", expected)
        if "continue_final_message" in expected:
            expected["add_generation_prompt"] = False
        assert await text_of(**fields) == as_text(thinking, asked, **expected), fields
    # A special token in a variable is text.
    assert "<eos>" in await text_of(chat_template_kwargs={"extra": "<eos>"})
    answer = await protocols.http.post(
        "/tokenize",
        {"model": "thinking", "messages": asked, "chat_template_kwargs": {"extra": "<eos>"}},
    )
    assert EOS not in answer.json()["tokens"]
    wanted = {"effort": "low"}
    response = await protocols.http.post(
        "/v1/responses",
        {"model": "thinking", "input": "hi", "reasoning": wanted, "max_output_tokens": 1},
    )
    told = response.json()
    expected_text = as_text(thinking, asked[:1], reasoning_effort="low", enable_thinking=True)
    assert told["usage"]["input_tokens"] == len(tiny_tokenizer()(expected_text)["input_ids"])
    assert told["reasoning"]["effort"] == "low"


async def test_reasoning_is_recognised_if_the_prompt_begins_it(
    protocols: Protocols, thinking: Path
) -> None:
    load = adapters_pb2.LoadAdapterRequest(name="thinking", path="thinking")
    await protocols.rpc.adapters.LoadAdapter(load)
    (letter,) = tiny_tokenizer()("b")["input_ids"]
    body = {"model": "thinking", "max_tokens": 2, "logit_bias": {str(letter): 100}}
    half = [*ASK, {"role": "assistant", "content": "<think>so"}]
    for messages, fields, is_thought in (
        (ASK, {}, True),
        (ASK, {"reasoning_effort": "none"}, False),
        (ASK, {"add_generation_prompt": False}, False),
        (half, {"continue_final_message": True}, True),
        ([*ASK, {**half[1], "content": "So"}], {"continue_final_message": True}, False),
    ):
        sent = {**body, "temperature": 0, "messages": messages, **fields}
        answer = await protocols.http.post("/v1/chat/completions", sent)
        message = answer.json()["choices"][0]["message"]
        thought, said = message.get("reasoning_content", ""), message["content"]
        assert (thought, said) == (("bb", "") if is_thought else ("", "bb")), fields


async def test_invalid_template_variables_are_refused(protocols: Protocols) -> None:
    chat = {"model": "own", "messages": ASK}
    for path, fields, param in (
        ("/v1/chat/completions", {"chat_template_kwargs": 3}, "chat_template_kwargs"),
        (
            "/v1/chat/completions",
            {"chat_template_kwargs": {"messages": []}},
            "chat_template_kwargs.messages",
        ),
        ("/v1/chat/completions", {"reasoning_effort": "much"}, "reasoning_effort"),
        (
            "/v1/chat/completions",
            {"add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message",
        ),
        ("/tokenize", {"chat_template_kwargs": {"x": "y" * 70000}}, "chat_template_kwargs"),
        ("/v1/embeddings", {"chat_template_kwargs": {"tools": 1}}, "chat_template_kwargs.tools"),
    ):
        refused = await protocols.http.refused(path, {**chat, **fields})
        assert (refused.status, refused.param) == (400, param), fields
    plain = {"model": "own", "prompt": "hi", "chat_template_kwargs": {"a": 1}}
    assert (await protocols.http.refused("/tokenize", plain)).param == "chat_template_kwargs"
    for text in ("[]", '{"a": NaN}', '{"a": "half of a pair: \\ud800"}'):
        call = inference_pb2.ToolCall(name="f", arguments=text)
        turn = inference_pb2.ChatMessage(role="assistant", tool_calls=[call])
        given = inference_pb2.Chat(messages=[turn], chat_template_kwargs=text)
        failure = await failure_of(
            protocols.rpc.inference.Tokenize(inference_pb2.TokenizeRequest(chat=given))
        )
        places = ("chat.chat_template_kwargs", "chat.messages[0].tool_calls[0].arguments")
        assert failure.reasons == dict.fromkeys(places, "NOT_A_JSON_OBJECT"), text


async def test_a_request_may_bring_a_template_only_if_that_is_allowed(
    protocols: Protocols, base: Path, root: Path, tmp_path: Path
) -> None:
    asked = {"messages": ASK, "chat_template": OTHER}
    for path in ("/v1/chat/completions", "/tokenize", "/v1/embeddings"):
        refused = await protocols.http.refused(path, {"model": "own", **asked})
        assert (refused.status, refused.param) == (400, "chat_template")
    chat = inference_pb2.Chat(
        messages=[inference_pb2.ChatMessage(role="user", content="hi")], chat_template=OTHER
    )
    message = inference_pb2.TokenizeRequest(chat=chat)
    failure = await failure_of(protocols.rpc.inference.Tokenize(message))
    assert failure.reasons == {"chat.chat_template": "TEMPLATE_NOT_TRUSTED"}
    names = ("own", "ends", "config")
    async with serving(base, root, *names, state=tmp_path / "b", trusts_templates=True) as trusting:
        other = await trusting.tokens("config", ASK)
        for name in ("base", "own", "config"):
            assert await trusting.tokens(name, ASK, chat_template=OTHER) == other
        # The end token is still the adapter's, as in transformers.
        assert await trusting.tokens("ends", ASK, chat_template=OWN) != await trusting.tokens(
            "own", ASK
        )
        body = {"max_tokens": 2, "temperature": 0, **asked}
        for name in ("base", "own"):
            answer = await trusting.http.post("/v1/chat/completions", {"model": name, **body})
            assert answer.json()["usage"]["prompt_tokens"] == len(other)
        answer = await trusting.http.post("/v1/embeddings", {"model": "own", **asked})
        assert answer.json()["usage"]["prompt_tokens"] == len(other)
        broken = {"model": "own", "messages": ASK, "chat_template": "{% if %}"}
        refused = await trusting.http.refused("/tokenize", broken)
        assert (refused.status, refused.param) == (400, "chat_template")
        broken["chat_template"] = "x" * ((1 << 18) + 1)
        refused = await trusting.http.refused("/tokenize", broken)
        assert refused.param == "chat_template"
        # A client may send thousands of templates, so all of them share the same processes.
        before = len(psutil.Process().children())
        await asyncio.gather(
            *(
                trusting.tokens(name, ASK, chat_template=f"{OTHER}{number}")
                for name in ("base", "own")
                for number in range(6)
            )
        )
        assert len(psutil.Process().children()) <= before
