"""Arguments of the Python clients: their forms, and invalid ones, reported before any call."""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import Callable, Mapping, Sequence
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
    ask: Callable[..., Any], error: type[Exception], values: Mapping[str, Sequence[Any]]
) -> list[Row]:
    """A call for each value; the key is the place in the error, which begins with the argument."""
    return [
        (functools.partial(ask, **{place.partition("[")[0]: value}), error, place)
        for place, wrong in values.items()
        for value in wrong
    ]


INVALID: list[Row] = [
    *each(
        lambda client, **given: client.generate("a", **given),
        TypeError,
        {
            "adapters": [5],
            "choice": [3],
            "choice[1]": [["a", None]],
            "continue_final_message": [True],
            "echo": [1],
            "ignore_eos": ["no"],
            "json_schema": [5, {"type": object}],
            "logit_bias": [[1], {5: "b"}],
            "max_tokens": ["2"],
            "regex": [b"abc"],
            "request_id": [b"abc"],
            "stop": [3],
            "stop[0]": [[b"abc"]],
            "stop[1]": [["a", 3]],
            "stop_token_ids": [3, [1, "b"], [1.5]],
            "temperature": ["hot"],
            "timeout": ["1"],
            "tools": [[{"function": {"name": "f"}}]],
        },
    ),
    *each(
        lambda client, **given: client.chat("a", **given),
        TypeError,
        {
            "chat_template_kwargs": [5],
            "tools": [5],
            "tools[0]": [["f"], [{"function": {}}]],
            "tools[0].function.name": [[{"function": {"name": b"x"}}]],
            "tools[0].function.description": [[{"function": {"name": "x", "description": 5}}]],
            "tools[0].function.parameters": [
                [{"function": {"name": "x", "parameters": {"a": object}}}]
            ],
        },
    ),
    *each(
        lambda client, **given: client.chat("a", **given),
        ValueError,
        {
            "logit_bias": [{-1: 0.0}, {5: 10**400}],
            "temperature": [10**400],
            "timeout": [-1],
            "tools[0].function.name": [[{"function": {"name": "caf\udcff"}}]],
            "top_k": [-1],
        },
    ),
    *each(
        lambda client, adapters: client.score("a", adapters=adapters),
        TypeError,
        {"adapters": [[3], [("sql", "1")], None, b"sql", {"sql": "0.5"}, {3: 0.5}]},
    ),
    *each(
        lambda client, adapters: client.score("a", adapters=adapters),
        ValueError,
        {
            "adapters": [
                ("sql", 10**400),
                AdapterWeight("sql", generation=-1),
                "caf\udcff",
                "json+sql",
                "json=0.5",
                {"sql=2": 1.0},
            ]
        },
    ),
    *each(
        lambda client, **given: TurretClient(**given),
        TypeError,
        {
            "address": [3],
            "admin_address": [b"a:1"],
            "resume": ["no"],
            "timeout": [True],
            "tls": [True],
            "token": [3],
        },
    ),
    *each(
        lambda client, **given: TurretClient(**given),
        ValueError,
        {"max_retries": [-1], "timeout": [-1], "token": ["ü"]},
    ),
    (lambda client: client.adapters.export("a", 5), TypeError, "directory"),
    (lambda client: client.adapters.fuse(None, "a"), TypeError, "name"),
    (lambda client: client.adapters.fuse("both", "sql", rank=-1), ValueError, "rank"),
    (lambda client: client.adapters.get("a", timeout=0), ValueError, "timeout"),
    (lambda client: client.adapters.list(method=b"lora"), TypeError, "method"),
    (lambda client: client.adapters.list(page_size="5"), TypeError, "page_size"),
    (lambda client: client.adapters.list(residency="moon"), ValueError, "residency"),
    (lambda client: client.adapters.load("a", "b", pinned="c"), TypeError, "pinned"),
    (lambda client: client.adapters.load("a", 3), TypeError, "path"),
    (lambda client: client.adapters.load(None, "a"), TypeError, "name"),
    (lambda client: client.adapters.replace("a", 3), TypeError, "path"),
    (lambda client: client.adapters.unload("a", drain_seconds="x"), TypeError, "drain_seconds"),
    *each(
        lambda client, **given: client.adapters.unload("a", **given),
        ValueError,
        {"drain_seconds": [math.nan, math.inf, 1e30, 10**400]},
    ),
    (lambda client: client.adapters.unload("a", mode=3), TypeError, "mode"),
    (lambda client: client.adapters.unload("a", mode="x"), ValueError, "mode"),
    # Protobuf accepts bytes that are valid UTF-8 as text.
    *each(
        lambda client, name: client.adapters.unload(name),
        TypeError,
        {"name": [b"\xff", b"sql", None, 3]},
    ),
    (lambda client: client.adapters.upload("a", 5), TypeError, "directory"),
    (lambda client: client.adapters.upload(b"a", "a"), TypeError, "name"),
    (lambda client: client.chat([]), ValueError, "messages"),
    (lambda client: client.classify("a", adapters="b", request_id=3), TypeError, "request_id"),
    (lambda client: client.embed("a", dimensions=-1), ValueError, "dimensions"),
    (lambda client: client.embed("a", dimensions="b"), TypeError, "dimensions"),
    (lambda client: client.embed("a", normalize="b"), TypeError, "normalize"),
    (lambda client: client.embed("a", pooling="b"), ValueError, "pooling"),
    (lambda client: client.embed("a", pooling=["b"]), TypeError, "pooling"),
    *each(
        lambda client, inputs: client.embed(inputs),
        TypeError,
        {
            "inputs": [3],
            # A single prompt is not a list of prompts.
            "inputs[0]": [[5, 6], np.array([5, 6]), [USER], [USER, USER]],
            "inputs[1]": [["a", 5]],
        },
    ),
    (lambda client: client.generate([1, -1]), ValueError, "prompt"),
    (lambda client: client.score("a", top_n="b"), TypeError, "top_n"),
    (lambda client: AdapterWeight.parse(5), TypeError, "text"),  # type: ignore[arg-type]
    (lambda client: RetryPolicy(-1), ValueError, "max_retries"),
    (lambda client: Tls(certificate=b"-----BEGIN CERTIFICATE-----"), ValueError, "key"),
    (lambda client: Tls(key=b"-----BEGIN PRIVATE KEY-----"), ValueError, "certificate"),
    (lambda client: Tls.from_files(ca=5), TypeError, "ca"),  # type: ignore[arg-type]
    (lambda client: Tls.from_files(key=b"secret"), TypeError, "key"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("ask", "error", "place"), INVALID)
def test_an_invalid_argument_is_reported_by_name(
    client: TurretClient, server: FakeTurret, ask: Any, error: type[Exception], place: str
):
    with pytest.raises(error) as raised:
        ask(client)
    assert str(raised.value).startswith(f"{place}: ")
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
    ("turn", "place"),
    [
        ({"role": "tool", "content": "x", "tool_call_id": 5}, ".tool_call_id"),
        ({**USER, "tool_calls": 5}, ".tool_calls"),
        ({**USER, "tool_calls": [{"id": 1, **CALL}]}, ".tool_calls[0].id"),
        ({**USER, "tool_calls": ["x"]}, ".tool_calls[0]"),
        ({"role": "assistant", "tool_calls": [{}]}, ".tool_calls[0]"),
        (
            {**USER, "tool_calls": [{"function": {"name": "x", "arguments": {}}}]},
            ".tool_calls[0].function.arguments",
        ),
        ({"role": 5, "content": "x"}, ".role"),
        ({"role": "user", "content": 5}, ".content"),
        ({"role": "user", "content": 0}, ".content"),
        ({"role": "user", "content": b"x"}, ".content"),
        ({"role": "user", "content": None}, ".content"),
        ({"role": "user", "content": [{"type": "image_url"}]}, ".content[0]"),
        ({**USER, "refusal": "no"}, ""),
        ({"content": "x"}, ""),
        ({"role": "user"}, ""),
        (("user", 5), ""),
        (5, ""),
    ],
)
def test_an_invalid_turn_is_reported_with_its_index(client: TurretClient, turn: Any, place: str):
    for ask in (client.chat, client.generate, client.tokenize):
        with pytest.raises(TypeError) as raised:
            ask([USER, turn])
        assert str(raised.value).startswith(f"messages[1]{place}: ")
    with pytest.raises(TypeError) as raised:
        client.embed(["a", [USER, turn]])
    assert str(raised.value).startswith(f"inputs[1][1]{place}: ")


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
