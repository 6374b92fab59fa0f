"""The largest message of every field, sent to a real server alongside a small client.

The client's health checks and its stream continue, and the server frees the memory.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grpc
import psutil
import pytest
from builders.bases.tiny_models import save_tiny_model
from fuzz.large import PASS, TYPES, Large, archives, bodies, messages
from fuzz.protocols import METHODS, called
from servers.neighbour import Neighbour
from servers.server_under_test import ServerUnderTest, start_server

from turret.v1 import tinker_pb2

JSON = {"content-type": "application/json"}
LASTING_MIB = 100
# The number of first messages that are not measured, because they cause lasting allocations
# (arenas, caches, a parsing thread).
NUM_FIRST = 10
MOST_SECONDS, STRICT_SECONDS = 2.0, 0.5
# The number of attempts, because a message may be slow by chance.
NUM_TRIES = 3
# Statuses of gRPC and HTTP that reveal a bug.
BUGS = ("INTERNAL", "UNKNOWN", "DATA_LOSS", "500")
STREAM = {"model": "base", "prompt": "a b", "max_tokens": 24, "ignore_eos": True, "stream": True}


def neighbour(server: ServerUnderTest) -> Neighbour:
    """A client that repeats health checks and streams."""

    def check() -> Iterator[bytes]:
        connection = http.client.HTTPConnection(server.http_address, timeout=60)
        connection.request("GET", "/health")
        answer = connection.getresponse().read()
        assert answer == b'{"status":"ok"}'
        yield answer
        connection.close()

    def read() -> Iterator[bytes]:
        connection = http.client.HTTPConnection(server.http_address, timeout=60)
        connection.request("POST", "/v1/completions", json.dumps(STREAM), JSON)
        yield from connection.getresponse()
        connection.close()

    return Neighbour(check, read)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerUnderTest]:
    folder = tmp_path_factory.mktemp("neighbour")
    model = save_tiny_model("llama", folder / "model")
    # The default KV cache would take memory for minutes, until every block has been used once.
    flags = ("--model", str(model), "--http-address", "127.0.0.1:0", "--kv-cache-bytes", "8MiB")
    training = ("--training", "--state-dir", str(folder / "state"))
    with start_server(folder, *flags, *training) as started:
        yield started


def test_large_messages_do_not_delay_other_clients(server: ServerUnderTest) -> None:
    """Each field is tried at one endpoint; the test below tries all endpoints and values."""
    _try(server, lambda: [bodies(is_short=True), messages(), archives()], MOST_SECONDS)


@pytest.mark.long
def test_no_large_message_delays_other_clients(server: ServerUnderTest) -> None:
    _try(server, lambda: [bodies(is_short=False), messages(), archives()], STRICT_SECONDS)


PROMPTS = [f"{number:4} " + "the quick brown fox jumps " * 4 for number in range(2048)]
CHOICES = [f"word {number}" for number in range(1000)]


@pytest.mark.long
@pytest.mark.parametrize(
    "asked",
    [
        {"max_tokens": 0, "echo": True, "logprobs": 20},
        {"max_tokens": 8, "guided_choice": CHOICES},
        {"max_tokens": 8, "stream": True, "logprobs": 20},
    ],
    ids=["scored", "chosen", "streamed"],
)
def test_much_work_for_one_client_does_not_delay_others(
    server: ServerUnderTest, asked: dict[str, object]
) -> None:
    body = json.dumps({"model": "base", "prompt": PROMPTS, **asked}).encode()
    large = Large("/v1/completions", ", ".join(asked), body)
    with grpc.insecure_channel(server.address) as channel, neighbour(server) as beside:
        assert _send(server, channel, large) == "200"
    assert beside.worst <= STRICT_SECONDS * max(_slowness(), 1.0)


@pytest.mark.long
def test_clients_that_leave_at_once_do_not_delay_others(server: ServerUnderTest) -> None:
    body = json.dumps({"model": "base", "prompt": PROMPTS, "max_tokens": 8}).encode()
    with neighbour(server) as beside:
        for _ in range(20):
            connection = http.client.HTTPConnection(server.http_address)
            connection.request("POST", "/v1/completions", body, JSON)
            connection.close()
        time.sleep(5.0)
    assert beside.worst <= STRICT_SECONDS * max(_slowness(), 1.0)


def _try(
    server: ServerUnderTest, make: Callable[[], Iterable[Iterable[Large]]], most_seconds: float
) -> None:
    process = psutil.Process(server.process.pid)
    options = (("grpc.max_send_message_length", -1),)
    slow: list[str] = []
    grown = before = 0
    with grpc.insecure_channel(server.address, options) as channel, neighbour(server) as beside:
        # Arenas of threads may grow beyond the limit once. Only a leak would grow again.
        for _ in range(2):
            for number, large in enumerate(itertools.chain.from_iterable(make())):
                worst = 0.0
                for _ in range(NUM_TRIES):
                    beside.worst = 0.0
                    code = _send(server, channel, large)
                    assert code not in BUGS, (code, str(large))
                    # Wait a little, to include delays at the end of the message.
                    time.sleep(0.02)
                    worst = beside.worst
                    if worst <= most_seconds or worst <= most_seconds * _slowness():
                        break
                else:
                    slow.append(f"{large}: {worst:.2f} s")
                if number == NUM_FIRST:
                    before = process.memory_info().rss
            grown = (process.memory_info().rss - before) >> 20
            if grown <= LASTING_MIB:
                break
    assert not slow
    assert grown <= LASTING_MIB
    assert "internal error" not in server.log.read_text()


def _slowness() -> float:
    """The slowdown from other load on this machine."""
    start, cpu = time.monotonic(), time.thread_time()
    while time.thread_time() - cpu < 0.1:
        pass
    return (time.monotonic() - start) / 0.1


def _send(server: ServerUnderTest, channel: grpc.Channel, large: Large) -> str:
    """Send a message; returns its status over HTTP or gRPC."""
    if large.target == PASS:
        return _send_pass(server, large.data)
    if large.target.startswith("/"):
        connection = http.client.HTTPConnection(server.http_address, timeout=300)
        kind = {"content-type": TYPES.get(large.target, JSON["content-type"])}
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            # The server answers before it has read a body that is invalid at its beginning.
            connection.request("POST", large.target, large.data, kind)
        answer = connection.getresponse()
        status = str(answer.status)
        answer.read()
        connection.close()
        return status
    method = next(each for each in METHODS if each.full_name == large.target)
    return called(channel, method, [large.data], 60.0)


def _send_pass(server: ServerUnderTest, data: bytes) -> str:
    """Send a training pass, and wait for its result: until then, the server may still read it."""
    session = _ask(server, "create_session", {})["session_id"]
    model = {"session_id": session, "model_seq_id": 0, "base_model": "base"}
    model |= {"lora_config": {"rank": 1}}
    promise = _ask(server, "create_model", model)
    model_id = _ask(server, "retrieve_future", {"request_id": promise["request_id"]})["model_id"]
    head = tinker_pb2.TinkerPass(model_id=model_id, seq_id=1, loss_fn="cross_entropy")
    promise = _ask(server, "forward_backward", head.SerializeToString() + data)
    found = _ask(server, "retrieve_future", {"request_id": promise["request_id"]})
    _ask(server, f"sessions/{session}/finish", {})
    return "500" if found["category"] == "server" else "400"


def _ask(server: ServerUnderTest, path: str, body: object) -> dict[str, Any]:
    is_bytes = isinstance(body, bytes)
    connection = http.client.HTTPConnection(server.http_address, timeout=300)
    sent = body if is_bytes else json.dumps(body)
    kind = {"content-type": TYPES[PASS]} if is_bytes else JSON
    connection.request("POST", f"/api/v1/{path}", sent, kind)
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    found = json.loads(answer.read())
    connection.close()
    return found
