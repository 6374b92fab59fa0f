"""Calls that mean harm, against a real server: they stop nobody and leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from builders.random_adapters import AdapterSpec, arch_of, write_adapter
from builders.tiny_models import save_tiny_model
from servers import raw_grpc
from servers.server_under_test import ServerUnderTest, start_server

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


@pytest.mark.parametrize("timeout", ["99999999H", "2600000H", "99999999S"])
def test_a_time_out_of_thousands_of_years_is_served(
    model: Path, tmp_path: Path, timeout: str
) -> None:
    """The adapter is on disk alone after the restart, so the engine waits with the deadline."""
    flags = ("--model", str(model), "--state-dir", str(tmp_path / "state"))
    write_adapter(tmp_path / "adapters", arch_of(model), AdapterSpec("cold", rank=4), 0)
    with start_server(tmp_path, *flags) as server, grpc.insecure_channel(server.address) as channel:
        adapters_pb2_grpc.AdaptersStub(channel).LoadAdapter(
            adapters_pb2.LoadAdapterRequest(name="cold", path="cold")
        )
    cold = _request(adapters=[adapters_pb2.AdapterWeight(name="cold")]).SerializeToString()
    with start_server(tmp_path, *flags) as server:
        headers = [("grpc-timeout", timeout)]
        answer = raw_grpc.unary(server.address, GENERATE, cold, headers, 60.0)
        assert answer is not None
        response = inference_pb2.GenerateResponse.FromString(answer)
        assert response.usage.completion_tokens == 2
        assert response.adapters_used[0].cold_start
        assert server.process.poll() is None


class Attack:
    """One kind of large message that a server refuses.

    Args:
        method: Full name of the RPC.
        message: As sent.
        token: The caller's; None for none.
        code: The expected answer.
    """

    def __init__(self, method: str, message: bytes, token: str | None, code: str) -> None:
        self.method = method
        self.message = message
        self.token = token
        self.code = grpc.StatusCode[code]

    def send(self, channel: grpc.Channel) -> None:
        call: Callable[..., bytes] = channel.unary_unary(
            self.method, request_serializer=None, response_deserializer=None
        )
        with pytest.raises(grpc.RpcError) as caught:
            call(self.message, timeout=60, metadata=_bearer(self.token))
        assert isinstance(caught.value, grpc.Call)
        assert caught.value.code() is self.code, caught.value


def _attacks() -> dict[str, Attack]:
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
    adapters = "/turret.v1.Adapters"
    return {
        name: Attack(method, message, token, code)
        for name, method, message, token, code in (
            ("no token", GENERATE, bias.SerializeToString(), None, "UNAUTHENTICATED"),
            ("other token", GENERATE, bias.SerializeToString(), "guess", "UNAUTHENTICATED"),
            ("other role", GENERATE, bias.SerializeToString(), ADMIN, "PERMISSION_DENIED"),
            ("bias", GENERATE, bias.SerializeToString(), INFERENCE, "INVALID_ARGUMENT"),
            ("stop ids", GENERATE, spread.SerializeToString(), INFERENCE, "INVALID_ARGUMENT"),
            ("chat", GENERATE, chat.SerializeToString(), INFERENCE, "INVALID_ARGUMENT"),
            ("stop string", GENERATE, unknown.SerializeToString(), INFERENCE, "INVALID_ARGUMENT"),
            ("no protobuf", GENERATE, b"\xff" * LARGE, INFERENCE, "INVALID_ARGUMENT"),
            (
                *("ids", "/turret.v1.Inference/Tokenize", tokens.SerializeToString()),
                *(INFERENCE, "INVALID_ARGUMENT"),
            ),
            (
                *("path", f"{adapters}/LoadAdapter", path.SerializeToString()),
                *(ADMIN, "INVALID_ARGUMENT"),
            ),
            (
                *("name", f"{adapters}/UnloadAdapter", nameless.SerializeToString()),
                *(ADMIN, "INVALID_ARGUMENT"),
            ),
            (
                *(
                    "service",
                    "/grpc.health.v1.Health/Check",
                    b"\x0a\xc0\x8d\xb7\x01" + b"s" * LARGE,
                ),
                *(None, "NOT_FOUND"),
            ),
        )
    }


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


def test_refused_messages_leave_nothing_behind(guarded: ServerUnderTest) -> None:
    """504 messages of 3 MB, every one refused; without care each leaves up to 24 MiB."""
    options = (("grpc.max_send_message_length", -1),)
    with grpc.insecure_channel(guarded.address, options) as channel:
        # What the first ones bring in (the allocator's arenas, caches) is not counted.
        for attack in [*ATTACKS.values()] * 3:
            attack.send(channel)
        before = _rss_mib(guarded)
        for _ in range(500 // len(ATTACKS) + 1):
            for attack in ATTACKS.values():
                attack.send(channel)
        assert _rss_mib(guarded) - before < LASTING_MIB
        polite = inference_pb2_grpc.InferenceStub(channel).Generate(
            _request(), metadata=_bearer(INFERENCE)
        )
        assert polite.usage.completion_tokens == 2
