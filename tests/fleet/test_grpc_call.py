"""A call from Ray Serve is answered like one from turret's own listener."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import grpc
import httpx2
import pytest
from fleets.replicas import Wire
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2
from servers import raw_grpc
from servers.fakes import FakeEngine, FakeFuser, FakeMerger, FakeRegistry, fake_backend
from servers.rpc_harness import bearer, failure_of, silent, tokens_of

from turret.fleet.serving.calls import CallContext, from_client
from turret.fleet.serving.replica_server import ReplicaServer
from turret.server import rpc as interceptors
from turret.server.api.access import Shares
from turret.server.api.gate import ServingGate
from turret.server.api.services import Services
from turret.server.config import Config, ListenConfig
from turret.server.errors import AdapterNotFoundError, QueueFullError
from turret.server.http.server import application
from turret.server.rpc import DETAILS_KEY, CallInterceptor, current_call
from turret.v1 import inference_pb2

METHOD = "/turret.v1.Inference/GenerateStream"


class Inner:
    """The parts of Serve's context that a call uses."""

    def __init__(self, *metadata: tuple[str, str]) -> None:
        self.metadata = [("x-request-id", "mine"), *metadata]
        self.status: grpc.StatusCode | None = None
        self.details = ""
        self.trailers: dict[str, str | bytes] = {}

    def code(self) -> grpc.StatusCode | None:
        return self.status

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return self.metadata

    def set_code(self, code: grpc.StatusCode) -> None:
        self.status = code

    def set_details(self, details: str) -> None:
        self.details = details

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        self.trailers = dict(trailing_metadata)


@pytest.fixture
def interceptor() -> CallInterceptor:
    return CallInterceptor(Services(gate=ServingGate()))


def stream(interceptor: CallInterceptor, inner: Inner, body: Any) -> AsyncIterator[Any]:
    context = CallContext(inner)
    return context.messages(lambda: interceptor.run(METHOD, context, lambda: body(context)))


async def test_messages_arrive_in_order_before_the_status(
    interceptor: CallInterceptor,
) -> None:
    inner = Inner()

    async def body(context: CallContext) -> None:
        for number in range(5):
            await context.write(number)

    assert [each async for each in stream(interceptor, inner, body)] == list(range(5))
    assert inner.status is None
    assert inner.trailers == {"x-request-id": "mine"}


async def test_an_error_after_messages_is_set_as_the_status(
    interceptor: CallInterceptor,
) -> None:
    inner = Inner()

    async def body(context: CallContext) -> None:
        await context.write("first")
        raise AdapterNotFoundError("adapter not found: x", metadata={"adapters": "x"})

    assert [each async for each in stream(interceptor, inner, body)] == ["first"]
    assert (inner.status, inner.details) == (grpc.StatusCode.NOT_FOUND, "adapter not found: x")
    details = inner.trailers[DETAILS_KEY]
    assert isinstance(details, bytes)
    info = error_details_pb2.ErrorInfo()
    assert status_pb2.Status.FromString(details).details[0].Unpack(info)
    assert (info.reason, dict(info.metadata)) == ("ADAPTER_NOT_FOUND", {"adapters": "x"})


async def test_a_client_that_stops_reading_ends_the_call(interceptor: CallInterceptor) -> None:
    ended = asyncio.Event()
    written: list[int] = []

    async def body(context: CallContext) -> None:
        try:
            for number in range(1000):
                await context.write(number)
                written.append(number)
        finally:
            ended.set()

    messages: Any = stream(interceptor, Inner(), body)
    assert await anext(messages) == 0
    await messages.aclose()
    assert ended.is_set()
    assert len(written) < 5, "it writes no further than one reads"


async def test_a_refusal_before_any_message(interceptor: CallInterceptor) -> None:
    inner = Inner()

    async def body(context: CallContext) -> None:
        assert current_call().request_id == "mine"
        raise QueueFullError("full")

    assert [each async for each in stream(interceptor, inner, body)] == []
    assert inner.status is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    ("said", "peer", "client"),
    [
        ([], "ipv4:127.0.0.1:1", ("127.0.0.1", 1)),
        (["10.0.0.7"], "ipv4:10.0.0.7:0", ("10.0.0.7", 0)),
        # A client's claim precedes the address that the ingress has seen.
        (["10.9.9.9", "10.0.0.7"], "ipv4:10.0.0.7:0", ("10.0.0.7", 0)),
        (["10.9.9.9, 10.0.0.7"], "ipv4:10.0.0.7:0", ("10.0.0.7", 0)),
        (["fd00::0:1"], "ipv6:[fd00::1]:0", ("fd00::1", 0)),
        (["10.0.0.7", "somebody"], "ipv4:127.0.0.1:1", ("127.0.0.1", 1)),
    ],
)
def test_a_call_is_attributed_to_its_client_not_the_ingress(
    said: list[str], peer: str, client: tuple[str, int]
) -> None:
    inner = Inner(*(("x-forwarded-for", value) for value in said))
    assert CallContext(inner).peer() == peer
    headers = [(b"x-forwarded-for", value.encode()) for value in said]
    scope = {"type": "http", "headers": headers, "client": ("127.0.0.1", 1)}
    assert from_client(scope)["client"] == client


async def test_both_protocols_are_closed_while_the_replica_must_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = Config(listen=ListenConfig(http_address="127.0.0.1:8080"))
    link = SimpleNamespace(is_serving=True)
    server = ReplicaServer(config, "r0", Wire(lambda: None), stops_alone=True)
    monkeypatch.setattr(server, "_link", link)
    server._gate.open(fake_backend(FakeEngine(), FakeRegistry(), FakeMerger(), FakeFuser()))
    app = application(config.listen, server.services)
    transport = httpx2.ASGITransport(app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:

        async def health(service: str = "turret.v1.Inference") -> tuple[int, Any]:
            inner = Inner()
            asked = health_pb2.HealthCheckRequest(service=service)
            return (await server.check_service(asked, inner)).status, inner.status

        async def answers() -> tuple[int, int, grpc.StatusCode | None]:
            http = [(await client.get(path)).status_code for path in ("/health", "/v1/models")]
            inner = Inner()
            await server.answer("Inference", "GetModel", inference_pb2.GetModelRequest(), inner)
            return http[0], http[1], inner.status

        assert await answers() == (200, 200, None)
        assert await health() == (health_pb2.HealthCheckResponse.SERVING, None)
        assert (await health("turret.v1.Nobody"))[1] is grpc.StatusCode.NOT_FOUND
        link.is_serving = False
        assert await answers() == (503, 503, grpc.StatusCode.UNAVAILABLE)
        assert await health() == (health_pb2.HealthCheckResponse.NOT_SERVING, None)
        link.is_serving = True
        assert await health() == (health_pb2.HealthCheckResponse.SERVING, None)
        backend = SimpleNamespace(engine=SimpleNamespace(is_dead=True))
        monkeypatch.setattr(server, "_backend", backend)
        assert await answers() == (503, 503, grpc.StatusCode.UNAVAILABLE)
        assert await health() == (health_pb2.HealthCheckResponse.NOT_SERVING, None)
    server.services.adapters.close()


ALICE = bearer("alice")
ASKED, ANSWER = inference_pb2.GenerateRequest, inference_pb2.GenerateResponse


@contextlib.asynccontextmanager
async def serve(begun: list[str]) -> AsyncIterator[str]:
    """The address of a server like Serve's, whose handlers run as the fleet makes them run."""

    async def generate(request: Any, context: Any) -> bytes:
        begun.append(request.prompt)
        # Serve sets the status of every call.
        if request.prompt == "fail":
            context.set_code(grpc.StatusCode.NOT_FOUND)
            return b""
        context.set_code(grpc.StatusCode.OK)
        return bytes(ANSWER(text=request.prompt).SerializeToString())

    async def stream(request: Any, context: Any) -> AsyncIterator[bytes]:
        for _ in range(3):
            yield await generate(request, context)

    services = Services(
        gate=ServingGate(), tokens=tokens_of("alice"), shares=Shares(separates_tokens=True)
    )
    receiving = CallInterceptor(services).receiving
    parse: dict[str, Any] = {"request_deserializer": ASKED.FromString}
    given = {
        "Generate": grpc.unary_unary_rpc_method_handler(generate, **parse),
        "GenerateStream": grpc.unary_stream_rpc_method_handler(stream, **parse),
    }
    service = "turret.v1.Inference"
    handlers = {n: receiving(f"/{service}/{n}", each, CallContext) for n, each in given.items()}
    server = grpc.aio.server(options=[("grpc.http2.bdp_probe", 0)])
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)
        services.adapters.close()


async def test_ray_serves_own_handlers_still_answer() -> None:
    begun: list[str] = []
    async with serve(begun) as address, grpc.aio.insecure_channel(address) as channel:
        one: Any = channel.unary_unary(
            "/turret.v1.Inference/Generate", ASKED.SerializeToString, ANSWER.FromString
        )
        assert (await one(ASKED(prompt="a"), metadata=ALICE)).text == "a"
        assert (await failure_of(one(ASKED(prompt="fail"), metadata=ALICE))).code is (
            grpc.StatusCode.NOT_FOUND
        )
        many: Any = channel.unary_stream(
            "/turret.v1.Inference/GenerateStream", ASKED.SerializeToString, ANSWER.FromString
        )
        assert [each.text async for each in many(ASKED(prompt="b"), metadata=ALICE)] == ["b"] * 3
        broken: Any = channel.unary_unary("/turret.v1.Inference/Generate")
        failure = await failure_of(broken(b"\xff", metadata=ALICE))
        assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
    assert begun == ["a", "fail", "b", "b", "b"]


async def test_tokens_are_checked_before_the_message_has_arrived() -> None:
    begun: list[str] = []
    async with serve(begun) as address, grpc.aio.insecure_channel(address) as channel:
        method: Any = channel.stream_unary("/turret.v1.Inference/Generate")
        for metadata in ((), bearer("nobody")):
            failure = await failure_of(method(silent(), metadata=metadata, timeout=10))
            assert failure.code is grpc.StatusCode.UNAUTHENTICATED
    assert begun == []


async def test_parts_of_messages_take_a_bounded_amount_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The parts of 100 messages of 1 MiB, of which at most four arrive at the same time."""
    monkeypatch.setattr(interceptors, "MOST_ARRIVING", 5)
    method = "/turret.v1.Inference/Generate"
    async with serve([]) as address:
        accepted = await asyncio.to_thread(
            raw_grpc.accepted_bytes, address, method, ALICE, 100, 1 << 20, 0.5
        )
    assert accepted < (4 << 20) + 101 * (64 << 10)
