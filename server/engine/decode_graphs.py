"""Decode steps as CUDA graphs: captured once per shape of step, replayed from then on.

A step's launches depend on its bucket (the number of rows, rounded up) and on the kinds of
operators in it; everything else is data in buffers of fixed address. A shape that is seen for the
first time runs as it is, which also compiles what it needs; the second time it is captured.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

# What a step returns; the tensors keep their addresses, and a replay overwrites them.
Outputs = tuple[torch.Tensor, torch.Tensor]
Body = Callable[[], Outputs]
# Captures a body without running it: what replays it, and where its results will be.
Capture = Callable[[Body], tuple[Callable[[], None], Outputs]]

_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
_LARGE_BUCKET = 64


def buckets(max_rows: int) -> tuple[int, ...]:
    """Row counts that decode steps are padded to; the last one is ``max_rows``."""
    sizes = [size for size in _BUCKETS if size < max_rows]
    sizes += range(2 * _LARGE_BUCKET, max_rows, _LARGE_BUCKET)
    return (*sizes, max_rows)


class CudaCapture:
    """Captures with one memory pool for all graphs, of which one runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, body: Body) -> tuple[Callable[[], None], Outputs]:
        graph = torch.cuda.CUDAGraph()
        # Other threads (adapter loads) may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = body()
        return graph.replay, outputs


def capture_for(device: torch.device) -> Capture | None:
    """How steps are captured on a device; None where there are no graphs."""
    return CudaCapture() if device.type == "cuda" else None


class DecodeGraphs:
    """The captured steps. Not thread-safe.

    Args:
        capture: Captures a body, or None to run every step as it is.
        capacity: Graphs kept; the one that was captured first makes room.
    """

    def __init__(self, capture: Capture | None, capacity: int = 128) -> None:
        self._capture = capture
        self._capacity = capacity
        self._epoch: Hashable = None
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, tuple[Callable[[], None], Outputs]] = {}

    def run(self, epoch: Hashable, key: Hashable, body: Body) -> Outputs:
        """Run a step, captured if it can be.

        Args:
            epoch: Changes when a tensor that bodies read has moved: then all graphs are void.
            key: Names what the body launches.
            body: The step; it reads and writes at fixed addresses only.
        """
        if self._capture is None:
            return body()
        if epoch != self._epoch:
            self._graphs.clear()
            self._seen.clear()
            self._epoch = epoch
        if key not in self._graphs:
            if key not in self._seen:
                self._seen.add(key)
                return body()
            if len(self._graphs) == self._capacity:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[key] = self._capture(body)
        replay, outputs = self._graphs[key]
        replay()
        return outputs
