"""A tiny model, an adapter of each kind, and their merges."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from builders.methods import make_config, save_adapter
from method_oracle import prompt_of, twin
from servers.engine_harness import Answer, EngineHarness, make_request

from turret.server.adapters.adapter import AdapterRef
from turret.server.adapters.base import Precision
from turret.server.adapters.merger import MergeState
from turret.server.basics.work import Cancellation

ARCHITECTURE = "qwen2"
NAMES = ("lora", "dora", "ia3", "other", "prefix_tuning", "prompt_tuning")
PROMPT = prompt_of(40)


def save_adapters(folder: Path) -> Path:
    """Save an adapter for each of ``NAMES``."""
    for seed, name in enumerate(NAMES):
        config = make_config("lora" if name == "other" else name)
        save_adapter(twin(ARCHITECTURE).model, config, folder / name, seed=seed)
    return folder


def start(
    root: Path, *, allow_merged_twice: bool = False
) -> AbstractAsyncContextManager[EngineHarness]:
    """Start an engine with all of these adapters."""
    return EngineHarness.start(
        twin(ARCHITECTURE).folder,
        root,
        adapters=NAMES,
        allow_merged_twice=allow_merged_twice,
    )


def refs(*names: str) -> list[AdapterRef]:
    return [AdapterRef(name=name) for name in names]


async def merge(
    server: EngineHarness,
    *names: str,
    precision: Precision = "BF16",
    cancellation: Cancellation | None = None,
) -> MergeState:
    cancellation = cancellation or Cancellation()
    return await asyncio.to_thread(server.merger.merge, refs(*names), precision, cancellation)


async def unmerge(server: EngineHarness) -> MergeState:
    return await asyncio.to_thread(server.merger.unmerge, Cancellation())


async def score(server: EngineHarness, *adapters: str) -> Answer:
    return await server.run(make_request(PROMPT, *adapters, score=True))
