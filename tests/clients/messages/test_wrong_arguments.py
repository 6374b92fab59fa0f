"""Invalid arguments of the Python clients, and errors without repetitions."""

from __future__ import annotations

import argparse
import asyncio
import math
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from said import says
from servers.fake_turret import SAME, FakeTurret

from turret.clients import channel
from turret.clients.aio import AsyncTurretClient
from turret.clients.client import TurretClient, TurretRpcError
from turret.clients.errors import (
    HINTS,
    FieldViolation,
    InvalidArgumentError,
    UnavailableError,
    cause_of,
)
from turret.clients.messages.fields import ArgumentValueError, argument
from turret.clients.verbs import add_verbs
from turret.clients.verbs.command import as_typed, print_error
from turret.clients.words import Text, say
from turret.v1 import inference_pb2

LONG = "a" * 5_000_000


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"address": 3}, TypeError, "address: "),
        ({"address": "localhost"}, ValueError, "address: "),
        ({"admin_address": "http://a:1"}, ValueError, "admin_address: .http://a:1"),
        ({"tls": True}, TypeError, "tls: "),
        ({"token": 3}, TypeError, "token: "),
        ({"token": "ü"}, ValueError, "token: "),
        ({"timeout": -1}, ValueError, "timeout: "),
        ({"timeout": True}, TypeError, "timeout: "),
        ({"resume": "no"}, TypeError, "resume: "),
    ],
)
def test_a_client_reports_the_invalid_argument(arguments, error, text):
    with pytest.raises(error, match=text):
        TurretClient(**arguments)
    if "address" in arguments:
        # The error is raised before a channel is opened.
        with pytest.raises(error, match=text):
            AsyncTurretClient(**arguments)


def test_administrative_calls_report_the_invalid_argument(client: TurretClient):
    for call in (
        lambda: client.adapters.load("a", 3),  # type: ignore[arg-type]
        lambda: client.adapters.replace("a", 3),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError, match=r"^path: .* 3 "):
            call()
    with pytest.raises(TypeError, match=r"^name: .* 3$"):
        client.adapters.unload(3)  # type: ignore[arg-type]
    for client_call, complaint in (
        (lambda: client.adapters.unload("a", drain_seconds="x"), "drain_seconds: "),  # type: ignore[arg-type]
        (lambda: client.adapters.unload("a", mode=3), "mode: "),  # type: ignore[arg-type]
        (lambda: client.adapters.upload("a", 5), "directory: "),  # type: ignore[arg-type]
        (lambda: client.adapters.export("a", 5), "directory: "),  # type: ignore[arg-type]
        (lambda: client.adapters.list(method=5), "method: "),  # type: ignore[arg-type]
        (lambda: client.adapters.list(page_size="5"), "page_size: "),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError, match=f"^{complaint}"):
            client_call()
    for seconds in (math.nan, math.inf, 1e30, 10**400):
        said = f"^drain_seconds: .*{re.escape(str(seconds)[:60])}"
        with pytest.raises(ValueError, match=said):
            client.adapters.unload("a", drain_seconds=seconds)
    with pytest.raises(ValueError, match=r'^mode: .* drain, force, .*"x"$'):
        client.adapters.unload("a", mode="x")
    # Protobuf accepts bytes that are valid UTF-8 as text.
    for name in (b"\xff", b"sql", None):
        with pytest.raises(TypeError, match=f"^name: .* {re.escape(repr(name))}$"):
            client.adapters.unload(name)  # type: ignore[arg-type]
    assert client.adapters.get("sql").name == "sql"


@pytest.mark.parametrize(
    ("prompt", "options", "complaint"),
    [
        ("a", {"json_schema": {"type": object}}, "json_schema: "),
        ("a", {"tools": 5}, "tools: "),
        ("a", {"stop": 3}, "stop: "),
        ("a", {"stop_token_ids": 3}, "stop_token_ids: "),
        ("a", {"choice": 3}, "choice: "),
        ("a", {"logit_bias": [1]}, "logit_bias: "),
        ("a", {"max_tokens": "2"}, "max_tokens: "),
        ("a", {"temperature": "hot"}, "temperature: "),
        ("a", {"json_schema": 5}, "json_schema: "),
        ("a", {"echo": 1}, "echo: "),
        ("a", {"ignore_eos": "no"}, "ignore_eos: "),
        ("a", {"stop": ["a", 3]}, r"stop\[1\]: "),
        ("a", {"choice": ["a", None]}, r"choice\[1\]: "),
        ("a", {"stop_token_ids": [1, "b"]}, "stop_token_ids: "),
        ("a", {"logit_bias": {5: "b"}}, "logit_bias: "),
        (["hi"], {}, r"prompt: "),
        (
            [("user", "a")],
            {"tools": [{"function": {"name": "x", "parameters": {"a": object}}}]},
            r"tools\[0\].function.parameters: ",
        ),
        (
            [("user", "a")],
            {"tools": [{"function": {"name": "x", "description": 5}}]},
            r"tools\[0\].function.description: ",
        ),
    ],
)
def test_generate_reports_the_invalid_argument(client: TurretClient, prompt, options, complaint):
    for ask in (client.generate, client.generate_stream):
        with pytest.raises(TypeError, match=f"^{complaint}"):
            ask(prompt, **options)

    async def ask_async() -> None:
        async with AsyncTurretClient("127.0.0.1:1") as other:
            with pytest.raises(TypeError, match=f"^{complaint}"):
                await other.generate(prompt, **options)

    asyncio.run(ask_async())


def test_other_calls_report_the_invalid_argument(client: TurretClient):
    asked: Any = client
    for call, complaint in (
        (lambda: asked.score("a", top_n="b"), "top_n: "),
        (lambda: asked.embed("a", dimensions="b"), "dimensions: "),
        (lambda: asked.embed("a", normalize="b"), "normalize: "),
        (lambda: asked.embed("a", pooling=["b"]), r"pooling: "),
        (lambda: asked.classify("a", adapters="b", request_id=3), "request_id: "),
        (lambda: asked.adapters.load("a", "b", pinned="c"), "pinned: "),
    ):
        with pytest.raises(TypeError, match=f"^{complaint}"):
            call()
    for call, complaint in (
        (lambda: asked.generate("a", timeout=-1), "timeout: "),
        (lambda: asked.generate_stream("a", timeout=math.nan), "timeout: "),
        (lambda: asked.adapters.get("a", timeout=0), "timeout: "),
        (lambda: asked.embed("a", pooling="b"), "pooling: "),
        (lambda: asked.chat("a", regex="b", choice=["b"]), ".* regex, choice"),
        (lambda: asked.chat([]), "messages: "),
    ):
        with pytest.raises(ValueError, match=f"^{complaint}"):
            call()


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


def refusal(found: dict[str, str]) -> TurretRpcError:
    """The error of a server with these violations."""
    said = "; ".join(f"{field}: {why}" for field, why in found.items())
    bad = [{"field": field, "description": why} for field, why in found.items()]
    status = status_pb2.Status(code=grpc.StatusCode.INVALID_ARGUMENT.value[0], message=said)
    for detail in (
        error_details_pb2.ErrorInfo(reason="INVALID_REQUEST", domain="turret"),
        error_details_pb2.BadRequest(field_violations=bad),
    ):
        status.details.add().Pack(detail)

    class Failure(grpc.RpcError):
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.INVALID_ARGUMENT

        def details(self) -> str:
            return said

        def trailing_metadata(self) -> Any:
            return (("grpc-status-details-bin", status.SerializeToString()),)

    return TurretRpcError.from_grpc(Failure())


REFUSED = {
    "stop.min_tokens": "must be <= stop.max_tokens",
    "stop.stop_strings": "at most 8 entries",
    "adapters[1].name": "'json' occurs twice",
    "timeout": "must be in [0, 3600] seconds",
    "inputs[0]": "the prompt has no tokens",
    "inputs[1].token_ids.ids[2]": "9 is not in [0, 9)",
    "inputs[2].chat": "this model has no chat template",
    "chat.messages[0].role": "is none",
    "choice.texts": "at least one",
    "header.name": "must be shorter",
    "token_ids.ids": "is empty",
}


def test_refusals_name_the_arguments_that_were_given():
    error = refusal(REFUSED)
    said = {
        "min_tokens": "must be <= stop.max_tokens",
        "stop": "at most 8 entries",
        "adapters[1].name": "'json' occurs twice",
        "drain_seconds": "must be in [0, 3600] seconds",
        "inputs[0]": "the prompt has no tokens",
        "inputs[1][2]": "9 is not in [0, 9)",
        "inputs[2].chat": "this model has no chat template",
        "messages[0].role": "is none",
        "choice": "at least one",
        "name": "must be shorter",
        "prompt": "is empty",
    }
    assert {v.field: v.description for v in error.violations} == said
    assert error.message.startswith("min_tokens: must be <= stop.max_tokens; stop: at most 8 entr")


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_verbs(parser.add_subparsers())
    return parser.parse_args(arguments)


@pytest.mark.parametrize(
    ("verb", "flags"),
    [
        (
            ("generate", "a"),
            {
                "min_tokens": "--min-tokens",
                "stop": "--stop",
                "stop_token_ids[1]": "--stop-token-id 2",
                "adapters[1].name": "--adapter 2",
                "prompt": "PROMPT",
                "messages[0].role": "messages[0].role",
            },
        ),
        (
            ("embed",),
            {"inputs[0]": "TEXT 1", "inputs[2].chat": "TEXT 3", "inputs[1][2]": "inputs[1][2]"},
        ),
        (("eval", "a"), {"adapters[1].name": "--mix 2"}),
        (("adapters", "unload", "a"), {"drain_seconds": "--wait", "name": "NAME"}),
        (
            ("adapters", "load", "a", "b"),
            {"pinned": "--pin", "path": "PATH", "ca": "--tls-ca", "key": "--tls-key"},
        ),
    ],
)
def test_errors_name_the_flag_that_was_typed(verb: tuple[str, ...], flags: dict[str, str]):
    args = parsed(*verb)
    assert {name: as_typed(name, args) for name in flags} == flags


def test_refusals_name_the_flags_that_were_typed(capsys: pytest.CaptureFixture[str]):
    print_error(refusal(REFUSED), parsed("generate", "a"))
    said = (
        "--min-tokens: must be <= stop.max_tokens; --stop: at most 8 entries; --adapter 2: 'json'"
        " occurs twice; drain_seconds: must be in [0, 3600] seconds; inputs[0]: the prompt has no"
        " tokens; inputs[1][2]: 9 is not in [0, 9); inputs[2].chat: this model has no chat"
        " template; messages[0].role: is none; and more"
    )
    assert capsys.readouterr().err == f"error: INVALID_ARGUMENT (INVALID_REQUEST): {said}\n"
    text = say("TOO_SMALL", least=0, value=-1)
    print_error(ArgumentValueError("top_n", text), parsed("generate", "a"))
    assert capsys.readouterr().err == f"error: --top-n: {text}\n"
    # Every field that a flag sets has the flag's name.
    parts = {"sampling": inference_pb2.SamplingParams, "stop": inference_pb2.StopConditions}
    fields = {f"{name}.{f.name}" for name, part in parts.items() for f in part.DESCRIPTOR.fields}
    names = map(argument, fields - {"sampling.logit_bias"})
    args = parsed("generate", "a")
    assert all(as_typed(name, args).startswith("--") for name in names)


def test_a_message_that_is_too_large_is_reported(client: TurretClient):
    for ask in (lambda: client.generate(LONG), lambda: list(client.generate_stream(LONG))):
        with pytest.raises(InvalidArgumentError) as raised:
            ask()
        assert raised.value.reason == "REQUEST_TOO_LARGE"
        assert isinstance(raised.value.message, Text)
        assert raised.value.message.params["most"] == "4194304"
        assert raised.value.message.params["size"].startswith("50000")


def test_an_answer_that_is_too_large_is_reported(server: FakeTurret, monkeypatch):
    options = [(n, 64 if n.endswith("receive_message_length") else v) for n, v in channel._OPTIONS]
    monkeypatch.setattr(channel, "_OPTIONS", tuple(options))
    with (
        TurretClient(server.address) as client,
        pytest.raises(InvalidArgumentError) as raised,
    ):
        client.generate("a" * 99)
    assert raised.value.reason == "ANSWER_TOO_LARGE"


def test_a_closed_client_rejects_calls(server: FakeTurret, tmp_path: Path):
    client = TurretClient(server.address)
    client.close()
    for call in (
        lambda: client.generate("a"),
        lambda: client.generate_stream("a"),
        lambda: client.adapters.get("a"),
        lambda: client.adapters.export("a", tmp_path / "a"),
    ):
        with pytest.raises(RuntimeError, check=says("CLIENT_CLOSED")):
            call()

    async def closed() -> None:
        client = AsyncTurretClient(server.address)
        await client.close()
        for call in (client.generate("a"), client.adapters.get("a")):
            with pytest.raises(RuntimeError, check=says("CLIENT_CLOSED")):
                await call
        with pytest.raises(RuntimeError, check=says("CLIENT_CLOSED")):
            client.generate_stream("a")

    asyncio.run(closed())


def test_an_address_without_a_turret_server_is_reported():
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{other.server_port}"
        with (
            TurretClient(address, max_retries=0) as client,
            pytest.raises(UnavailableError) as raised,
        ):
            client.generate("a")
        assert raised.value.reason == "NOT_GRPC"
        other.shutdown()
    said = cause_of(grpc.StatusCode.UNAVAILABLE, "errors resolving no.such:3: [field:hostname no]")
    assert (said[1], "no.such:3" in said[2]) == ("NOT_REACHED", True)


def test_violations_are_not_appended_to_a_summary_of_faults():
    said = "adapter 'a' does not fit: it is for 32 layers; and 117 more"
    found = [FieldViolation(f"layers.{i}", "the base has no such module") for i in range(30)]
    code = grpc.StatusCode.FAILED_PRECONDITION
    error = TurretRpcError(code, said, reason="ADAPTER_BASE_MISMATCH", violations=found)
    assert str(error) == f"FAILED_PRECONDITION (ADAPTER_BASE_MISMATCH): {said}"
    assert len(error.violations) == 30


def test_errors_do_not_repeat_the_status():
    said = TurretRpcError(grpc.StatusCode.UNAVAILABLE, "it starts", reason="UNAVAILABLE")
    assert str(said) == "UNAVAILABLE: it starts"
    with (
        TurretClient("127.0.0.1:1", max_retries=0) as nowhere,
        pytest.raises(UnavailableError) as raised,
    ):
        nowhere.generate("a")
    text = say("NOT_REACHED", place="127.0.0.1:1", why="Connection refused")
    assert str(raised.value) == f"UNAVAILABLE (NOT_REACHED): {text}; {HINTS['NOT_REACHED']}"
