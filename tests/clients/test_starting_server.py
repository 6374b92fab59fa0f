"""A server that is still loading its model: messages of the verbs and the clients, and waiting."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent import futures

import grpc
import pytest
from grpc_health.v1 import health, health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckResponse
from servers.command import parse_and_run
from servers.fake_turret import FakeTurret

from turret.clients.client import TurretClient
from turret.clients.errors import COMMAND_HINTS as HINTS
from turret.clients.errors import UnavailableError
from turret.clients.verbs import health as verb
from turret.server.api.call import fault_of
from turret.server.api.gate import ServingGate
from turret.server.errors import UnavailableError as Refusal
from turret.server.rpc.interceptor import to_rich_status

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def starting() -> Iterator[tuple[str, health.HealthServicer]]:
    """The address and the health of a server that is loading."""
    servicer = health.HealthServicer()
    servicer.set("", HealthCheckResponse.NOT_SERVING)
    server = grpc.server(futures.ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", servicer
    server.stop(None).wait()


def test_health_waits_until_the_server_serves(
    starting: tuple[str, health.HealthServicer],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    address, servicer = starting
    monkeypatch.setattr(verb, "_PAUSE_SECONDS", 0.05)
    assert parse_and_run("health", "--address", address) == 1
    assert capsys.readouterr().err == "NOT_SERVING\n"
    assert parse_and_run("health", "--address", address, "--wait", "0.2") == 1
    assert capsys.readouterr().err == "NOT_SERVING\n"
    assert parse_and_run("health", "--address", address, "--json") == 1
    assert json.loads(capsys.readouterr().out) == {"status": "NOT_SERVING"}
    loaded = threading.Timer(0.3, lambda: servicer.set("", HealthCheckResponse.SERVING))
    loaded.start()
    assert parse_and_run("health", "--address", address, "--wait", "30") == 0
    assert capsys.readouterr().out == "SERVING\n"
    loaded.join()


def test_health_reports_why_no_turret_server_answers(
    starting: tuple[str, health.HealthServicer], capsys: pytest.CaptureFixture[str]
):
    address, _ = starting
    # Something else answers at the address, or nothing listens on the port yet.
    assert parse_and_run("health", "--address", address, "--tls", "--wait", "0.1") == 1
    assert capsys.readouterr().err.startswith("error: UNAVAILABLE (TLS_FAILED): ")
    assert parse_and_run("health", "--address", "127.0.0.1:1", "--wait", "0.1") == 1
    assert capsys.readouterr().err.startswith("error: UNAVAILABLE (NOT_REACHED): ")


def test_a_call_suggests_how_to_wait_for_the_model(
    run: Run, server: FakeTurret, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(server.inference, "_accept", _refuse)
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    code, _, err = run("generate", "a")
    assert code == 1
    assert err.startswith("error: UNAVAILABLE (SERVER_STARTING): ")
    assert f"; {HINTS['SERVER_STARTING']}; retry in 1 s" in err
    with (
        TurretClient(server.address, max_retries=0) as client,
        pytest.raises(UnavailableError) as raised,
    ):
        client.generate("a")
    assert raised.value.reason == "SERVER_STARTING"
    assert "max_retries=" in raised.value.hint


def _refuse(_request: object, context: grpc.ServicerContext) -> None:
    with pytest.raises(Refusal) as refused:
        ServingGate().enter()
    fault = fault_of(refused.value)
    details = to_rich_status(fault).SerializeToString()
    context.set_trailing_metadata((("grpc-status-details-bin", details),))
    context.abort(grpc.StatusCode[fault.code.name], fault.message)
