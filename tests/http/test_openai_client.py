"""OpenAI's Python client on a real server with the bundled model."""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import psutil
import pytest
from checkout import ROOT
from servers.server_under_test import ServerUnderTest, start_server

from turret.clients.client import TurretClient
from turret.server.models.model_source import resolve_model
from turret.server.models.sources.check import default_cache_dir

EXAMPLES = ROOT / "examples" / "adapters"
ASK: Any = [{"role": "user", "content": "JSON with name, age: Ann is 31 years old."}]
PROMPT = "The capital of France is"
GREEDY: Any = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerUnderTest]:
    folder = tmp_path_factory.mktemp("openai")
    tokens = folder / "tokens"
    tokens.write_text("ask inference\nrule inference,admin\nwatch metrics\n")
    tokens.chmod(0o600)
    flags = ["--http-address", "127.0.0.1:0", "--token-file", str(tokens)]
    flags += ["--adapter-root", str(EXAMPLES)]
    for name in ("sql", "json"):
        flags += ["--preload", f"{name}={name}"]
    with start_server(folder, *flags) as running:
        yield running


@pytest.fixture
def client(server: ServerUnderTest) -> Iterator[openai.OpenAI]:
    with connect(server) as connected:
        yield connected


@pytest.fixture
def rpc(server: ServerUnderTest) -> Iterator[TurretClient]:
    with TurretClient(server.address, token="ask") as connected:
        yield connected


def connect(server: ServerUnderTest, key: str = "ask") -> openai.OpenAI:
    url = f"http://{server.http_address}/v1"
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=120)


def test_only_authorised_callers_see_the_tokenizer(server: ServerUnderTest) -> None:
    url = f"http://{server.http_address}/tokenizer_info"
    asked = urllib.request.Request(url, headers={"authorization": "Bearer ask"})
    with urllib.request.urlopen(asked, timeout=60) as answer:
        info = json.load(answer)
    assert (info["bos_token"], info["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert "<|im_start|>" in info["chat_template"]
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(url, timeout=60)
    with refused.value as answer:
        assert answer.status == 401


def test_models_are_listed_and_found(client: openai.OpenAI, rpc: TurretClient) -> None:
    model = rpc.get_model()
    base, digest = model.name, resolve_model(None, default_cache_dir()).digest
    models = client.models.list().data
    assert models[0].to_dict()["digest"] == model.digest == digest
    assert [model.id for model in models] == [base, "json", "sql"]
    assert [model.to_dict()["parent"] for model in models] == [None, base, base]
    for name in (base, "base"):
        assert client.models.retrieve(name).id == base
    for name in ("sql", f"{base}:sql"):
        assert client.models.retrieve(name).id == "sql"
    for name in ("nothing", "sql+json", "sql*0.5"):
        with pytest.raises(openai.NotFoundError) as missing:
            client.models.retrieve(name)
        assert missing.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("model", "mix"),
    [
        ("base", []),
        ("json", ["json"]),
        ("sql+json*-0.5", ["sql", ("json", -0.5)]),
        ("json*0.5", [("json", 0.5)]),
    ],
)
def test_both_protocols_give_the_same_answer(
    client: openai.OpenAI, rpc: TurretClient, model: str, mix: list[Any]
) -> None:
    chat = client.chat.completions.create(
        model=model, messages=ASK, logprobs=True, top_logprobs=2, **GREEDY
    )
    (choice,) = chat.choices
    same = rpc.chat(ASK, adapters=mix, logprobs=True, top_n=2, **GREEDY)
    assert choice.message.content == same.text != ""
    assert choice.finish_reason == {"STOP": "stop", "LENGTH": "length"}[same.finish_reason]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert [t.logprob for t in choice.logprobs.content] == [t.logprob for t in same.logprobs]
    for mine, other in zip(choice.logprobs.content, same.logprobs, strict=True):
        assert [(t.token, t.logprob) for t in mine.top_logprobs] == [
            (t.text, t.logprob) for t in other.top
        ]
    assert chat.usage is not None
    assert chat.usage.prompt_tokens == same.usage.prompt_tokens
    assert chat.usage.completion_tokens == same.usage.completion_tokens
    events = list(
        client.chat.completions.create(
            model=model, messages=ASK, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    texts = [event.choices[0].delta.content or "" for event in events if event.choices]
    assert "".join(texts) == same.text
    assert events[0].choices[0].delta.role == "assistant"
    usage = events[-1].usage
    assert usage is not None
    assert usage.total_tokens == chat.usage.total_tokens
    options = {"temperature": 0.9, "seed": 11, "max_tokens": 8, "top_p": 0.9}
    drawn = client.completions.create(model=model, prompt=PROMPT, **options)  # type: ignore[arg-type]
    assert drawn.choices[0].text == rpc.generate(PROMPT, adapters=mix, **options).text  # type: ignore[arg-type]


def test_n_answers(client: openai.OpenAI) -> None:
    options: Any = {"model": "base", "prompt": [PROMPT, "Two and two"], "max_tokens": 6}
    answer = client.completions.create(n=3, seed=4, temperature=1.0, **options)
    assert [choice.index for choice in answer.choices] == list(range(6))
    for prompt in (0, 1):
        for number in range(3):
            alone = client.completions.create(
                **{**options, "prompt": options["prompt"][prompt]}, seed=4 + number, temperature=1.0
            )
            assert alone.choices[0].text == answer.choices[prompt * 3 + number].text
    streamed: dict[int, str] = {}
    for event in client.completions.create(n=3, seed=4, temperature=1.0, stream=True, **options):
        for choice in event.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + choice.text
    assert [streamed[choice.index] for choice in answer.choices] == [
        choice.text for choice in answer.choices
    ]


def test_answers_to_one_prompt_share_its_blocks(
    server: ServerUnderTest, client: openai.OpenAI
) -> None:
    """The first answer computes the prompt, and the other three find all of its whole blocks."""
    prompt = " ".join(f"number {index}" for index in range(60))
    before = server.metrics("watch")
    answer = client.completions.create(model="sql", prompt=prompt, n=4, max_tokens=2, seed=1)
    after = server.metrics("watch")
    assert answer.usage is not None
    length = answer.usage.prompt_tokens
    hit = ("turret_prefix_cache_tokens_total", frozenset({("result", "hit")}))
    found = after.get(hit, 0) - before.get(hit, 0)
    # A block is 16 tokens; the last token is always computed.
    assert found == 3 * ((length - 1) // 16 * 16) > 0
    counted = ("turret_prompt_tokens_total", frozenset({("adapter", "sql")}))
    assert after[counted] - before.get(counted, 0) == 4 * length


def test_completions_with_echo_and_logprobs(client: openai.OpenAI, rpc: TurretClient) -> None:
    scores = rpc.score(PROMPT, top_n=1).tokens
    expected = [token.logprob for token in scores]
    for limit in (0, 1):
        options: Any = {"max_tokens": limit, "temperature": 0}
        answer = client.completions.create(
            model="base", prompt=PROMPT, echo=True, logprobs=1, **options
        )
        (choice,) = answer.choices
        assert choice.text.startswith(PROMPT)
        logprobs = choice.logprobs
        assert logprobs is not None
        assert logprobs.token_logprobs is not None
        assert logprobs.text_offset is not None
        assert logprobs.tokens is not None
        assert logprobs.token_logprobs[: len(expected)] == expected
        assert len(logprobs.tokens) == len(expected) + limit
        for offset, token in zip(logprobs.text_offset, logprobs.tokens, strict=True):
            assert choice.text[offset:].startswith(token)


def test_sampling_and_stop_fields(client: openai.OpenAI) -> None:
    plain = client.completions.create(model="base", prompt=PROMPT, **GREEDY).choices[0].text
    word = plain.split()[1]
    stopped = client.completions.create(model="base", prompt=PROMPT, stop=[word], **GREEDY)
    assert stopped.choices[0].text == plain[: plain.index(word)]
    assert (stopped.choices[0].finish_reason, stopped.choices[0].to_dict()["stop_reason"]) == (
        "stop",
        word,
    )
    kept = client.completions.create(
        model="base",
        prompt=PROMPT,
        stop=[word],
        extra_body={"include_stop_str_in_output": True},
        **GREEDY,
    )
    assert kept.choices[0].text == plain[: plain.index(word) + len(word)]
    first = client.completions.create(model="base", prompt=PROMPT, logprobs=0, **GREEDY)
    spelled = first.choices[0].logprobs
    assert spelled is not None
    assert spelled.tokens is not None
    url = f"{client.base_url.copy_with(path='/tokenize')}"
    ids = client.post(
        url, body={"prompt": spelled.tokens[0]}, cast_to=dict[str, Any]
    )["tokens"]  # fmt: skip
    banned = client.completions.create(
        model="base", prompt=PROMPT, logit_bias={str(ids[0]): -100}, **GREEDY
    )
    assert not banned.choices[0].text.startswith(spelled.tokens[0])
    top = client.completions.create(
        model="base", prompt=PROMPT, max_tokens=12, temperature=1.0, extra_body={"top_k": 1}
    )
    assert top.choices[0].text == plain


def test_refusals_are_the_clients_exceptions(
    server: ServerUnderTest, client: openai.OpenAI
) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as missing:
        create(model="nothing", messages=ASK)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        create(model="nothing", messages=ASK, stream=True)
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": {}}}
    for wrong, param in (
        ({"temperature": -1}, "temperature"),
        ({"tools": [tool]}, "tools"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"messages": []}, "messages"),
    ):
        with pytest.raises(openai.BadRequestError) as bad:
            create(**{"model": "sql", "messages": ASK, **wrong})
        assert bad.value.param == param
    long: Any = {"model": "base", "prompt": "a " * 9000}
    with pytest.raises(openai.BadRequestError) as long_prompt:
        client.completions.create(**long)
    assert long_prompt.value.code == "context_length_exceeded"
    with connect(server, "wrong") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    with connect(server, "watch") as watcher, pytest.raises(openai.PermissionDeniedError):
        watcher.models.list()
    with pytest.raises(openai.APIStatusError) as late:
        create(model="base", messages=ASK, max_tokens=400, extra_body={
            "timeout": 0.05, "ignore_eos": True,
        })  # fmt: skip
    assert late.value.status_code == 504


def test_vectors_are_those_of_grpc(client: openai.OpenAI, rpc: TurretClient) -> None:
    """OpenAI's client requests and decodes base64."""
    texts = [PROMPT, "b"]
    found = client.embeddings.create(model="sql", input=texts, extra_body={"pooling": "mean"})
    same = rpc.embed(texts, adapters="sql", pooling="mean")
    assert [tuple(each.embedding) for each in found.data] == list(same.vectors)
    assert found.usage.prompt_tokens == same.usage.prompt_tokens
    assert math.hypot(*same.vectors[0]) == pytest.approx(1.0, abs=1e-6)
    short = client.embeddings.create(model="base", input="a", dimensions=8, encoding_format="float")
    whole = rpc.embed("a", normalize=False).vectors[0]
    length = math.hypot(*whole[:8])
    assert short.data[0].embedding == pytest.approx([x / length for x in whole[:8]], rel=1e-5)


def test_tokens_are_detokenized(client: openai.OpenAI, rpc: TurretClient) -> None:
    root = client.base_url.copy_with(path="/")
    read = client.post(
        f"{root}tokenize",
        body={"model": "base", "prompt": PROMPT, "return_token_strs": True},
        cast_to=dict[str, Any],
    )
    assert read["tokens"] == list(rpc.tokenize(PROMPT).token_ids)
    assert read["count"] == len(read["tokens"]) == len(read["token_strs"])
    assert read["max_model_len"] == rpc.get_model().max_model_len
    back = client.post(f"{root}detokenize", body={"tokens": read["tokens"]}, cast_to=dict[str, Any])
    assert back == {"prompt": PROMPT}
    turns = client.post(f"{root}tokenize", body={"messages": ASK}, cast_to=dict[str, Any])
    assert turns["count"] > len(read["tokens"])


def test_adapters_come_and_go(server: ServerUnderTest, client: openai.OpenAI) -> None:
    name: Any = {"lora_name": "label"}
    with connect(server, "rule") as admin:
        for path in ("/load_lora_adapter", "/unload_lora_adapter"):
            with pytest.raises(openai.PermissionDeniedError):
                client.post(path, body=name | {"lora_path": "label"}, cast_to=str)
        load = name | {"lora_path": "label"}
        said = admin.post("/load_lora_adapter", body=load, cast_to=str)
        assert said == "Success: LoRA adapter 'label' added successfully."
        assert client.models.retrieve("label").id == "label"
        client.chat.completions.create(model="label", messages=ASK, **GREEDY)
        with pytest.raises(openai.ConflictError):
            admin.post("/load_lora_adapter", body=name | {"lora_path": "sql"}, cast_to=str)
        for path in ("/etc", "nothing", ""):
            with pytest.raises(openai.BadRequestError) as bad:
                admin.post("/load_lora_adapter", body=name | {"lora_path": path}, cast_to=str)
            assert bad.value.param in ("lora_path", None)
        admin.post("/unload_lora_adapter", body=name, cast_to=str)
        with pytest.raises(openai.NotFoundError):
            admin.post("/unload_lora_adapter", body=name, cast_to=str)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("label")


def test_metrics_are_labelled_by_protocol(server: ServerUnderTest, client: openai.OpenAI) -> None:
    client.completions.create(model="sql", prompt=PROMPT, **GREEDY)
    url = f"http://{server.http_address}/metrics"
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(url, timeout=30)
    with refused.value as answer:
        assert answer.status == 401
    question = urllib.request.Request(url, headers={"authorization": "Bearer watch"})
    with urllib.request.urlopen(question, timeout=30) as answer:
        text = answer.read().decode()
    assert 'turret_calls_total{code="OK",protocol="http"}' in text
    assert 'turret_requests_total{adapter="sql",code="OK"}' in text
    # With speculation, tokens can arrive together, so the number of gaps is not that of tokens.
    gaps = r'^turret_adapter_inter_token_seconds_count{adapter="sql"} (\S+)$'
    found = re.search(gaps, text, re.M)
    assert found is not None
    assert float(found[1]) > 0
    assert re.search(r'^turret_adapters_info{max_lora="64",running_lora_adapters="",', text, re.M)


@pytest.mark.parametrize("count", [50, pytest.param(200, marks=pytest.mark.long)])
async def test_streams_that_are_dropped_leave_nothing(server: ServerUnderTest, count: int) -> None:
    """Streams with a few adapters are dropped at random times, or read to their end."""
    source = random.Random(3)
    url = f"http://{server.http_address}/v1"
    with connect(server) as sync:
        before = sync.completions.create(model="json", prompt=PROMPT, **GREEDY).choices[0].text
    async with openai.AsyncOpenAI(base_url=url, api_key="ask", max_retries=0) as client:

        async def one(index: int) -> None:
            stream = await client.completions.create(
                model=source.choice(("base", "sql", "json", "sql+json*0.5")),
                prompt=PROMPT,
                max_tokens=60,
                stream=True,
                n=source.choice((1, 1, 2)),
                extra_body={"ignore_eos": True},
            )
            left = source.choice((0, 1, 5, 20, 1000))
            async for _ in stream:
                if left == 0:
                    break
                left -= 1
            await stream.close()

        await asyncio.gather(*map(one, range(count)))
    with connect(server) as sync:
        # This request is answered after all others, so their leftovers would still be visible.
        after = sync.completions.create(model="json", prompt=PROMPT, **GREEDY).choices[0].text
    assert after == before
    # The engine releases a request at its next step, after the client's last byte.
    states = [("turret_sequences", frozenset({("state", each)})) for each in ("running", "waiting")]
    states.append(("turret_kv_blocks", frozenset({("state", "used")})))
    end = time.monotonic() + 20
    while any(map(server.metrics("watch").get, states)):
        assert time.monotonic() < end, "sequences are left"
        await asyncio.sleep(0.1)
    with connect(server, "rule") as admin:
        url = str(admin.base_url.copy_with(path="/console/state"))
        state = admin.get(url, cast_to=dict[str, Any])
    assert [adapter["in_flight"] for adapter in state["adapters"]["shown"]] == [0, 0]
    # Connections close a moment after their clients.
    process = psutil.Process(server.process.pid)
    port = int(server.http_address.rpartition(":")[2])
    while True:
        left = [one for one in process.net_connections() if one.laddr.port == port and one.raddr]
        if len(left) <= 2:
            break
        assert time.monotonic() < end, f"{len(left)} connections are left"
        await asyncio.sleep(0.1)
