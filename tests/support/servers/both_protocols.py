"""A real engine behind servers of both protocols."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from servers.engine_harness import EngineHarness
from servers.http_harness import HttpHarness, http_harness
from servers.rpc_harness import Harness, harness


@dataclass
class Protocols:
    """A backend with both protocols, and the adapters' directory."""

    http: HttpHarness
    rpc: Harness
    engine: EngineHarness
    root: Path

    async def tokens(self, model: str, messages: Any, **fields: Any) -> list[int]:
        """The tokens of a conversation."""
        answer = await self.http.post("/tokenize", {"model": model, "messages": messages, **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()["tokens"]


@contextlib.asynccontextmanager
async def serving(
    model: Path, root: Path, *names: str, state: Path, **how: Any
) -> AsyncIterator[Protocols]:
    """Serve a model with these adapters."""
    async with (
        EngineHarness.start(model, root, adapters=names, state_dir=state, **how) as engine,
        http_harness(serving=False) as http,
        harness(serving=False) as rpc,
    ):
        for gate in (http.gate, rpc.gate):
            gate.open(engine.backend)
        yield Protocols(http, rpc, engine, root)
