"""The threads that compute for the engine's thread."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from method_oracle import twin
from servers.engine_harness import EngineHarness

from turret.kernels.cpu.native import library, num_threads


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
async def test_torch_uses_one_thread_if_the_kernels_have_their_own(
    dtype: str, tmp_path: Path
) -> None:
    """Two teams that spin while they wait compete for the processors."""
    found: list[tuple[int, int]] = []
    asked = threading.Event()

    def ask() -> None:
        found.append((num_threads(), torch.get_num_threads()))
        asked.set()

    async with EngineHarness.start(twin("llama").folder, tmp_path, dtype=dtype) as harness:
        harness.engine._loop.post(ask)
        assert asked.wait(30)
    has_own = dtype == "bfloat16" and library() is not None
    every = torch.get_num_threads()
    assert found == [(every, 1 if has_own else every)]
