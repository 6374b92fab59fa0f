"""Connecting: addresses, TLS on both sides, and servers that are still loading."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health
from grpc_health.v1.health_pb2 import HealthCheckResponse
from said import says
from servers.certificates import certify
from servers.command import parse_and_run
from servers.fake_turret import FakeInference, FakeTurret, fake_turret, serving

from turret.clients.aio import AsyncTurretClient
from turret.clients.channel import Tls
from turret.clients.client import TurretClient, TurretRpcError
from turret.clients.errors import COMMAND_HINTS as HINTS
from turret.clients.errors import UnavailableError
from turret.clients.verbs import health as verb
from turret.server.api.gate import ServingGate
from turret.server.errors import UnavailableError as Refusal

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def starting() -> Iterator[tuple[str, health.HealthServicer]]:
    """The address and the health of a server that is loading."""
    servicer = health.HealthServicer()
    servicer.set("", HealthCheckResponse.NOT_SERVING)
    with serving(servicer) as address:
        yield address, servicer


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
    with pytest.raises(Refusal) as refused:
        ServingGate().enter()
    server.inference.refusal = refused.value
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


# The clients over TLS, with certificates on both sides.


SERVER_NAME = "turret.example"


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``{server,client,here}.{crt,key}``, self-signed.

    The certificate ``here`` is for this machine's address, the others are for SERVER_NAME.
    """
    folder = tmp_path_factory.mktemp("pem")
    for name in ("server", "client"):
        certify(folder, name, f"subjectAltName=DNS:{SERVER_NAME}")
    certify(folder, "here", "subjectAltName=IP:127.0.0.1")
    return folder


@pytest.fixture
def tls_address(pem: Path) -> Iterator[str]:
    """The address of a server that requires a client's certificate."""
    with served(pem, "server") as found:
        yield found


def served(pem: Path, certificate: str) -> AbstractContextManager[str]:
    pair = ((pem / f"{certificate}.key").read_bytes(), (pem / f"{certificate}.crt").read_bytes())
    credentials = grpc.ssl_server_credentials(
        [pair], (pem / "client.crt").read_bytes(), require_client_auth=True
    )
    return serving(FakeInference({}), credentials=credentials)


async def test_both_sides_are_verified(pem: Path, tls_address: str):
    tls = Tls.from_files(
        ca=pem / "server.crt",
        certificate=pem / "client.crt",
        key=pem / "client.key",
        server_name=SERVER_NAME,
    )
    with TurretClient(tls_address, tls=tls) as client:
        assert client.get_model().name == "tiny"
    async with AsyncTurretClient(tls_address, tls=tls) as client:
        assert (await client.get_model()).name == "tiny"


@pytest.mark.parametrize("missing", ["name", "certificate", "roots", "tls"])
def test_incomplete_tls_settings_cannot_connect(pem: Path, tls_address: str, missing: str):
    own = {} if missing == "certificate" else {"certificate": pem / "client.crt"}
    tls = Tls.from_files(
        ca=pem / ("client.crt" if missing == "roots" else "server.crt"),
        key=pem / "client.key" if own else None,
        server_name=None if missing == "name" else SERVER_NAME,
        **own,
    )
    with (
        TurretClient(tls_address, tls=None if missing == "tls" else tls) as client,
        pytest.raises(TurretRpcError) as raised,
    ):
        client.get_model(timeout=10)
    assert raised.value.code == grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("flags", "meaning"),
    [
        ([], "(CONNECTION_CLOSED)"),
        (["--tls"], "(TLS_FAILED)"),
        (["--tls-ca", "server.crt"], "(TLS_FAILED)"),
        (["--tls-ca", "text"], "(TLS_FAILED)"),
        (["--tls-ca", "server.key"], "(TLS_FAILED)"),
        (["--tls-cert", "server.crt", "--tls-key", "server.crt"], "(TLS_FAILED)"),
        (["--tls-cert", "server.crt"], "error: --tls-key: "),
    ],
)
def test_the_command_reports_invalid_tls_flags(
    pem: Path, tls_address: str, flags: list[str], meaning: str, capsys: pytest.CaptureFixture[str]
):
    (pem / "text").write_text("no PEM")
    given = [str(pem / flag) if not flag.startswith("-") else flag for flag in flags]
    assert parse_and_run("generate", "a", "--address", tls_address, *given) != 0
    err = capsys.readouterr().err
    assert meaning in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("own", [None, "server"])
async def test_a_missing_or_wrong_client_certificate_is_reported(
    pem: Path, tls_address: str, own: str | None, capfd
):
    """A server that requires a certificate just closes connections with none or a wrong one."""
    shown = {} if own is None else {"certificate": pem / f"{own}.crt", "key": pem / f"{own}.key"}
    tls = Tls.from_files(ca=pem / "server.crt", server_name=SERVER_NAME, **shown)
    with (
        TurretClient(tls_address, tls=tls, max_retries=0) as client,
        pytest.raises(UnavailableError) as raised,
    ):
        client.get_model(timeout=10)
    assert raised.value.reason == "CONNECTION_CLOSED"
    async with AsyncTurretClient(tls_address, tls=tls, max_retries=0) as client:
        with pytest.raises(UnavailableError) as raised:
            await client.get_model(timeout=10)
    assert raised.value.reason == "CONNECTION_CLOSED"
    flags = [f"--tls-{'cert' if n == 'certificate' else n}={path}" for n, path in shown.items()]
    flags += [f"--tls-ca={pem / 'server.crt'}", f"--tls-server-name={SERVER_NAME}"]
    for words in (["generate", "a"], ["health"]):
        assert parse_and_run(*words, "--address", tls_address, *flags) == 1
        assert "UNAVAILABLE (CONNECTION_CLOSED): " in capfd.readouterr().err


async def test_the_first_of_several_addresses_gives_the_server_name(pem: Path):
    """If the whole list were the name, no certificate would match, and proxies would reject it."""
    tls = Tls.from_files(
        ca=pem / "here.crt", certificate=pem / "client.crt", key=pem / "client.key"
    )
    with served(pem, "here") as tls_address:
        listed = f"ipv4:{tls_address},{tls_address}"
        with TurretClient(listed, tls=tls, max_retries=0) as client:
            assert client.get_model(timeout=30)
        async with AsyncTurretClient(listed, tls=tls, max_retries=0) as client:
            assert await client.get_model(timeout=30)


def test_grpc_prints_no_line_beside_the_error():
    with fake_turret() as server:
        code = (
            "from turret import Tls, TurretClient, TurretRpcError\n"
            "import os\n"
            "assert 'GRPC_VERBOSITY' not in os.environ\n"
            "try:\n"
            f"    TurretClient({server.address!r}, tls=Tls(), max_retries=0).get_model()\n"
            "except TurretRpcError as error:\n    print(error)\n"
        )
        environment = {k: v for k, v in os.environ.items() if k != "GRPC_VERBOSITY"}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment
        )
    assert done.stderr == ""
    assert done.stdout.startswith("UNAVAILABLE (TLS_FAILED): ")
    assert done.stdout.count("\n") == 1


def test_an_invalid_certificate_is_reported(tls_address: str):
    tls = Tls(ca=b"-----BEGIN CERTIFICATE-----\nno\n")
    with (
        TurretClient(tls_address, tls=tls, max_retries=0) as client,
        pytest.raises(TurretRpcError) as raised,
    ):
        client.get_model(timeout=10)
    assert raised.value.reason == "TLS_FAILED"


def test_the_command_reports_a_server_without_tls(
    capfd: pytest.CaptureFixture[str],
):
    with fake_turret() as server:
        assert parse_and_run("generate", "a", "--address", server.address, "--tls") == 1
    assert "UNAVAILABLE (TLS_FAILED): " in capfd.readouterr().err


def test_a_missing_pem_file_is_reported_with_its_path(tmp_path: Path):
    with pytest.raises(FileNotFoundError) as raised:
        Tls.from_files(ca=tmp_path / "a")
    assert str(raised.value).endswith("a: No such file or directory")


# Addresses that cannot be a server's are rejected before the first call.


WRONG = {
    "": "ADDRESS_WITHOUT_PORT",
    "localhost": "ADDRESS_WITHOUT_PORT",
    "http://a:1": "ADDRESS_WITH_SCHEME",
    "HTTPS://a:1": "ADDRESS_WITH_SCHEME",
}
# Faults that gRPC itself finds.
UNREACHED = ["localhost:abc", ":50051", "a b:1", "127.0.0.1:1,127.0.0.1:2", "unix:", "tcp://a:1"]


@pytest.mark.parametrize(("address", "reason"), WRONG.items(), ids=map(repr, WRONG))
def test_an_invalid_address_is_rejected(address: str, reason: str):
    for name in ("address", "admin_address"):
        with pytest.raises(ValueError, check=says(reason)) as raised:
            TurretClient(**{name: address})  # type: ignore[arg-type]
        assert str(raised.value).startswith(f"{name}: ")
    for words in (["health"], ["generate", "a"]):
        assert parse_and_run(*words, "--address", address) == 2


@pytest.mark.parametrize("address", UNREACHED)
def test_other_faults_are_reported_by_the_first_call(address: str):
    with (
        TurretClient(address, max_retries=0, timeout=20) as client,
        pytest.raises(UnavailableError) as raised,
    ):
        client.get_model()
    assert raised.value.reason == "NOT_REACHED"


def test_other_forms_are_left_to_grpc():
    for address in ("unix:/a b", "localhost:http", "dns:///a", "ipv6:[::1]:1", "vsock:2:70000"):
        TurretClient(address).close()
    TurretClient("turret.example.com", tls=Tls()).close()
