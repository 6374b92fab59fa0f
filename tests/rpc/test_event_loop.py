"""Messages of several megabytes do not keep the event loop from answering health checks.

``tests/fuzz/test_neighbour.py`` sends as many entries of every list as a message can have.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from builders.bases.tiny_models import save_tiny_model
from grpc_health.v1 import health_pb2, health_pb2_grpc
from servers.server_under_test import ServerUnderTest, start_server

from turret.server.api.inference_requests import check_chat
from turret.server.api.limits import InputLimits
from turret.server.api.violations import Violations
from turret.server.words import Text
from turret.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc

# Each of the messages below once took between 300 ms and 8 s.
IDLE_SECONDS = 0.25
# The limit if other programs use the processors, too.
BUSY_SECONDS = 1.0


def _generate(**fields: object) -> inference_pb2.GenerateRequest:
    request = inference_pb2.GenerateRequest(**fields)  # type: ignore[arg-type]
    request.stop.max_tokens = 1
    return request


def _chat(count: int, role: str, content: str) -> inference_pb2.GenerateRequest:
    turn = inference_pb2.ChatMessage(role=role, content=content)
    return _generate(chat=inference_pb2.Chat(messages=[turn] * count))


def _called(turns: int, calls: int) -> inference_pb2.Chat:
    call = inference_pb2.ToolCall(name="f", arguments="{}")
    turn = inference_pb2.ChatMessage(role="assistant", tool_calls=[call] * calls)
    return inference_pb2.Chat(messages=[turn] * turns)


def _ids(count: int, token: int) -> inference_pb2.TokenIds:
    return inference_pb2.TokenIds(ids=[token] * count)


def _messages() -> dict[str, object]:
    biased = _generate(prompt="a")
    biased.sampling.logit_bias.update(dict.fromkeys(range(60_000, 360_000), 1.0))
    scored = inference_pb2.ScoreRequest(token_ids=_ids(500, 5), top_n=20)
    echoed = _generate(token_ids=_ids(500, 5))
    echoed.options.MergeFrom(inference_pb2.ResponseOptions(logprobs=True, top_n=20, echo=True))
    tokenize = inference_pb2.TokenizeRequest
    return {
        "text": tokenize(prompt="a b " * 1_000_000),
        "as much text as fits": tokenize(prompt="a b " * 1_000),
        "control characters": tokenize(prompt="\x01\x02" * 2_000_000),
        "as many ids as fit": tokenize(token_ids=_ids(131_072, 5)),
        "as many turns as fit": _chat(4096, "user", ""),
        "as many tool calls as fit": _generate(chat=_called(64, 128)),
        "a long role": _chat(1, "a b " * 1_000_000, ""),
        "biases": biased,
        "a long name": _generate(
            prompt="a", adapters=[adapters_pb2.AdapterWeight(name="x" * 4_000_000)]
        ),
        "a scored prompt": scored,
        "an echoed prompt": echoed,
        "a long path": adapters_pb2.LoadAdapterRequest(name="x", path="p" * 4_000_000),
        "a long page token": adapters_pb2.ListAdaptersRequest(page_token="p" * 4_000_000),
    }


def _send(channel: grpc.Channel, message: object) -> None:
    inference = inference_pb2_grpc.InferenceStub(channel)
    adapters = adapters_pb2_grpc.AdaptersStub(channel)
    calls = {
        inference_pb2.GenerateRequest: inference.Generate,
        inference_pb2.ScoreRequest: inference.Score,
        inference_pb2.TokenizeRequest: inference.Tokenize,
        adapters_pb2.LoadAdapterRequest: adapters.LoadAdapter,
        adapters_pb2.ListAdaptersRequest: adapters.ListAdapters,
    }
    try:
        calls[type(message)](message, timeout=60)
    except grpc.RpcError as error:
        code = getattr(error, "code")()  # noqa: B009 (not in the type)
        if code is not grpc.StatusCode.INVALID_ARGUMENT:
            raise


class Checks:
    """Health checks every 20 ms, on a separate thread.

    Attributes:
        worst: The longest duration of a check, in seconds.
    """

    def __init__(self, address: str) -> None:
        self.worst = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(address,))

    def __enter__(self) -> Checks:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self, address: str) -> None:
        with grpc.insecure_channel(address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            while not self._stop.wait(0.02):
                start = time.monotonic()
                stub.Check(health_pb2.HealthCheckRequest(), timeout=60)
                self.worst = max(self.worst, time.monotonic() - start)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerUnderTest]:
    folder = tmp_path_factory.mktemp("loop")
    model = save_tiny_model("llama", folder / "model")
    with start_server(folder, "--model", str(model)) as server:
        yield server


def test_tool_calls_are_counted_before_they_are_read() -> None:
    violations = Violations()
    limits = InputLimits(vocab_size=1, max_tokens=1 << 20, max_chars=1 << 30)
    check_chat(_called(4096, 128), limits, violations)
    ((path, description),) = violations.found
    assert path == "chat.messages.tool_calls"
    assert isinstance(description, Text)
    assert description.reason == "TOO_MANY_ENTRIES"
    assert description.params == {"most": 8192, "found": 4096 * 128}
    check_chat(_called(64, 128), limits, allowed := Violations())
    assert not allowed.found


def test_no_message_stops_the_event_loop(server: ServerUnderTest) -> None:
    worst: dict[str, float] = {}
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(server.address, options) as channel:
        for name, message in _messages().items():
            for _ in range(2):
                with Checks(server.address) as checks:
                    time.sleep(0.1)
                    _send(channel, message)
                # Take the better of two runs, which excludes other load on the machine.
                worst[name] = min(worst.get(name, math.inf), checks.worst)
    is_busy = os.getloadavg()[0] > (os.cpu_count() or 1)
    limit = BUSY_SECONDS if is_busy else IDLE_SECONDS
    assert {name: value for name, value in worst.items() if value > limit} == {}
