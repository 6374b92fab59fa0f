"""Arguments of the Python clients: their forms, and invalid ones, reported before any call."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from said import says
from servers.fake_turret import SAME, FakeTurret

from turret.clients.aio import AsyncTurretClient
from turret.clients.calls import RetryPolicy
from turret.clients.channel import Tls
from turret.clients.client import AdapterWeight, TurretClient
from turret.v1 import inference_pb2

USER = {"role": "user", "content": "hi"}
CALL = {"type": "function", "function": {"name": "find", "arguments": "{}"}}
Row = tuple[Callable[[Any], Any], type[Exception], str]


def each(
    ask: Callable[[Any, Any], Any], error: type[Exception], rows: Iterable[tuple[Any, str]]
) -> list[Row]:
    """A call with each of some values, and the beginning of its error."""
    return [(lambda client, value=value: ask(client, value), error, said) for value, said in rows]


INVALID: list[Row] = [
    *each(
        lambda client, options: client.generate("a", **options),
        TypeError,
        [
            ({"adapters": 5}, "adapters: "),
            ({"choice": 3}, "choice: "),
            ({"choice": ["a", None]}, "choice[1]: "),
            ({"continue_final_message": True}, "continue_final_message: "),
            ({"echo": 1}, "echo: "),
            ({"ignore_eos": "no"}, "ignore_eos: "),
            ({"json_schema": 5}, "json_schema: "),
            ({"json_schema": {"type": object}}, "json_schema: "),
            ({"logit_bias": [1]}, "logit_bias: "),
            ({"logit_bias": {5: "b"}}, "logit_bias: "),
            ({"max_tokens": "2"}, "max_tokens: "),
            ({"regex": b"abc"}, "regex: "),
            ({"request_id": b"abc"}, "request_id: "),
            ({"stop": 3}, "stop: "),
            ({"stop": ["a", 3]}, "stop[1]: "),
            ({"stop": [b"abc"]}, "stop[0]: "),
            ({"stop_token_ids": 3}, "stop_token_ids: "),
            ({"stop_token_ids": [1, "b"]}, "stop_token_ids: "),
            ({"stop_token_ids": [1.5]}, "stop_token_ids: "),
            ({"temperature": "hot"}, "temperature: "),
            ({"timeout": "1"}, "timeout: "),
            ({"tools": [{"function": {"name": "f"}}]}, "tools: "),
        ],
    ),
    *each(
        lambda client, options: client.chat("a", **options),
        TypeError,
        [
            ({"chat_template_kwargs": 5}, "chat_template_kwargs: "),
            ({"tools": 5}, "tools: "),
            ({"tools": ["f"]}, "tools[0]: "),
            ({"tools": [{"function": {}}]}, "tools[0]: "),
            ({"tools": [{"function": {"name": b"x"}}]}, "tools[0].function.name: "),
            (
                {"tools": [{"function": {"name": "x", "description": 5}}]},
                "tools[0].function.description: ",
            ),
            (
                {"tools": [{"function": {"name": "x", "parameters": {"a": object}}}]},
                "tools[0].function.parameters: ",
            ),
        ],
    ),
    *each(
        lambda client, options: client.chat("a", **options),
        ValueError,
        [
            ({"logit_bias": {-1: 0.0}}, "logit_bias: "),
            ({"logit_bias": {5: 10**400}}, "logit_bias: "),
            ({"temperature": 10**400}, "temperature: "),
            ({"timeout": -1}, "timeout: "),
            ({"tools": [{"function": {"name": "caf\udcff"}}]}, "tools[0].function.name: "),
            ({"top_k": -1}, "top_k: "),
        ],
    ),
    *each(
        lambda client, adapters: client.score("a", adapters=adapters),
        TypeError,
        [
            ([3], "adapters: "),
            ([("sql", "1")], "adapters: "),
            (None, "adapters: "),
            (b"sql", "adapters: "),
            ({"sql": "0.5"}, "adapters: "),
            ({3: 0.5}, "adapters: "),
        ],
    ),
    *each(
        lambda client, adapters: client.score("a", adapters=adapters),
        ValueError,
        [
            (("sql", 10**400), "adapters: "),
            (AdapterWeight("sql", generation=-1), "adapters: "),
            ("caf\udcff", "adapters: "),
            ("json+sql", "adapters: "),
            ("json=0.5", "adapters: "),
            ({"sql=2": 1.0}, "adapters: "),
        ],
    ),
    *each(
        lambda client, kind: TurretClient(**kind),
        TypeError,
        [
            ({"address": 3}, "address: "),
            ({"admin_address": b"a:1"}, "admin_address: "),
            ({"resume": "no"}, "resume: "),
            ({"timeout": True}, "timeout: "),
            ({"tls": True}, "tls: "),
            ({"token": 3}, "token: "),
        ],
    ),
    *each(
        lambda client, kind: TurretClient(**kind),
        ValueError,
        [
            ({"max_retries": -1}, "max_retries: "),
            ({"timeout": -1}, "timeout: "),
            ({"token": "ü"}, "token: "),
        ],
    ),
    (lambda client: client.adapters.export("a", 5), TypeError, "directory: "),
    (lambda client: client.adapters.fuse(None, "a"), TypeError, "name: "),
    (lambda client: client.adapters.fuse("both", "sql", rank=-1), ValueError, "rank: "),
    (lambda client: client.adapters.get("a", timeout=0), ValueError, "timeout: "),
    (lambda client: client.adapters.list(method=b"lora"), TypeError, "method: "),
    (lambda client: client.adapters.list(page_size="5"), TypeError, "page_size: "),
    (lambda client: client.adapters.list(residency="moon"), ValueError, "residency: "),
    (lambda client: client.adapters.load("a", "b", pinned="c"), TypeError, "pinned: "),
    (lambda client: client.adapters.load("a", 3), TypeError, "path: "),
    (lambda client: client.adapters.load(None, "a"), TypeError, "name: "),
    (lambda client: client.adapters.replace("a", 3), TypeError, "path: "),
    (lambda client: client.adapters.unload("a", drain_seconds="x"), TypeError, "drain_seconds: "),
    *each(
        lambda client, seconds: client.adapters.unload("a", drain_seconds=seconds),
        ValueError,
        [(seconds, "drain_seconds: ") for seconds in (math.nan, math.inf, 1e30, 10**400)],
    ),
    (lambda client: client.adapters.unload("a", mode=3), TypeError, "mode: "),
    (lambda client: client.adapters.unload("a", mode="x"), ValueError, "mode: "),
    # Protobuf accepts bytes that are valid UTF-8 as text.
    *each(
        lambda client, name: client.adapters.unload(name),
        TypeError,
        [(name, "name: ") for name in (b"\xff", b"sql", None, 3)],
    ),
    (lambda client: client.adapters.upload("a", 5), TypeError, "directory: "),
    (lambda client: client.adapters.upload(b"a", "a"), TypeError, "name: "),
    (lambda client: client.chat([]), ValueError, "messages: "),
    (
        lambda client: client.classify("a", adapters="b", request_id=3),
        TypeError,
        "request_id: ",
    ),
    (lambda client: client.embed("a", dimensions=-1), ValueError, "dimensions: "),
    (lambda client: client.embed("a", dimensions="b"), TypeError, "dimensions: "),
    (lambda client: client.embed("a", normalize="b"), TypeError, "normalize: "),
    (lambda client: client.embed("a", pooling="b"), ValueError, "pooling: "),
    (lambda client: client.embed("a", pooling=["b"]), TypeError, "pooling: "),
    *each(
        lambda client, inputs: client.embed(inputs),
        TypeError,
        [
            (3, "inputs: "),
            # A single prompt is not a list of prompts.
            *((one, "inputs[0]: ") for one in ([5, 6], np.array([5, 6]), [USER], [USER, USER])),
            (["a", 5], "inputs[1]: "),
        ],
    ),
    (lambda client: client.generate([1, -1]), ValueError, "prompt: "),
    (lambda client: client.score("a", top_n="b"), TypeError, "top_n: "),
    (lambda client: AdapterWeight.parse(5), TypeError, "text: "),  # type: ignore[arg-type]
    (lambda client: RetryPolicy(-1), ValueError, "max_retries: "),
    (lambda client: Tls(certificate=b"-----BEGIN CERTIFICATE-----"), ValueError, "key: "),
    (lambda client: Tls(key=b"-----BEGIN PRIVATE KEY-----"), ValueError, "certificate: "),
    (lambda client: Tls.from_files(ca=5), TypeError, "ca: "),  # type: ignore[arg-type]
    (lambda client: Tls.from_files(key=b"secret"), TypeError, "key: "),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("ask", "error", "said"), INVALID)
def test_an_invalid_argument_is_reported_by_name(
    client: TurretClient, server: FakeTurret, ask: Any, error: type[Exception], said: str
):
    with pytest.raises(error) as raised:
        ask(client)
    assert str(raised.value).startswith(said)
    assert not [*server.inference.requests, *server.adapters.requests]


async def test_every_way_to_ask_reports_an_invalid_argument(client: TurretClient):
    wrong: Any = {"max_tokens": "2"}
    async with AsyncTurretClient("127.0.0.1:1") as other:
        for ask in (
            lambda: client.generate_stream("a", **wrong),
            lambda: client.chat("a", **wrong),
            lambda: other.generate_stream("a", **wrong),
        ):
            with pytest.raises(TypeError, match=r"^max_tokens: "):
                ask()
        with pytest.raises(TypeError, match=r"^max_tokens: "):
            await other.generate("a", **wrong)
    # The error is raised before a channel is opened.
    with pytest.raises(ValueError, match=r"^address: "):
        AsyncTurretClient("localhost")


def test_the_error_shows_what_was_meant(client: TurretClient):
    asked: Any = client
    for call, error, said in (
        (lambda: asked.generate("a", max_token=3), TypeError, '"max_token".*"max_tokens"'),
        (lambda: asked.chat([{**USER, "nmae": "b"}]), TypeError, "nmae"),
        (lambda: asked.chat("a", regex="b", choice=["b"]), ValueError, " regex, choice"),
        (lambda: asked.adapters.unload("a", mode="x"), ValueError, ' drain, force, .*"x"$'),
        (lambda: asked.adapters.list(residency="moon"), ValueError, "disk, host, device"),
        (lambda: asked.score("a", adapters={"sql": "0.5"}), TypeError, r"\('sql', '0.5'\)"),
        (lambda: asked.score("a", adapters=("sql", 10**400)), ValueError, "int too large"),
    ):
        with pytest.raises(error, match=said):
            call()


@pytest.mark.parametrize(
    ("turn", "complaint"),
    [
        ({"role": "tool", "content": "x", "tool_call_id": 5}, ".tool_call_id: "),
        ({**USER, "tool_calls": 5}, ".tool_calls: "),
        ({**USER, "tool_calls": [{"id": 1, **CALL}]}, ".tool_calls[0].id: "),
        ({**USER, "tool_calls": ["x"]}, ".tool_calls[0]: "),
        ({"role": "assistant", "tool_calls": [{}]}, ".tool_calls[0]: "),
        (
            {**USER, "tool_calls": [{"function": {"name": "x", "arguments": {}}}]},
            ".tool_calls[0].function.arguments: ",
        ),
        ({"role": 5, "content": "x"}, ".role: "),
        ({"role": "user", "content": 5}, ".content: "),
        ({"role": "user", "content": 0}, ".content: "),
        ({"role": "user", "content": b"x"}, ".content: "),
        ({"role": "user", "content": None}, ".content: "),
        ({"role": "user", "content": [{"type": "image_url"}]}, ".content[0]: "),
        ({**USER, "refusal": "no"}, ": "),
        ({"content": "x"}, ": "),
        ({"role": "user"}, ": "),
        (("user", 5), ": "),
        (5, ": "),
    ],
)
def test_an_invalid_turn_is_reported_with_its_index(
    client: TurretClient, turn: Any, complaint: str
):
    for ask in (client.chat, client.generate, client.tokenize):
        with pytest.raises(TypeError) as raised:
            ask([USER, turn])
        assert str(raised.value).startswith(f"messages[1]{complaint}")
    with pytest.raises(TypeError) as raised:
        client.embed(["a", [USER, turn]])
    assert str(raised.value).startswith(f"inputs[1][1]{complaint}")


def test_a_single_turn_is_not_accepted_as_a_conversation(client: TurretClient):
    for turn in (USER, ("user", "hi"), inference_pb2.ChatMessage(role="user")):
        for ask, name in ((client.chat, "messages"), (client.generate, "prompt")):
            with pytest.raises(TypeError) as raised:
                ask(turn)  # type: ignore[arg-type]
            assert str(raised.value).startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        ([5, None], "[5, None]"),
        ([5, 6.0], "[5, 6.0]"),
        ([1, "a"], "[1, 'a']"),
        (None, "None"),
        (5, "5"),
        (["hi", "a"], "['hi', 'a']"),
        (np.array([5.0]), "[np.float64(5.0)]"),
        (np.array(5), "array(5)"),
        (b"a", "b'a'"),
    ],
)
def test_an_invalid_prompt_is_reported_with_its_argument(
    client: TurretClient, prompt: Any, complaint: str
):
    with pytest.raises(TypeError) as raised:
        client.generate(prompt)
    assert str(raised.value).startswith("prompt: ")
    assert complaint in str(raised.value)
    for ask in (client.embed, lambda inputs: client.classify(inputs, adapters="a")):
        with pytest.raises(TypeError) as raised:
            ask(["a", prompt])
        assert str(raised.value).startswith("inputs[1]: ")
        assert complaint in str(raised.value)


def test_a_message_may_be_a_dumped_openai_message(client: TurretClient, server: FakeTurret):
    """The message has the form of ``ChatCompletionMessage.model_dump()`` in the openai package."""
    filled = {**dict.fromkeys(("refusal", "audio", "tool_calls")), "annotations": []}
    asked = [
        {"role": "user", "name": "Nora", "content": [{"type": "text", "text": t} for t in "ab"]},
        {
            "role": "assistant",
            "content": "c",
            "annotations": [],
            "reasoning_content": "d",
            **filled,
        },
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", **CALL}, CALL]},
        {"role": "assistant", "content": None, **filled},
        {"role": "tool", "content": "e", "tool_call_id": "1"},
    ]
    client.chat(asked)
    turns = server.inference.requests[-1].chat.messages
    assert [turn.role for turn in turns] == [turn["role"] for turn in asked]
    assert [turn.content for turn in turns] == ["ab", "c", "", "", "e"]
    assert [(c.id, c.name, c.arguments) for c in turns[2].tool_calls] == [
        ("1", "find", "{}"),
        ("", "find", "{}"),
    ]
    assert turns[4].tool_call_id == "1"


@pytest.mark.parametrize(
    "ids", [np.array([5, 6]), [np.int64(5), np.uint8(6)], (5, 6), range(5, 7), iter([5, 6])]
)
def test_any_integers_are_accepted_as_token_ids(client: TurretClient, server: FakeTurret, ids: Any):
    client.generate(ids)
    assert list(server.inference.requests[-1].token_ids.ids) == [5, 6]


def test_a_tensor_is_accepted_as_token_ids(client: TurretClient, server: FakeTurret):
    torch = pytest.importorskip("torch")
    client.embed(torch.tensor([[5, 6], [7, 8]]))
    inputs = server.inference.requests[-1].inputs
    assert [list(each.token_ids.ids) for each in inputs] == [[5, 6], [7, 8]]


def test_a_mapping_is_a_mix_with_its_weights(client: TurretClient, server: FakeTurret):
    mix = {"sql": 0.5, "json": -1}
    members = [("sql", 0.5), ("json", -1.0)]

    async def ask_async() -> None:
        async with AsyncTurretClient(server.address) as own:
            await own.generate("a", adapters=mix)
            await own.embed("a", adapters=mix)
            await own.adapters.fuse("f", mix)

    used = client.generate("a", adapters=mix).adapters_used
    assert [(use.name, use.weight) for use in used] == members
    list(client.generate_stream("a", adapters=mix))
    client.chat("a", adapters=mix)
    client.score("a", adapters=mix)
    client.embed("a", adapters=mix)
    client.classify("a", adapters=mix)
    client.adapters.fuse("f", mix)
    client.adapters.merge(mix)
    asyncio.run(ask_async())
    asked = [*server.inference.requests, *server.adapters.requests]
    assert len(asked) == 11
    assert all([(a.name, a.weight) for a in request.adapters] == members for request in asked)
    assert not client.generate("a", adapters={}).adapters_used


def test_a_member_of_a_mix_can_be_printed_with_numpy_numbers():
    assert str(AdapterWeight("json", np.float32(0.5), 2)) == "json@2=0.5"  # type: ignore[arg-type]


def test_paths_may_be_pathlib_paths(client: TurretClient, server: FakeTurret):
    client.adapters.load("new", Path("a") / "b")
    assert server.adapters.requests[-1].path == str(Path("a") / "b")
    assert client.adapters.replace("new", Path(SAME)).generation == 1


def test_an_asyncio_client_requires_its_own_event_loop(server: FakeTurret):
    with pytest.raises(RuntimeError, check=says("NO_EVENT_LOOP")):
        AsyncTurretClient(server.address)

    async def make() -> AsyncTurretClient:
        return AsyncTurretClient(server.address)

    client = asyncio.run(make())
    with pytest.raises(RuntimeError, check=says("NO_EVENT_LOOP")):
        client.generate_stream("a")
    for ask in (
        client.get_model,
        lambda: client.adapters.get("sql"),
        lambda: anext(client.adapters.list()),
    ):

        async def elsewhere(ask: Callable[[], Any] = ask) -> None:
            await ask()

        with pytest.raises(RuntimeError, check=says("OTHER_EVENT_LOOP")):
            asyncio.run(elsewhere())
