"""Deadlines of calls, and the errors after them."""

from __future__ import annotations

import math
import sys
import threading
from fractions import Fraction
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from servers.fake_turret import FOREVER, FakeInference, FakeTurret, abort, fake_turret

from turret.clients.aio import AsyncTurretClient
from turret.clients.client import TurretClient
from turret.clients.errors import DeadlineExceededError
from turret.v1 import inference_pb2

LONG = [1e9, 3e9, 9.2e9, 1e10, sys.maxsize, pytest.param(10**400, id="10**400"), math.inf]


@pytest.mark.parametrize("seconds", LONG)
async def test_an_enormous_timeout_sets_no_deadline(server: FakeTurret, seconds: Any):
    def has_no_deadline() -> bool:
        left, server.inference.time_remaining = server.inference.time_remaining, 0.0
        return left is None

    with TurretClient(server.address, timeout=seconds) as client:
        assert client.generate("a").text == "a"
        assert has_no_deadline()
        assert client.adapters.get("sql", timeout=seconds).name == "sql"
        assert [chunk.text for chunk in client.generate_stream("a", timeout=seconds)] == ["a", ""]
        assert has_no_deadline()
    async with AsyncTurretClient(server.address) as client:
        assert (await client.generate("a", timeout=seconds)).text == "a"
        assert has_no_deadline()
        async with client.generate_stream("a", timeout=seconds) as stream:
            assert [chunk.text async for chunk in stream] == ["a", ""]
        assert has_no_deadline()


def test_any_real_number_is_a_timeout(client: TurretClient, server: FakeTurret):
    client.generate("a", timeout=Fraction(5))  # type: ignore[arg-type]
    assert 4 < (server.inference.time_remaining or 0) < 5.1


async def test_a_missed_deadline_reports_the_timeout(server: FakeTurret):
    with TurretClient(server.address) as client, pytest.raises(DeadlineExceededError) as raised:
        list(client.generate_stream(FOREVER, timeout=0.2))
    assert raised.value.metadata == {"timeout": "0.2"}
    assert "0.2" in str(raised.value)
    async with AsyncTurretClient(server.address) as client:
        stream = client.generate_stream(FOREVER, timeout=0.2)
        with pytest.raises(DeadlineExceededError) as raised:
            [chunk async for chunk in stream]
    assert raised.value.metadata == {"timeout": "0.2"}


class Punctual(FakeInference):
    """A server that reports the deadline itself, before the client notices it."""

    def GenerateStream(self, request, context):
        reason = inference_pb2.GenerateResponse.DEADLINE
        yield inference_pb2.GenerateChunk(text="a", finish_reason=reason)
        info = error_details_pb2.ErrorInfo(reason="DEADLINE_EXCEEDED", domain="turret")
        said = "the deadline passed before the request finished"
        abort(context, grpc.StatusCode.DEADLINE_EXCEEDED, said, info)


def test_a_server_that_reaches_the_deadline_first_returns_the_partial_answer():
    with fake_turret(Punctual) as server, TurretClient(server.address) as client:
        stream = client.generate_stream("a", timeout=5)
        assert next(stream).finish_reason == "DEADLINE"
        with pytest.raises(DeadlineExceededError) as raised:
            next(stream)
    assert (raised.value.reason, raised.value.metadata["timeout"]) == ("DEADLINE_EXCEEDED", "5")


def test_a_deadline_that_the_client_enforces_reports_the_timeout():
    over = threading.Event()

    class Late(FakeInference):
        def Generate(self, request, context):
            over.wait(20)
            return super().Generate(request, context)

    with fake_turret(Late) as server, TurretClient(server.address, timeout=0.1) as client:
        with pytest.raises(DeadlineExceededError) as raised:
            client.generate("a")
        over.set()
    assert raised.value.metadata["timeout"] == "0.1"
