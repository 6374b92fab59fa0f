"""A well-behaved client alongside a fuzzing one, on a real server over both protocols."""

from __future__ import annotations

import http.client
import multiprocessing
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import grpc
import pytest
from builders.bases.tiny_models import save_tiny_model
from builders.random_adapters import AdapterSpec, arch_of, write_adapter
from fuzz.corpus import seeds
from fuzz.mutation import mutated
from fuzz.protocols import METHODS, PATHS, called
from fuzz.targets import parts_of
from servers.server_under_test import ServerUnderTest, start_server

from turret.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc

# Fuzzers also use the processors: with more of them, the test would measure what they leave over
# instead of the server.
NUM_FUZZERS = 2
LEAST_RATE = 0.5
MOST_SECONDS = 1.0
# Statuses that a server must never return.
BUGS = ("INTERNAL", "UNKNOWN", "DATA_LOSS", "500")
# The maximum number of inputs to show after a failure.
MOST_SHOWN = 5


class Sender:
    """Threads that send a damaged seed every few milliseconds until they are stopped."""

    def __init__(self, address: str, http_address: str, over: Event) -> None:
        self.seen: Counter[str] = Counter()
        self.breaking: list[tuple[str, str, bytes]] = []
        self._address, self._http_address = address, http_address
        self._over = over
        by_target: dict[str, list[bytes]] = {"message": [], "http": []}
        for name, data in seeds():
            if name in by_target:
                by_target[name].append(data)
        self._corpus = by_target

    def run(self, ready: Event) -> None:
        threads = [
            threading.Thread(target=self._run, args=(number,)) for number in range(NUM_FUZZERS)
        ]
        for thread in threads:
            thread.start()
        ready.set()
        for thread in threads:
            thread.join()

    def _run(self, number: int) -> None:
        source = random.Random(number)
        with grpc.insecure_channel(self._address) as channel:
            while not self._over.wait(0.005):
                name = source.choice(("message", "message", "http"))
                data = mutated(source, self._corpus[name]) or b"\0"
                send = self._post if name == "http" else self._call
                code = send(channel, data)
                self.seen[code] += 1
                if code in BUGS and len(self.breaking) < MOST_SHOWN:
                    self.breaking.append((code, name, data))

    def _call(self, channel: grpc.Channel, data: bytes) -> str:
        method = METHODS[data[0] % len(METHODS)]
        parts = list(parts_of(data[1:]))
        return called(channel, method, parts[:50], 2.0)

    def _post(self, _: grpc.Channel, data: bytes) -> str:
        connection = http.client.HTTPConnection(self._http_address, timeout=2)
        try:
            path = PATHS[data[0] % len(PATHS)]
            connection.request("POST", path, data[1:], {"content-type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            return str(answer.status)
        except TimeoutError:
            return "DEADLINE_EXCEEDED"
        finally:
            connection.close()


def send(address: str, http_address: str, over: Event, ready: Event, seen: Queue[Any]) -> None:
    sender = Sender(address, http_address, over)
    sender.run(ready)
    seen.put((sender.seen, sender.breaking))


class Fuzzers:
    """A ``Sender`` in a separate process, so that it does not slow down the client."""

    def __init__(self, server: ServerUnderTest) -> None:
        self.seen: Counter[str] = Counter()
        self.breaking: list[tuple[str, str, bytes]] = []
        context = multiprocessing.get_context("spawn")
        self._over, self._ready = context.Event(), context.Event()
        self._found: Queue[Any] = context.Queue()
        where = (server.address, server.http_address)
        self._process = context.Process(
            target=send, args=(*where, self._over, self._ready, self._found)
        )

    def __enter__(self) -> Fuzzers:
        self._process.start()
        assert self._ready.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.seen, self.breaking = self._found.get(timeout=60)
        self._process.join()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerUnderTest]:
    model = save_tiny_model("llama", tmp_path / "model")
    for seed, name in enumerate(("a", "b", "c", "polite")):
        write_adapter(tmp_path / "adapters", arch_of(model), AdapterSpec(name, rank=4), seed)
    flags = ("--model", str(model), "--http-address", "127.0.0.1:0")
    with start_server(tmp_path, *flags, "--state-dir", str(tmp_path / "state")) as started:
        yield started


def _latencies(ask: Callable[[], object], seconds: float) -> list[float]:
    found, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        start = time.monotonic()
        ask()
        found.append(time.monotonic() - start)
    return found


@pytest.mark.long
def test_a_polite_client_is_served_beside_any_bytes(
    server: ServerUnderTest, fuzz_seconds: float
) -> None:
    """The client keeps half of its rate, with p99 under a second, and no input reveals a bug."""
    with grpc.insecure_channel(server.address) as channel:
        admin = adapters_pb2_grpc.AdaptersStub(channel)
        admin.LoadAdapter(adapters_pb2.LoadAdapterRequest(name="polite", path="polite"))
        stub = inference_pb2_grpc.InferenceStub(channel)
        request = inference_pb2.GenerateRequest(prompt="a b c")
        request.adapters.add(name="polite")
        request.stop.max_tokens = 4
        request.stop.ignore_eos = True

        def ask() -> None:
            assert stub.Generate(request, timeout=60).usage.completion_tokens == 4

        _latencies(ask, 1.0)
        alone: list[float] = []
        beside: list[float] = []
        seen: Counter[str] = Counter()
        breaking: list[tuple[str, str, bytes]] = []
        # Alternate, because the machine's load varies.
        for _ in range(4):
            alone += _latencies(ask, fuzz_seconds / 8)
            with Fuzzers(server) as fuzzers:
                beside += _latencies(ask, fuzz_seconds / 8)
            seen += fuzzers.seen
            breaking += fuzzers.breaking
    beside.sort()
    p99 = beside[int(0.99 * len(beside))]
    rate = len(beside) / len(alone)
    print(f"\n{dict(seen)}; rate {rate:.2f}, p99 {p99:.3f} s, longest {beside[-1]:.3f} s")
    assert not breaking, (seen, breaking)
    assert sum(seen.values()) > 50
    assert rate >= LEAST_RATE
    assert p99 < MOST_SECONDS
    assert "internal error" not in server.log.read_text()
