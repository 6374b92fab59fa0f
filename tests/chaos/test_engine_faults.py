"""A fault in any operation of a step: every request gets an error, and nothing stays held."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from builders.random_adapters import AdapterSpec, arch_of, write_adapter
from servers.engine_harness import EngineHarness, make_request
from torch.utils._python_dispatch import TorchDispatchMode

from turret.server.engine.step.runner import TorchExecutor
from turret.server.errors import TurretError, UnavailableError

# The number of tested operations, of some hundred in a step; the last one is the sampler's.
NUM_PLACES = 10


class Counted(TorchDispatchMode):
    """Counts torch's operations, and makes one of them fail.

    Args:
        fail_at: The number of the failing operation, from 1; None for none.
    """

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.count = 0
        self._fail_at = fail_at

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self._fail_at:
            raise ValueError("a kernel failed")
        return func(*args, **(kwargs or {}))


async def _ask(harness: EngineHarness) -> list[Any]:
    requests = [make_request([1, 2, 3], *mix, max_tokens=3) for mix in ((), ("a",), ("a", "b"))]
    asking = [harness.run(request) for request in requests]
    return await asyncio.gather(*asking, return_exceptions=True)


async def _live(model: Path, root: Path, mode: Counted) -> tuple[list[Any], list[int], bool]:
    """The answers or errors, the requests in flight afterwards, and whether the engine is dead."""
    run = TorchExecutor.run

    def within(executor: TorchExecutor, step: Any) -> Any:
        with mode:
            return run(executor, step)

    answers: list[Any] = []
    in_flight: list[int] = []
    is_dead = False
    # The harness itself reports a dead engine.
    with contextlib.suppress(AssertionError):
        async with EngineHarness.start(model, root, adapters=("a", "b")) as harness:
            with patch.object(TorchExecutor, "run", within):
                answers = await _ask(harness)
            is_dead = harness.engine.is_dead
            in_flight = [record.in_flight for record in harness.registry.list()]
            if is_dead:
                with pytest.raises(UnavailableError):
                    await harness.engine.submit(make_request([1], "a"))
    return answers, in_flight, is_dead


@pytest.mark.slow
async def test_a_fault_in_any_operation_ends_every_request_and_releases_everything(
    tiny_llama: Path,
) -> None:
    root = tiny_llama.parent / "adapters"
    for seed, name in enumerate("ab"):
        write_adapter(root, arch_of(tiny_llama), AdapterSpec(name, rank=4), seed)
    whole = Counted()
    answers, in_flight, is_dead = await _live(tiny_llama, root, whole)
    assert not is_dead
    assert [len(answer.token_ids) for answer in answers] == [3] * 3
    assert in_flight == [0, 0]
    assert whole.count > 100
    for place in range(NUM_PLACES):
        at = 1 + place * (whole.count - 1) // (NUM_PLACES - 1)
        answers, in_flight, is_dead = await _live(tiny_llama, root, Counted(at))
        assert is_dead, at
        assert all(isinstance(answer, TurretError) for answer in answers), at
        assert in_flight == [0, 0], at
