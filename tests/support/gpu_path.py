"""The GPU path without a GPU: large tiles for the interpreter, and a fake CUDA graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from turret.kernels.gpu import common as tuning_module
from turret.kernels.gpu.common import Tuning
from turret.kernels.gpu.tables import RowTable, RunOfRows, SegmentTable
from turret.server.engine.step.gpu_executor import Outputs, StepBody

# Large tiles, because the interpreter's time depends on the number of operations, not on their
# size. Every kernel still needs several splits and passes.
COARSE = Tuning(
    programs=1,
    shrink_split_k=64,
    shrink_block_k=128,
    expand_block_n=256,
    hadamard_splits=2,
    hadamard_block_k=128,
    hadamard_block_n=256,
    kronecker_block_l=64,
    nf4_block_n=256,
    nf4_programs=2,
    nf4_part_blocks=1,
    nf4_pass_rows=5,
    sample_block=256,
    inline_ptx=False,
)


@contextlib.contextmanager
def coarse_tiles() -> Iterator[None]:
    """Make kernels in the interpreter use ``COARSE``."""
    with patch.object(tuning_module, "_INTERPRETER", COARSE):
        # Clear the cache, which has an entry per device.
        tuning_module.tuning.cache_clear()
        yield
    tuning_module.tuning.cache_clear()


class CountedWrites(TorchDispatchMode):
    """Counts operations that write."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__.endswith("_")
        return func(*args, **(kwargs or {}))


class FakeCapture:
    """Replays run the captured body again, with the same Python objects and device buffers.

    As with a CUDA graph, a step that reads a host value at its launch would repeat the value of the
    captured step. ``counted_steps.Capture`` counts launches instead.

    Attributes:
        num_captures: The number of captured bodies.
        num_replays: The number of replays, not counting the one right after each capture.
    """

    def __init__(self) -> None:
        self.num_captures = 0
        self.num_replays = 0

    def __call__(self, body: StepBody) -> tuple[Callable[[], None], Outputs]:
        self.num_captures += 1
        # A real capture computes nothing; here the first replay has nothing left to do.
        outputs: Any = body()
        is_fresh = True

        def replay() -> None:
            nonlocal is_fresh
            if not is_fresh:
                self.num_replays += 1
                for kept, computed in zip(outputs, body(), strict=True):
                    kept.copy_(computed)
            is_fresh = False

        return replay, outputs

    def forget(self) -> None:
        """Do nothing, because no capture is kept."""


class OneStepTables:
    """The tables of one step, created on demand (``GpuTables``)."""

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self._max_rows = max_rows
        self._device = device

    def load_segments(self, runs: Sequence[RunOfRows]) -> SegmentTable:
        table = SegmentTable(
            max_rows=self._max_rows,
            max_row_rank=512,
            max_components=16,
            max_gates=4,
            max_row_query=128,
            device=self._device,
        )
        table.load(runs)
        return table

    def row_table(self, key: Hashable) -> RowTable:
        return RowTable(self._max_rows, self._device)
