"""An engine on the GPU path without a GPU. Tests that a bare machine collects do not import it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from gpu_path import FakeCapture, coarse_tiles
from servers.engine_harness import EngineHarness

from turret.server.engine.step import gpu_executor as executor
from turret.server.engine.step.gpu_executor import Capture


@contextlib.asynccontextmanager
async def gpu_serving(
    model: Path | None,
    root: Path,
    adapters: Sequence[str],
    capture: Capture | None = None,
    **more: Any,
) -> AsyncIterator[EngineHarness]:
    """An engine on the GPU path, in the interpreter, by default with a ``FakeCapture``."""
    capture = capture or FakeCapture()
    options = {"kv_cache_bytes": 4 << 20, **more}
    with (
        coarse_tiles(),
        patch.object(executor, "capture_for", lambda device: capture),
        warnings.catch_warnings(),
    ):
        # Rows that only pad a step compute on uninitialised memory.
        warnings.simplefilter("ignore", RuntimeWarning)
        async with EngineHarness.start(
            model, root, adapters=adapters, gpu=True, **options
        ) as harness:
            yield harness
