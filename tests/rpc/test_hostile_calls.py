"""Hostile calls on a real server: they do not delay others and leave nothing behind."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from builders.bases.tiny_models import save_tiny_model
from builders.random_adapters import AdapterSpec, arch_of, write_adapter
from grpc_health.v1 import health_pb2, health_pb2_grpc
from servers import raw_grpc
from servers.neighbour import Neighbour
from servers.server_under_test import ServerUnderTest, start_server

from turret.clients.errors import TurretRpcError
from turret.server.api.inference_requests import check_chat
from turret.server.api.limits import InputLimits
from turret.server.api.violations import Violations
from turret.server.words import Text
from turret.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc

GENERATE = "/turret.v1.Inference/Generate"
INFERENCE, ADMIN = "inference-token", "admin-token"
LASTING_MIB = 32
LARGE = 3_000_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("hostile") / "model")


def _bearer(token: str | None) -> tuple[tuple[str, str], ...]:
    return () if token is None else (("authorization", f"Bearer {token}"),)


def _request(**fields: Any) -> inference_pb2.GenerateRequest:
    request = inference_pb2.GenerateRequest(prompt="a b c", **fields)
    request.stop.max_tokens = 2
    return request


# Timeouts by the name of an adapter.
TIME_OUTS = {"a": "99999999H", "b": "2600000H", "c": "99999999S"}


def test_timeouts_of_thousands_of_years_are_accepted(model: Path, tmp_path: Path) -> None:
    """Adapters are only on disk after the restart, so the engine waits for them with a timeout."""
    flags = ("--model", str(model), "--state-dir", str(tmp_path / "state"))
    for seed, name in enumerate(TIME_OUTS):
        write_adapter(tmp_path / "adapters", arch_of(model), AdapterSpec(name, rank=4), seed)
    with start_server(tmp_path, *flags) as server, grpc.insecure_channel(server.address) as channel:
        stub = adapters_pb2_grpc.AdaptersStub(channel)
        for name in TIME_OUTS:
            stub.LoadAdapter(adapters_pb2.LoadAdapterRequest(name=name, path=name))
    with start_server(tmp_path, *flags) as server:
        for name, timeout in TIME_OUTS.items():
            cold = _request(adapters=[adapters_pb2.AdapterWeight(name=name)]).SerializeToString()
            headers = [("grpc-timeout", timeout)]
            answer = raw_grpc.unary(server.address, GENERATE, cold, headers, 60.0)
            assert answer is not None
            response = inference_pb2.GenerateResponse.FromString(answer)
            assert response.usage.completion_tokens == 2
            assert response.adapters_used[0].cold_start
            assert server.process.poll() is None


@dataclass(frozen=True, slots=True)
class Attack:
    """A large message that a server rejects: the RPC, the bytes, the token, and the answer."""

    method: str
    message: bytes
    token: str | None
    code: str

    def send(self, channel: grpc.Channel) -> None:
        call: Callable[..., bytes] = channel.unary_unary(
            self.method, request_serializer=None, response_deserializer=None
        )
        with pytest.raises(grpc.RpcError) as caught:
            call(self.message, timeout=60, metadata=_bearer(self.token))
        assert isinstance(caught.value, grpc.Call)
        assert caught.value.code() is grpc.StatusCode[self.code], caught.value


def _attacks() -> list[Attack]:
    bias = _request()
    bias.sampling.logit_bias.update(dict.fromkeys(range(1000, 280_000), 1.0))
    spread = _request()
    spread.stop.stop_token_ids.extend([1 << 20] * (LARGE // 3))
    chat = inference_pb2.GenerateRequest()
    chat.chat.messages.add(role="user", content="x" * LARGE)
    unknown = _request(adapters=[adapters_pb2.AdapterWeight(name="nobody")])
    unknown.stop.stop_strings.append("y" * LARGE)
    tokens = inference_pb2.TokenizeRequest()
    tokens.token_ids.ids.extend([1 << 25] * (LARGE // 4))
    path = adapters_pb2.LoadAdapterRequest(name="z", path="p" * LARGE)
    nameless = adapters_pb2.UnloadAdapterRequest(name="n" * LARGE)
    invalid = (
        *(
            (GENERATE, each.SerializeToString(), INFERENCE)
            for each in (bias, spread, chat, unknown)
        ),
        (GENERATE, b"\xff" * LARGE, INFERENCE),
        ("/turret.v1.Inference/Tokenize", tokens.SerializeToString(), INFERENCE),
        ("/turret.v1.Adapters/LoadAdapter", path.SerializeToString(), ADMIN),
        ("/turret.v1.Adapters/UnloadAdapter", nameless.SerializeToString(), ADMIN),
    )
    data, service = bias.SerializeToString(), b"\x0a\xc0\x8d\xb7\x01" + b"s" * LARGE
    return [
        Attack(GENERATE, data, None, "UNAUTHENTICATED"),
        Attack(GENERATE, data, "guess", "UNAUTHENTICATED"),
        Attack(GENERATE, data, ADMIN, "PERMISSION_DENIED"),
        Attack("/grpc.health.v1.Health/Check", service, None, "NOT_FOUND"),
        *(Attack(*each, "INVALID_ARGUMENT") for each in invalid),
    ]


ATTACKS = _attacks()


@pytest.fixture(scope="module")
def guarded(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerUnderTest]:
    folder = tmp_path_factory.mktemp("guarded")
    tokens = folder / "tokens"
    tokens.write_text(f"{INFERENCE} inference\n{ADMIN} admin\n")
    tokens.chmod(0o600)
    with start_server(folder, "--model", str(model), "--token-file", str(tokens)) as server:
        yield server


def _rss_mib(server: ServerUnderTest) -> float:
    return psutil.Process(server.process.pid).memory_info().rss / (1 << 20)


def test_refused_messages_free_their_memory(guarded: ServerUnderTest) -> None:
    """All of 504 messages of 3 MB are rejected; each of them could leave up to 24 MiB."""
    options = (("grpc.max_send_message_length", -1),)
    with grpc.insecure_channel(guarded.address, options) as channel:
        # Lasting allocations of the first messages (arenas, caches) do not count.
        for attack in ATTACKS * 3:
            attack.send(channel)
        before = _rss_mib(guarded)
        for _ in range(500 // len(ATTACKS) + 1):
            for attack in ATTACKS:
                attack.send(channel)
        assert _rss_mib(guarded) - before < LASTING_MIB
        polite = inference_pb2_grpc.InferenceStub(channel).Generate(
            _request(), metadata=_bearer(INFERENCE)
        )
        assert polite.usage.completion_tokens == 2


def _padded(max_tokens: int) -> bytes:
    """A valid request in a large message, with an unknown field."""
    request = _request()
    request.stop.max_tokens = max_tokens
    request.stop.ignore_eos = True
    length = inference_pb2.GenerateRequest(prompt="x" * LARGE).SerializeToString()
    # Field 1000, with the length and the bytes of the prompt's field.
    return request.SerializeToString() + b"\xc2\x3e" + length[1:]


def test_requests_that_wait_take_a_bounded_amount_of_memory(tmp_path: Path) -> None:
    """Forty messages of 3 MB behind a long answer: the bytes, not the number, fill the queue."""
    long = {"max_position_embeddings": 1 << 16}
    model = save_tiny_model("llama", tmp_path / "model", changes=long)
    flags = ("--model", str(model), "--max-num-seqs", "1", "--max-queued-bytes", "16MiB")
    flags = (*flags, "--speculation", "off", "--kv-cache-bytes", "128MiB")
    with start_server(tmp_path, *flags) as server, grpc.insecure_channel(server.address) as channel:
        call = channel.unary_unary(
            GENERATE,
            request_serializer=None,
            response_deserializer=inference_pb2.GenerateResponse.FromString,
        )
        call(_padded(2), timeout=60)
        before = _rss_mib(server)
        running = call.future(_padded(60_000))
        # A request that arrives first would run first.
        while server.metric("turret_sequences", state="running") == 0:
            assert not running.done()
            time.sleep(0.05)
        calls: list[Any] = []
        for _ in range(40):
            # Send them one by one, because gRPC keeps messages that are in transit.
            calls.append(call.future(_padded(2), timeout=120))
            with contextlib.suppress(grpc.FutureTimeoutError):
                calls[-1].exception(timeout=0.5)
        assert _rss_mib(server) - before < 16 + 2 * LASTING_MIB
        assert not running.done()
        running.cancel()
        codes = [future.code() for future in calls]
        assert codes.count(grpc.StatusCode.OK) == 4
        assert codes.count(grpc.StatusCode.RESOURCE_EXHAUSTED) == 36
        # Ended requests no longer hold memory.
        for _ in range(10):
            call(_padded(2), timeout=60)


def test_a_party_gets_no_more_than_its_share(model: Path, tmp_path: Path) -> None:
    """Two tokens from one address have separate limits, and ended requests do not count."""
    tokens = tmp_path / "tokens"
    tokens.write_text("first inference\nsecond inference\n")
    tokens.chmod(0o600)
    limits = ("--max-requests-per-token", "3", "--max-requests-per-peer", "5")
    flags = ("--model", str(model), "--token-file", str(tokens), *limits)
    with start_server(tmp_path, *flags) as server, grpc.insecure_channel(server.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        long = _request()
        long.stop.max_tokens = 400
        long.stop.ignore_eos = True

        def open_streams(token: str, count: int) -> list[Any]:
            streams = [stub.GenerateStream(long, metadata=_bearer(token)) for _ in range(count)]
            for stream in streams:
                next(stream)
            return streams

        def refusal(token: str) -> Any:
            with pytest.raises(grpc.RpcError) as caught:
                stub.Generate(_request(), metadata=_bearer(token))
            error: Any = caught.value
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            return TurretRpcError.from_grpc(error).metadata

        first = open_streams("first", 3)
        assert "max_requests_per_token" in refusal("first")
        second = open_streams("second", 2)
        assert "max_requests_per_peer" in refusal("second")
        for stream in (*first, *second):
            stream.cancel()
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                stub.Generate(_request(), metadata=_bearer("first"))
                break
            except grpc.RpcError:
                time.sleep(0.05)
        else:
            pytest.fail("cancelled requests are counted still")


def test_tokens_change_without_a_restart(model: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("old inference\n")
    tokens.chmod(0o600)
    flags = ("--model", str(model), "--token-file", str(tokens))
    with start_server(tmp_path, *flags) as server, grpc.insecure_channel(server.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)

        def is_accepted(token: str) -> bool:
            try:
                stub.Generate(_request(), metadata=_bearer(token), timeout=60)
            except grpc.RpcError:
                return False
            return True

        def becomes_accepted(token: str) -> bool:
            deadline = time.monotonic() + 20
            while not is_accepted(token) and time.monotonic() < deadline:
                time.sleep(0.1)
            return is_accepted(token)

        assert is_accepted("old")
        tokens.write_text("new inference\n")
        server.process.send_signal(signal.SIGHUP)
        assert becomes_accepted("new")
        assert not is_accepted("old")
        # An invalid file changes nothing; the next valid one is noticed without a signal.
        tokens.write_text("nonsense\n")
        server.process.send_signal(signal.SIGHUP)
        time.sleep(1)
        assert is_accepted("new")
        tokens.write_text("third inference\n")
        assert becomes_accepted("third")
        assert not is_accepted("new")


# Each of the messages below once took between 300 ms and 8 s.
IDLE_SECONDS = 0.25
# The limit if other programs use the processors, too.
BUSY_SECONDS = 1.0
HEALTH = health_pb2.HealthCheckRequest()


def _generate(**fields: object) -> inference_pb2.GenerateRequest:
    request = inference_pb2.GenerateRequest(**fields)  # type: ignore[arg-type]
    request.stop.max_tokens = 1
    return request


def _chat(count: int, role: str) -> inference_pb2.GenerateRequest:
    turn = inference_pb2.ChatMessage(role=role, content="")
    return _generate(chat=inference_pb2.Chat(messages=[turn] * count))


def _called(turns: int) -> inference_pb2.Chat:
    call = inference_pb2.ToolCall(name="f", arguments="{}")
    turn = inference_pb2.ChatMessage(role="assistant", tool_calls=[call] * 128)
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
        "as many turns as fit": _chat(4096, "user"),
        "as many tool calls as fit": _generate(chat=_called(64)),
        "a long role": _chat(1, "a b " * 1_000_000),
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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerUnderTest]:
    folder = tmp_path_factory.mktemp("loop")
    model = save_tiny_model("llama", folder / "model")
    with start_server(folder, "--model", str(model)) as server:
        yield server


def test_tool_calls_are_counted_before_they_are_read() -> None:
    violations = Violations()
    limits = InputLimits(vocab_size=1, max_tokens=1 << 20, max_chars=1 << 30)
    check_chat(_called(4096), limits, violations)
    ((path, description),) = violations.found
    assert path == "chat.messages.tool_calls"
    assert isinstance(description, Text)
    assert description.reason == "TOO_MANY_ENTRIES"
    assert description.params == {"most": 8192, "found": 4096 * 128}
    check_chat(_called(64), limits, allowed := Violations())
    assert not allowed.found


def test_no_message_stops_the_event_loop(server: ServerUnderTest) -> None:
    worst: dict[str, float] = {}
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    with (
        grpc.insecure_channel(server.address, options) as channel,
        grpc.insecure_channel(server.address) as other,
    ):
        stub: Any = health_pb2_grpc.HealthStub(other)
        for name, message in _messages().items():
            for _ in range(2):
                with Neighbour(lambda: [stub.Check(HEALTH, timeout=60)]) as checks:
                    time.sleep(0.1)
                    _send(channel, message)
                # Take the better of two runs, which excludes other load on the machine.
                worst[name] = min(worst.get(name, math.inf), checks.worst)
    is_busy = os.getloadavg()[0] > (os.cpu_count() or 1)
    limit = BUSY_SECONDS if is_busy else IDLE_SECONDS
    assert {name: value for name, value in worst.items() if value > limit} == {}
