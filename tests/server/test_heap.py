"""Cycles that requests leave are collected with the server's settings."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import grpc
import pytest
from servers import raw_grpc
from servers.http_harness import http_harness
from servers.rpc_harness import failure_of, harness

from turret.server import cli
from turret.server.api.access import TokenTable
from turret.v1 import inference_pb2

GENERATE = "/turret.v1.Inference/Generate"
ROUNDS = 40
# The collector's first threshold is divided by this, so that few requests reach it.
DIVISOR = 200


@pytest.fixture
def frozen_heap() -> Iterator[int]:
    """The collector with a server's settings at a small scale; returns its first threshold."""
    thresholds = gc.get_threshold()
    cli._freeze_heap()
    first, *others = gc.get_threshold()
    gc.set_threshold(first // DIVISOR, *others)
    yield first // DIVISOR
    gc.set_threshold(*thresholds)
    gc.unfreeze()


async def most_gathered(ask: Callable[[], Awaitable[None]]) -> int:
    """The maximum growth of the number of objects during ``ROUNDS`` of requests."""
    for _ in range(4):
        await ask()
    gc.collect()
    before, most = len(gc.get_objects()), 0
    for _ in range(ROUNDS):
        await ask()
        most = max(most, len(gc.get_objects()) - before)
    return most


BODIES: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("/v1/completions", {"model": "base", "prompt": "a"}, 200),
    ("/v1/completions", {"model": "base", "prompt": "a", "temperature": "x"}, 400),
    ("/v1/chat/completions", {"model": "base", "messages": [{}]}, 400),
    ("/v1/completions", {"model": "Nothing!", "prompt": "a"}, 404),
    ("/v1/nothing", {}, 404),
)


async def test_objects_of_http_requests_do_not_accumulate(frozen_heap: int) -> None:
    async with http_harness() as server:

        async def ask() -> None:
            for path, body, status in BODIES:
                assert (await server.post(path, body)).status_code == status
            await server.settle()

        assert await most_gathered(ask) < 4 * frozen_heap


async def test_objects_of_grpc_calls_do_not_accumulate(frozen_heap: int) -> None:
    async with harness() as server:

        async def ask() -> None:
            for _ in range(2):
                await server.inference.Generate(inference_pb2.GenerateRequest(prompt="a"))
                bad = inference_pb2.GenerateRequest(prompt="a", request_id="x" * 200)
                failure = await failure_of(server.inference.Generate(bad))
                assert failure.code is grpc.StatusCode.INVALID_ARGUMENT

        assert await most_gathered(ask) < 4 * frozen_heap


async def test_calls_without_a_token_leave_few_objects_for_the_collector() -> None:
    """A client without a token can send thousands of calls per second."""
    count, message = 50, inference_pb2.GenerateRequest(prompt="a").SerializeToString()
    async with harness(tokens=TokenTable([("alice", frozenset({"inference"}))])) as server:

        def ask() -> None:
            for _ in range(count):
                assert raw_grpc.unary(server.rpc.address, GENERATE, message, [], 10.0) is None

        await asyncio.to_thread(ask)
        gc.collect()
        gc.disable()
        try:
            before = len(gc.get_objects())
            await asyncio.to_thread(ask)
            assert len(gc.get_objects()) - before < 15 * count
        finally:
            gc.enable()
