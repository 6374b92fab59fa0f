"""An in-process gRPC server with fakes, and the parts of its failures."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2
from servers.fakes import Fakes

from turret.clients.calls import answer_of
from turret.server.api.access import TokenTable
from turret.server.config import ListenConfig, SecurityConfig
from turret.server.rpc import RpcServer
from turret.v1 import adapters_pb2_grpc, inference_pb2_grpc, training_pb2_grpc


@dataclass
class Harness(Fakes):
    """A running server with its parts and a client channel."""

    rpc: RpcServer
    channel: grpc.aio.Channel

    @property
    def inference(self) -> Any:
        return inference_pb2_grpc.InferenceStub(self.channel)  # type: ignore[arg-type]

    @property
    def training(self) -> Any:
        return training_pb2_grpc.TrainingStub(self.channel)  # type: ignore[arg-type]

    @property
    def adapters(self) -> Any:
        return adapters_pb2_grpc.AdaptersStub(self.channel)  # type: ignore[arg-type]

    def sample(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)


@contextlib.asynccontextmanager
async def harness(
    *,
    listen: ListenConfig | None = None,
    security: SecurityConfig | None = None,
    serving: bool = True,
    **parts: Any,
) -> AsyncIterator[Harness]:
    """A server on a free port with fakes; ``parts`` are the arguments of ``Fakes.make``."""
    fakes = Fakes.make(**parts)
    listen = listen or ListenConfig(address="127.0.0.1:0")
    rpc = RpcServer(listen, security or SecurityConfig(), fakes.services)
    await rpc.start()
    if serving:
        fakes.gate.open(fakes.backend)
        rpc.health.set_serving(True)
    try:
        async with grpc.aio.insecure_channel(rpc.address) as channel:
            yield Harness(*fakes.fields, rpc=rpc, channel=channel)
    finally:
        fakes.services.adapters.close()
        await rpc.stop(0)


@dataclass
class Failure:
    """The parts of a failed call."""

    code: grpc.StatusCode
    message: str
    reason: str
    metadata: dict[str, str]
    violations: dict[str, str]
    reasons: dict[str, str]
    retry_seconds: float | None
    request_id: str


async def failure_of(call: Any) -> Failure:
    """Await a call (or drain a stream) that must fail."""
    try:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        elif isinstance(call, grpc.aio.StreamUnaryCall):
            await answer_of(call)
        else:
            await call
    except grpc.aio.AioRpcError as error:
        trailers = dict(error.trailing_metadata() or ())
        rich = status_pb2.Status()
        rich.ParseFromString(trailers.get("grpc-status-details-bin", b""))  # type: ignore[arg-type]
        if rich.code and (rich.code, rich.message) != (error.code().value[0], error.details()):
            raise AssertionError("status and rich status disagree") from error
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        retry = error_details_pb2.RetryInfo()
        for detail in rich.details:
            for message in (info, bad, retry):
                detail.Unpack(message)
        if rich.details and info.domain != "turret":
            raise AssertionError("no ErrorInfo of turret") from error
        return Failure(
            code=error.code(),
            message=error.details() or "",
            reason=info.reason,
            metadata=dict(info.metadata),
            violations={v.field: v.description for v in bad.field_violations},
            reasons={v.field: v.reason for v in bad.field_violations},
            retry_seconds=retry.retry_delay.ToTimedelta().total_seconds()
            if retry.HasField("retry_delay")
            else None,
            request_id=str(trailers.get("x-request-id", "")),
        )
    raise AssertionError("the call succeeded")


async def soon(event: asyncio.Event) -> float:
    """Wait for an event that must happen; returns the duration."""
    started = time.monotonic()
    await asyncio.wait_for(event.wait(), 5.0)
    return time.monotonic() - started


async def eventually(is_so: Callable[[], Awaitable[bool]]) -> None:
    """Wait for a state for which there is no event."""
    for _ in range(2000):
        if await is_so():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the state was not reached")


async def silent() -> AsyncIterator[bytes]:
    """The messages of a call whose first message never comes."""
    await asyncio.Event().wait()
    yield b""


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """The metadata with a token."""
    return (("authorization", f"Bearer {token}"),)


def tokens_of(*names: str, role: str = "inference") -> TokenTable:
    """Tokens that have one role."""
    return TokenTable([(name, frozenset({role})) for name in names])
