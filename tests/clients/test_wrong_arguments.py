"""Arguments of the Python clients that make no sense, and errors that say things once."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from servers.fake_turret import FakeTurret, fake_turret

from turret.clients.client import TurretClient, TurretRpcError
from turret.clients.errors import FieldViolation, UnavailableError


@pytest.fixture
def server() -> Iterator[FakeTurret]:
    with fake_turret() as running:
        yield running


@pytest.fixture
def client(server: FakeTurret) -> Iterator[TurretClient]:
    with TurretClient(server.address) as connected:
        yield connected


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"address": 3}, TypeError, "address: HOST:PORT, not 3"),
        ({"tls": True}, TypeError, "tls: a Tls"),
        ({"token": 3}, TypeError, "token: a text, not int"),
        ({"token": "ü"}, ValueError, "token: holds characters"),
    ],
)
def test_a_client_names_the_argument_that_is_wrong(arguments, error, text):
    with pytest.raises(error, match=text):
        TurretClient(**arguments)


def test_administrative_calls_name_the_argument_that_is_wrong(client: TurretClient):
    for call in (
        lambda: client.adapters.load("a", 3),  # type: ignore[arg-type]
        lambda: client.adapters.replace("a", 3),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError, match=r"^path: a text, not 3$"):
            call()
    with pytest.raises(TypeError, match=r"^name: a text, not 3$"):
        client.adapters.unload(3)  # type: ignore[arg-type]
    # Bytes that are no text raise a UnicodeDecodeError, which takes five arguments.
    with pytest.raises(ValueError, match=r"^name: 'utf-8' codec can't decode"):
        client.adapters.unload(b"\xff")  # type: ignore[arg-type]


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
    assert str(raised.value) == ("UNAVAILABLE: cannot connect to 127.0.0.1:1: Connection refused")
