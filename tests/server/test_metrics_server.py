"""The metrics endpoint with clients that send too little, too much, or read nothing."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from turret.server import metrics_server
from turret.server.api.access import TokenTable
from turret.server.basics.settings import split_address
from turret.server.metrics import Metrics
from turret.server.metrics_server import MAX_CONNECTIONS, MAX_REQUEST_BYTES, MetricsServer

TIMEOUT_SECONDS = 1.0
GET = b"GET /metrics HTTP/1.1\r\n"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[MetricsServer]:
    monkeypatch.setattr(metrics_server, "TIMEOUT_SECONDS", TIMEOUT_SECONDS)
    server = MetricsServer(Metrics(), "127.0.0.1:0")
    yield server
    server.close()


def connect(server: MetricsServer) -> socket.socket:
    connected = socket.create_connection(split_address(server.address), timeout=10)
    return connected


def status_of(server: MetricsServer, request: bytes) -> bytes:
    """The first line of the answer; empty if the server closed the connection without one."""
    with connect(server) as client:
        client.sendall(request)
        return read_all(client).partition(b"\r\n")[0]


def read_all(client: socket.socket) -> bytes:
    received = b""
    try:
        while data := client.recv(1 << 16):
            received += data
    except ConnectionResetError:
        pass
    return received


def scrape(server: MetricsServer, token: str | None = None) -> str:
    request = urllib.request.Request(f"http://{server.address}/metrics")
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    with urllib.request.urlopen(request, timeout=10) as response:
        return response.read().decode()


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_unfinished_requests_are_limited_and_time_out(server: MetricsServer) -> None:
    scrape(server)
    threads, descriptors = threading.active_count(), num_descriptors()
    clients = [connect(server) for _ in range(3 * MAX_CONNECTIONS)]
    for client in clients:
        client.sendall(GET)
    assert threading.active_count() == threads
    start = time.monotonic()
    for client in clients:
        assert read_all(client) == b""
    assert time.monotonic() - start < 5 * TIMEOUT_SECONDS
    for client in clients:
        client.close()
    assert num_descriptors() <= descriptors
    assert "turret_step_tokens" in scrape(server)


def test_the_number_of_open_connections_is_limited(server: MetricsServer) -> None:
    waiting = [connect(server) for _ in range(MAX_CONNECTIONS)]
    time.sleep(0.2)
    with connect(server) as refused:
        start = time.monotonic()
        assert read_all(refused) == b""
        assert time.monotonic() - start < TIMEOUT_SECONDS / 2
    for client in waiting:
        client.close()
    time.sleep(0.2)
    assert "turret_step_tokens" in scrape(server)


def test_slow_writers_and_silent_readers_are_timed_out(
    server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connect(server) as client:
        start = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - start < 10:
                client.sendall(b"x")
                time.sleep(0.05)
        assert time.monotonic() - start < 5
    # More than the system's buffers hold.
    body = b"#" * (64 << 20)
    monkeypatch.setattr(metrics_server, "choose_encoder", lambda _: (lambda _: body, "text/plain"))
    with connect(server) as client:
        client.sendall(GET + b"\r\n")
        time.sleep(3 * TIMEOUT_SECONDS)
        assert len(read_all(client)) < len(body)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (GET + b"\r\n", b"200 OK"),
        (b"HEAD /metrics?x=1 HTTP/1.0\r\n\r\n", b"200 OK"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", b"405 Method Not Allowed"),
        (b"GET /etc/passwd HTTP/1.1\r\n\r\n", b"404 Not Found"),
        (b"GET\r\n\r\n", b"400 Bad Request"),
        (b"\xff\xfe\r\n\r\n", b"400 Bad Request"),
    ],
)
def test_requests_get_the_expected_status(
    server: MetricsServer, request_: bytes, status: bytes
) -> None:
    assert status_of(server, request_) == b"HTTP/1.1 " + status


def test_a_request_that_is_too_long_gets_no_answer(server: MetricsServer) -> None:
    assert status_of(server, GET + b"a: " + b"b" * (2 * MAX_REQUEST_BYTES)) == b""
    assert "turret_step_tokens" in scrape(server)


def test_a_configured_metrics_role_makes_the_endpoint_private() -> None:
    inference = ("a", frozenset({"inference"}))
    open_to_all = MetricsServer(Metrics(), "127.0.0.1:0", TokenTable([inference]))
    tokens = TokenTable([inference, ("m", frozenset({"metrics"}))])
    guarded = MetricsServer(Metrics(), "127.0.0.1:0", tokens)
    try:
        assert "turret_step_tokens" in scrape(open_to_all)
        assert "turret_step_tokens" in scrape(guarded, "m")
        for token, code in ((None, 401), ("guess", 401), ("a", 403)):
            with pytest.raises(urllib.error.HTTPError) as caught:
                scrape(guarded, token)
            assert caught.value.code == code
            caught.value.close()
    finally:
        open_to_all.close()
        guarded.close()


def test_servers_that_share_an_address_take_ports_that_follow_each_other() -> None:
    first = MetricsServer(Metrics(), "127.0.0.1:0")
    host, port = split_address(first.address)
    try:
        with pytest.raises(OSError, match="in use"):
            MetricsServer(Metrics(), first.address)
        beside = MetricsServer(Metrics(), first.address, num_ports=8)
        try:
            assert split_address(beside.address)[0] == host
            assert port < split_address(beside.address)[1] < port + 8
            assert "turret_step_tokens" in scrape(beside)
        finally:
            beside.close()
    finally:
        first.close()


def test_metrics_that_others_can_read_cause_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    tokens = TokenTable([("m", frozenset({"metrics"}))])
    for address, guard, is_said in (
        ("127.0.0.1:0", None, False),
        ("0.0.0.0:0", None, True),
        ("0.0.0.0:0", tokens, False),
    ):
        caplog.clear()
        MetricsServer(Metrics(), address, guard).close()
        assert ("metrics are readable without a token" in caplog.messages) is is_said
