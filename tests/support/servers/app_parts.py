"""An app with a fake model, engine and registry."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from servers.fakes import FakeEngine, FakeFuser, FakeMerger, FakeRegistry, fake_backend

from turret.server.api.gate import Backend
from turret.server.app import App
from turret.server.config import Config, LifecycleConfig, ListenConfig

LISTEN = ListenConfig(address="127.0.0.1:0", metrics_address="127.0.0.1:0")


GRACE = LifecycleConfig(grace_seconds=7)


class Parts:
    """The result of the fake build, and an event that holds the build."""

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
