"""Arguments of the Python clients that make no sense, and errors that say things once."""

from __future__ import annotations

import asyncio
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import pytest
from servers.fake_turret import FakeTurret

from turret.clients import channel
from turret.clients.aio import AsyncTurretClient
from turret.clients.channel import Tls
from turret.clients.client import TurretClient, TurretRpcError
from turret.clients.errors import FieldViolation, InvalidArgumentError, UnavailableError, _plain
from turret.clients.unreached import address_problem, in_flags

LONG = "a" * 5_000_000


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"address": 3}, TypeError, "address: HOST:PORT, not 3"),
        ({"address": "localhost"}, ValueError, "address: 'localhost' is not HOST:PORT: the port"),
        ({"admin_address": "http://a:1"}, ValueError, "'http://a:1' is not HOST:PORT: leave http"),
        ({"address": "localhost:70000"}, ValueError, "'localhost:70000' is not HOST:PORT with a p"),
        (
            {"address": "127.0.0.1:-5", "tls": Tls()},
            ValueError,
            "'127.0.0.1:-5' is not HOST:PORT w",
        ),
        ({"address": "[::1]:65536"}, ValueError, "port from 0 to 65535"),
        ({"address": "dns:///localhost:115787"}, ValueError, "'dns:///localhost:115787' is not"),
        (
            {"admin_address": "a:" + "9" * 5000},
            ValueError,
            "9' is not HOST:PORT with a port from 0",
        ),
        ({"tls": True}, TypeError, "tls: a Tls"),
        ({"token": 3}, TypeError, "token: a text, not int"),
        ({"token": "ü"}, ValueError, "token: holds characters"),
    ],
)
def test_a_client_names_the_argument_that_is_wrong(arguments, error, text):
    with pytest.raises(error, match=text):
        TurretClient(**arguments)
    if "address" in arguments:
        # Before it has a channel to leave open.
        with pytest.raises(error, match=text):
            AsyncTurretClient(**arguments)


def test_administrative_calls_name_the_argument_that_is_wrong(client: TurretClient):
    for call in (
        lambda: client.adapters.load("a", 3),  # type: ignore[arg-type]
        lambda: client.adapters.replace("a", 3),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError, match=r"^path: a text, not 3$"):
            call()
    with pytest.raises(TypeError, match=r"^name: a text, not 3$"):
        client.adapters.unload(3)  # type: ignore[arg-type]
    for client_call, complaint in (
        (lambda: client.adapters.unload("a", drain_seconds="x"), "drain_seconds: a number of"),  # type: ignore[arg-type]
        (lambda: client.adapters.unload("a", mode=3), "mode: one of drain, force, not 3"),  # type: ignore[arg-type]
        (lambda: client.adapters.upload("a", 5), "directory: a path, not 5"),  # type: ignore[arg-type]
        (lambda: client.adapters.export("a", 5), "directory: a path, not 5"),  # type: ignore[arg-type]
        (lambda: client.adapters.list(method=5), "method: a text, not 5"),  # type: ignore[arg-type]
        (lambda: client.adapters.list(page_size="5"), "page_size: a whole number, not '5'"),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError, match=f"^{complaint}"):
            client_call()
    for seconds in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"^drain_seconds: a number of seconds, not {seconds}"):
            client.adapters.unload("a", drain_seconds=seconds)
    with pytest.raises(ValueError, match=r"^mode: one of drain, force, not 'x'$"):
        client.adapters.unload("a", mode="x")
    # Bytes that are no text raise a UnicodeDecodeError, which takes five arguments.
    with pytest.raises(ValueError, match=r"^name: 'utf-8' codec can't decode"):
        client.adapters.unload(b"\xff")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "options", "complaint"),
    [
        ("a", {"json_schema": {"type": object}}, "json_schema: Object of type type"),
        ("a", {"max_tokens": True}, "max_tokens: not a bool, such as True"),
        ("a", {"tools": 5}, "tools: a list, not 5"),
        ("a", {"stop": 3}, "stop: a list, not 3"),
        ("a", {"stop_token_ids": 3}, "stop_token_ids: a list, not 3"),
        ("a", {"choice": 3}, "choice: a list, not 3"),
        ("a", {"logit_bias": [1]}, r"logit_bias: token ids with numbers, .*, not \[1\]"),
        ("a", {"max_tokens": "2"}, "max_tokens: a whole number, not '2'"),
        (["hi"], {}, r"prompt: text, token ids or the turns of a conversation, not \['hi'\]"),
        ([True], {}, r"prompt: text, token ids or the turns of a conversation, not \[True\]"),
        (
            [("user", "a")],
            {"tools": [{"function": {"name": "x", "parameters": {"a": object}}}]},
            "tools: Object of type type",
        ),
        (
            [("user", "a")],
            {"tools": [{"function": {"name": "x", "description": 5}}]},
            "description: a text, not 5",
        ),
    ],
)
def test_a_generation_names_the_argument_that_is_wrong(
    client: TurretClient, prompt, options, complaint
):
    with pytest.raises(TypeError, match=f"^{complaint}"):
        client.generate(prompt, **options)


def test_a_message_that_is_too_large_is_said_to_be(client: TurretClient):
    # The limit of gRPC's own, which is the server's too.
    for ask in (lambda: client.generate(LONG), lambda: list(client.generate_stream(LONG))):
        with pytest.raises(InvalidArgumentError) as raised:
            ask()
        said = r"the request is 50000\d\d bytes long, and the server takes at most 4194304: shorten"
        assert re.match(said, raised.value.message)


def test_an_answer_that_is_too_large_is_said_to_be(server: FakeTurret, monkeypatch):
    options = [(n, 64 if n.endswith("receive_message_length") else v) for n, v in channel._OPTIONS]
    monkeypatch.setattr(channel, "_OPTIONS", tuple(options))
    with (
        TurretClient(server.address) as client,
        pytest.raises(InvalidArgumentError, match=r"the answer is \d+ bytes long, and this client"),
    ):
        client.generate("a" * 99)


def test_a_closed_client_says_so(server: FakeTurret, tmp_path: Path):
    client = TurretClient(server.address)
    client.close()
    for call in (
        lambda: client.generate("a"),
        lambda: client.generate_stream("a"),
        lambda: client.adapters.get("a"),
        lambda: client.adapters.export("a", tmp_path / "a"),
    ):
        with pytest.raises(RuntimeError, match=r"^the client is closed; make another$"):
            call()

    async def closed() -> None:
        client = AsyncTurretClient(server.address)
        await client.close()
        for call in (client.generate("a"), client.adapters.get("a")):
            with pytest.raises(RuntimeError, match=r"^the client is closed; make another$"):
                await call
        with pytest.raises(RuntimeError, match=r"^the client is closed; make another$"):
            client.generate_stream("a")

    asyncio.run(closed())


def test_an_address_without_a_port_may_be_that_of_tls():
    TurretClient("turret.example.com", tls=Tls()).close()
    TurretClient("dns:///turret.example.com").close()


@pytest.mark.parametrize(
    "address",
    [
        "unix:/1",
        "unix:///1/t",
        "dns:127.0.0.1",
        "dns:///a:65535",
        "::1",
        "[::1]:1",
        "ipv4:127.0.0.1:1",
        "ipv6:[::1]:1",
        "vsock:2:70000",
        "localhost:http",
    ],
)
def test_of_other_forms_of_an_address_grpc_knows_best(address: str):
    assert address_problem(address, has_tls=False) == ""


def test_what_is_no_turret_server_is_told_with_what_to_do():
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{other.server_port}"
        with (
            TurretClient(address, max_retries=0) as client,
            pytest.raises(UnavailableError, match="does not speak gRPC; the address is that of"),
        ):
            client.generate("a")
        other.shutdown()
    said = _plain(grpc.StatusCode.UNAVAILABLE, "errors resolving no.such:3: [field:hostname no]")
    assert said.startswith("no turret server answers at no.such:3 (its name has no address); `tu")
    assert in_flags(said, "no.such:3").endswith("--address or TURRET_ADDRESS names another")


def test_a_summary_of_an_adapters_faults_is_not_made_longer():
    said = "adapter 'a' does not fit: it is for 32 layers; and 117 more"
    found = [FieldViolation(f"layers.{i}", "the base has no such module") for i in range(30)]
    code = grpc.StatusCode.FAILED_PRECONDITION
    error = TurretRpcError(code, said, reason="ADAPTER_BASE_MISMATCH", violations=found)
    assert str(error) == f"FAILED_PRECONDITION (ADAPTER_BASE_MISMATCH): {said}"
    assert len(error.violations) == 30


def test_what_was_said_is_said_once():
    said = TurretRpcError(grpc.StatusCode.UNAVAILABLE, "it starts", reason="UNAVAILABLE")
    assert str(said) == "UNAVAILABLE: it starts"
    with (
        TurretClient("127.0.0.1:1", max_retries=0) as nowhere,
        pytest.raises(UnavailableError) as raised,
    ):
        nowhere.generate("a")
    assert str(raised.value) == (
        "UNAVAILABLE: no turret server answers at 127.0.0.1:1 (Connection refused); `turret serve`"
        " starts one"
    )
