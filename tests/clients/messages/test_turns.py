"""Prompts in all forms: OpenAI's messages, arrays of token ids, and invalid values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from servers.fake_turret import FakeTurret

from turret.clients.client import AdapterWeight, Tls, TurretClient
from turret.v1 import inference_pb2

USER = {"role": "user", "content": "hi"}
CALL = {"type": "function", "function": {"name": "find", "arguments": "{}"}}


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
    ("turn", "complaint"),
    [
        ({"role": "tool", "content": "x", "tool_call_id": 5}, ".tool_call_id: "),
        ({**USER, "tool_calls": 5}, ".tool_calls: "),
        ({**USER, "tool_calls": [{"id": 1, **CALL}]}, ".tool_calls[0].id: "),
        ({**USER, "tool_calls": ["x"]}, ".tool_calls[0]: "),
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


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        ([5, None], "[5, None]"),
        ([5, 6.0], "[5, 6.0]"),
        (None, "None"),
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


def test_a_single_turn_is_not_accepted_as_a_conversation(client: TurretClient):
    for turn in (USER, ("user", "hi"), inference_pb2.ChatMessage(role="user")):
        for ask, name in ((client.chat, "messages"), (client.generate, "prompt")):
            with pytest.raises(TypeError) as raised:
                ask(turn)  # type: ignore[arg-type]
            assert str(raised.value).startswith(f"{name}: ")


def test_a_single_prompt_is_not_accepted_as_a_list_of_prompts(client: TurretClient):
    for inputs in ([5, 6], np.array([5, 6]), [USER], [USER, USER]):
        with pytest.raises(TypeError, match=r"^inputs\[0\]: "):
            client.embed(inputs)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^inputs\[1\]: .* 5$"):
        client.embed(["a", 5])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"regex": b"abc"}, "regex: "),
        ({"request_id": b"abc"}, "request_id: "),
        ({"stop": [b"abc"]}, "stop[0]: "),
        ({"stop_token_ids": [1.5]}, "stop_token_ids: "),
        ({"tools": [{"function": {"name": b"x"}}]}, "tools[0].function.name: "),
        ({"tools": [{"function": {}}]}, "tools[0]: "),
        (
            {"tools": [{"function": {"name": "caf\udcff"}}]},
            "tools[0].function.name: ",
        ),
        ({"temperature": 10**400}, "temperature: "),
        ({"logit_bias": {5: 10**400}}, "logit_bias: "),
    ],
)
def test_an_invalid_option_is_reported_by_name(client: TurretClient, options: Any, complaint: str):
    with pytest.raises((TypeError, ValueError)) as raised:
        client.chat("a", **options)
    assert str(raised.value).startswith(complaint)


def test_invalid_administration_and_tls_arguments_are_reported_by_name(client: TurretClient):
    asked: Any = client
    kind: Any = Tls
    for call, complaint in (
        (lambda: asked.adapters.load(None, "a"), "name: "),
        (lambda: asked.adapters.fuse(None, "a"), "name: "),
        (lambda: asked.adapters.upload(b"a", "a"), "name: "),
        (lambda: asked.adapters.list(method=b"lora"), "method: "),
        (lambda: kind.from_files(ca=5), "ca: "),
        (lambda: kind.from_files(key=b"secret"), "key: "),
        (
            lambda: kind(certificate=b"-----BEGIN CERTIFICATE-----"),
            "key: ",
        ),
        (lambda: kind(key=b"-----BEGIN PRIVATE KEY-----"), "certificate: "),
        (lambda: TurretClient(admin_address=""), "admin_address: "),
        (lambda: TurretClient(admin_address="localhost"), "admin_address: "),
        (lambda: TurretClient(admin_address=b"a:1"), "admin_address: "),  # type: ignore[arg-type]
        (lambda: TurretClient(max_retries=-1), "max_retries: "),
    ):
        with pytest.raises((TypeError, ValueError)) as raised:
            call()
        assert str(raised.value).startswith(complaint)


def test_a_member_of_a_mix_can_be_printed_with_numpy_numbers():
    assert str(AdapterWeight("json", np.float32(0.5), 2)) == "json@2=0.5"  # type: ignore[arg-type]
