"""Apps in this process: with fakes, or serving a real model."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx2
from servers.fakes import FakeEngine, FakeFuser, FakeMerger, FakeRegistry, fake_backend

from turret.server.api.gate import Backend
from turret.server.app import App
from turret.server.config import Config, LifecycleConfig, ListenConfig, ModelConfig
from turret.v1 import inference_pb2_grpc

LISTEN = ListenConfig(address="127.0.0.1:0", metrics_address="127.0.0.1:0")
BOTH = ListenConfig(address="127.0.0.1:0", http_address="127.0.0.1:0", metrics_address=None)

GRACE = LifecycleConfig(grace_seconds=7)


class Parts:
    """The result of the fake build, and an event for which the build waits."""

    def __init__(self) -> None:
        self.engine, self.registry = FakeEngine(), FakeRegistry()
        self.may_finish = threading.Event()
        self.may_finish.set()
        self.error: Exception | None = None
        self.loop = asyncio.get_running_loop()
        # Set once the build runs, after the server has begun to listen.
        self.building = asyncio.Event()

    def build(self, config: Config, metrics: Any, state: Any) -> Backend:
        self.loop.call_soon_threadsafe(self.building.set)
        self.may_finish.wait(20)
        if self.error is not None:
            raise self.error
        return fake_backend(self.engine, self.registry, FakeMerger(), FakeFuser())


def make_app(parts: Parts, **sections: Any) -> App:
    config = Config(**({"listen": LISTEN, "lifecycle": GRACE} | sections))
    return App(config, build=parts.build)


@contextlib.asynccontextmanager
async def connected(app: App) -> AsyncIterator[tuple[grpc.aio.Channel, httpx2.AsyncClient]]:
    """Clients of both protocols of an app that listens on ``BOTH``."""
    assert app.rpc is not None
    assert app.http is not None
    async with (
        grpc.aio.insecure_channel(app.rpc.address) as channel,
        httpx2.AsyncClient(base_url=f"http://{app.http.address}", timeout=60) as client,
    ):
        yield channel, client


@dataclass
class Served:
    """A server with a real model, and a client of each protocol."""

    app: App
    stub: Any
    client: httpx2.AsyncClient


@contextlib.asynccontextmanager
async def served(model: Path, **sections: Any) -> AsyncIterator[Served]:
    """Serve a model on both protocols; ``sections`` are parts of the settings."""
    loaded = ModelConfig(model=model, device="cpu", dtype="float32")
    app = App(Config(model=loaded, listen=BOTH, **sections))
    try:
        await app.startup()
        async with connected(app) as (channel, client):
            yield Served(app, inference_pb2_grpc.InferenceStub(channel), client)  # type: ignore[arg-type]
    finally:
        app.stop()
        await app.shutdown()
