"""One batch with an adapter of every method that is served: each gets the bits it gets alone."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from builders.mixes.every_method import TASKS, save_every_method
from method_oracle import prompt_of, twin
from servers.engine_harness import EngineHarness, make_request

from turret.kernels.cpu import native
from turret.server.adapters.methods import METHODS
from turret.server.engine.scheduling.request import Request

# What an aLoRA is invoked by.
INVOCATION = 7


@asynccontextmanager
async def started(root: Path, names: Sequence[str], dtype: str) -> AsyncIterator[EngineHarness]:
    async with EngineHarness.start(
        twin("llama").folder, root, dtype=dtype, max_num_seqs=64
    ) as harness:
        served: dict[str, str] = {}
        for name in names:
            facts = harness.registry.load(name, name, task=TASKS.get(name)).facts
            served[name] = facts.method
        # The folders are called what their files are served as, and none is missing.
        assert {served[name] for name in METHODS} == METHODS.keys()
        assert all(served[name] == name for name in METHODS)
        yield harness


def requests() -> list[Request]:
    """One of each method, and the base's."""
    found = []
    for number, name in enumerate([*sorted(METHODS), None]):
        # Some prompts are one short segment, some are cut into chunks.
        length = (3, 11, 29, 50)[number % 4]
        prompt = [*prompt_of(length, number), INVOCATION, *prompt_of(2, number)]
        named = () if name is None else (name,)
        found.append(make_request(prompt, *named, max_tokens=4 + number % 3))
    return found


@pytest.mark.parametrize("formulation", ["float32", "bfloat16", "bfloat16 by torch"])
async def test_each_gets_the_bits_it_gets_alone(
    formulation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype, _, by_torch = formulation.partition(" ")
    if by_torch:
        monkeypatch.setattr(native, "library", lambda: None)
    names, asked = save_every_method(twin("llama").model, tmp_path), requests()
    # Two servers: what the first one kept must not answer for the second.
    async with started(tmp_path, names, dtype) as harness:
        alone = [await harness.run(request) for request in asked]
    async with started(tmp_path, names, dtype) as harness:
        together = await harness.run_all(asked)
        plain = [
            await harness.run(make_request(request.prompt_token_ids, max_tokens=4))
            for request in asked
        ]
    for request, one, other, base in zip(asked, alone, together, plain, strict=True):
        what = [ref.name for ref in request.adapters]
        assert one.bits == other.bits, what
        # None does nothing.
        changed = one.logprobs[0] != base.logprobs[0]
        assert changed == bool(request.adapters), what
