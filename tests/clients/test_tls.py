"""The clients over TLS, with certificates on both sides."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from servers.certificates import certify
from servers.command import parse_and_run
from servers.fake_turret import FakeInference, fake_turret

from turret.clients.aio import AsyncTurretClient
from turret.clients.channel import Tls
from turret.clients.client import TurretClient, TurretRpcError
from turret.clients.errors import UnavailableError
from turret.v1 import inference_pb2_grpc

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
def address(pem: Path) -> Iterator[str]:
    """The address of a server that requires a client's certificate."""
    with serving(pem, "server") as found:
        yield found


@contextlib.contextmanager
def serving(pem: Path, certificate: str) -> Iterator[str]:
    pair = ((pem / f"{certificate}.key").read_bytes(), (pem / f"{certificate}.crt").read_bytes())
    credentials = grpc.ssl_server_credentials(
        [pair], (pem / "client.crt").read_bytes(), require_client_auth=True
    )
    with futures.ThreadPoolExecutor(max_workers=2) as pool:
        server = grpc.server(pool)
        inference_pb2_grpc.add_InferenceServicer_to_server(FakeInference({}), server)
        port = server.add_secure_port("127.0.0.1:0", credentials)
        server.start()
        yield f"127.0.0.1:{port}"
        server.stop(0).wait()


async def test_both_sides_are_verified(pem: Path, address: str):
    tls = Tls.from_files(
        ca=pem / "server.crt",
        certificate=pem / "client.crt",
        key=pem / "client.key",
        server_name=SERVER_NAME,
    )
    with TurretClient(address, tls=tls) as client:
        assert client.get_model().name == "tiny"
    async with AsyncTurretClient(address, tls=tls) as client:
        assert (await client.get_model()).name == "tiny"


@pytest.mark.parametrize("missing", ["name", "certificate", "roots", "tls"])
def test_incomplete_tls_settings_cannot_connect(pem: Path, address: str, missing: str):
    own = {} if missing == "certificate" else {"certificate": pem / "client.crt"}
    tls = Tls.from_files(
        ca=pem / ("client.crt" if missing == "roots" else "server.crt"),
        key=pem / "client.key" if own else None,
        server_name=None if missing == "name" else SERVER_NAME,
        **own,
    )
    with (
        TurretClient(address, tls=None if missing == "tls" else tls) as client,
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
    pem: Path, address: str, flags: list[str], meaning: str, capsys: pytest.CaptureFixture[str]
):
    (pem / "text").write_text("no PEM")
    given = [str(pem / flag) if not flag.startswith("-") else flag for flag in flags]
    assert parse_and_run("generate", "a", "--address", address, *given) != 0
    err = capsys.readouterr().err
    assert meaning in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("own", [None, "server"])
async def test_a_missing_or_wrong_client_certificate_is_reported(
    pem: Path, address: str, own: str | None, capfd
):
    """A server that requires a certificate just closes connections with none or a wrong one."""
    shown = {} if own is None else {"certificate": pem / f"{own}.crt", "key": pem / f"{own}.key"}
    tls = Tls.from_files(ca=pem / "server.crt", server_name=SERVER_NAME, **shown)
    with (
        TurretClient(address, tls=tls, max_retries=0) as client,
        pytest.raises(UnavailableError) as raised,
    ):
        client.get_model(timeout=10)
    assert raised.value.reason == "CONNECTION_CLOSED"
    async with AsyncTurretClient(address, tls=tls, max_retries=0) as client:
        with pytest.raises(UnavailableError) as raised:
            await client.get_model(timeout=10)
    assert raised.value.reason == "CONNECTION_CLOSED"
    flags = [f"--tls-{'cert' if n == 'certificate' else n}={path}" for n, path in shown.items()]
    flags += [f"--tls-ca={pem / 'server.crt'}", f"--tls-server-name={SERVER_NAME}"]
    for verb in (["generate", "a"], ["health"]):
        assert parse_and_run(*verb, "--address", address, *flags) == 1
        assert "UNAVAILABLE (CONNECTION_CLOSED): " in capfd.readouterr().err


async def test_the_first_of_several_addresses_gives_the_server_name(pem: Path):
    """With the whole list as its name, no certificate would match, and proxies would reject it."""
    tls = Tls.from_files(
        ca=pem / "here.crt", certificate=pem / "client.crt", key=pem / "client.key"
    )
    with serving(pem, "here") as address:
        listed = f"ipv4:{address},{address}"
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


def test_an_invalid_certificate_is_reported(address: str):
    tls = Tls(ca=b"-----BEGIN CERTIFICATE-----\nno\n")
    with (
        TurretClient(address, tls=tls, max_retries=0) as client,
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
