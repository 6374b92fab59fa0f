"""Decode steps as CUDA graphs: captured once per shape of step, and replayed after that.

A step's launches, its *body*, depend on its kind and its form; everything else is data in buffers
of fixed address. Its *kind* is its bucket (the number of rows, rounded up), and whether embeddings
are computed before. Its *form* is the set of its adapters' operators (``StepForm``). A step can run
in a captured form that is larger than its own, because kernels that it does not need find empty
tables. Common shapes are captured at startup. Other shapes are launched kernel by kernel, and are
captured once they occur often. If there are too many graphs, the least recently used one is
dropped.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch

from turret.server.basics.work import is_out_of_memory

_log = logging.getLogger(__name__)

# Outputs of a step; the tensors keep their addresses, and a replay overwrites them.
Outputs = tuple[torch.Tensor, torch.Tensor]
StepBody = Callable[[], Outputs]
# Kind, form and addresses.
GraphKey = Any

_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
_LARGE_BUCKET = 64
# A step is captured when it occurs for the eighth time within a window of steps. After a failed
# capture, a whole window passes before the next attempt. After three consecutive failures for
# reasons other than memory, there are no more attempts.
SIGHTS, WINDOW, _MAX_FAILURES = 8, 256, 3


class Capture(Protocol):
    """How bodies are captured."""

    def __call__(self, body: StepBody) -> tuple[Callable[[], None], Outputs]:
        """Capture a body without running it.

        Returns:
            A function that replays the body, and the tensors that will contain its results.
        """
        ...

    def forget(self) -> None:
        """Record that every captured graph has been dropped."""
        ...


def buckets(max_rows: int) -> tuple[int, ...]:
    """Row counts that decode steps are padded to; the last one is ``max_rows``."""
    sizes = [size for size in _BUCKETS if size < max_rows]
    sizes += range(2 * _LARGE_BUCKET, max_rows, _LARGE_BUCKET)
    return (*sizes, max_rows)


class CudaCapture:
    """Captures with one memory pool for all graphs that are alive, of which one runs at a time.

    The pool also holds the workspace of cuBLAS. Since torch 2.12, the end of a graph returns the
    workspace to the pool, although other graphs may still use its memory.

    Args:
        device: Where the bodies run.
    """

    def __init__(self, device: torch.device) -> None:
        # Kernels in a graph keep the priority of the stream on which they were captured, so this
        # stream has the priority of ``StepStream``, the only other one with it.
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._pool: Any = None

    def __call__(self, body: StepBody) -> tuple[Callable[[], None], Outputs]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream()
        # Other threads (adapter loads) may use the device meanwhile.
        capturing = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        try:
            # Without this, a capture that fails would leave its stream as the current one.
            with torch.cuda.stream(before), capturing:
                outputs = body()
        except RuntimeError:
            # The failed graph does not return the workspace, and its pool is never used again.
            torch._C._cuda_clearCublasWorkspaces()
            raise
        return graph.replay, outputs

    def forget(self) -> None:
        """Use a new pool for the next capture.

        torch 2.11 cannot capture again into a pool that still holds memory but no graph.
        """
        self._pool = None


def capture_for(device: torch.device) -> Capture | None:
    """How steps are captured on a device; None where there are no graphs."""
    return CudaCapture(device) if device.type == "cuda" else None


class DecodeGraphs:
    """The captured steps. Not thread-safe.

    Args:
        capture: Captures a body; None runs every step uncaptured.
        capacity: Maximum number of graphs.
        on_off: Called if there will be no more captures, so that steps stay slow.
    """

    def __init__(
        self,
        capture: Capture | None,
        capacity: int = 128,
        on_off: Callable[[], None] = lambda: None,
    ) -> None:
        self._capture = capture
        self._on_off = on_off
        self._capacity = capacity
        self._epoch: Hashable = None
        self._step = self._resumes = self._failures = 0
        # The latest steps in which a form was seen.
        self._seen: dict[GraphKey, deque[int]] = {}
        # Kind → the number of the first recent step without a suitable graph, and the joint form of
        # all such steps.
        self._missing: dict[Hashable, tuple[int, frozenset[Any]]] = {}
        # The graph that was used last comes last.
        self._graphs: OrderedDict[GraphKey, tuple[Callable[[], None], Outputs]] = OrderedDict()

    def run(self, epoch: Hashable, key: GraphKey, body: StepBody) -> Outputs:
        """Run a step, captured if possible.

        Args:
            epoch: Changes when a tensor that bodies read has moved, which makes all graphs invalid.
            key: Identifies the launches of the body: kind, form (see ``form_for``), addresses.
            body: The step; it reads and writes at fixed addresses only.
        """
        if self._capture is None:
            return body()
        self._enter(epoch)
        is_due = self._is_due(key)
        if key in self._graphs:
            self._graphs.move_to_end(key)
        elif not is_due or not self._add(self._capture, key, body):
            return body()
        replay, outputs = self._graphs[key]
        replay()
        return outputs

    def form_for(self, kind: Hashable, own: frozenset[Any]) -> frozenset[Any]:
        """The form in which to run a step, chosen so that a few graphs suffice for all steps.

        This is the smallest captured form that includes the step's own form, or else a joint form
        of all recent steps without a captured form. If steps are not captured, it is the step's
        own.

        Args:
            kind: The first part of its key.
            own: The step's own form.
        """
        if self._capture is None:
            return own
        wider = [form for of, form, _ in self._graphs if of == kind and form >= own]
        if wider:
            return min(wider, key=len)
        since, union = self._missing.get(kind, (self._step, own))
        if self._step - since >= WINDOW:
            since, union = self._step, own
        self._missing[kind] = since, union | own
        return union | own

    def prepare(self, epoch: Hashable, key: GraphKey, body: StepBody) -> None:
        """Capture a step before it is needed. Runs it uncaptured once, which compiles its kernels.

        Args:
            epoch: See ``run``.
            key: See ``run``.
            body: The step, on data that may be overwritten.
        """
        if self._capture is None:
            return
        self._enter(epoch)
        body()
        # Do not capture so many steps that the first ones are dropped.
        if key not in self._graphs and len(self._graphs) < self._capacity:
            self._add(self._capture, key, body)

    def drop(self) -> None:
        """Forget all graphs and give their memory back."""
        self._graphs.clear()
        if self._capture is not None:
            self._capture.forget()

    def _enter(self, epoch: Hashable) -> None:
        if epoch != self._epoch:
            self.drop()
            self._seen.clear()
            self._epoch = epoch

    def _is_due(self, key: GraphKey) -> bool:
        """Record that a form occurs in this step; returns whether it should be captured."""
        self._step += 1
        if len(self._seen) > 8 * self._capacity:
            self._seen.clear()
        sights = self._seen.setdefault(key, deque(maxlen=SIGHTS))
        sights.append(self._step)
        is_common = len(sights) == SIGHTS and self._step - sights[0] < WINDOW
        return is_common and self._step >= self._resumes

    def _add(self, capture: Capture, key: GraphKey, body: StepBody) -> bool:
        """Capture a body; returns whether it worked.

        If memory ran out, all other graphs have been dropped.
        """
        try:
            self._graphs[key] = capture(body)
        except RuntimeError as error:
            self.drop()
            self._resumes = self._step + WINDOW
            if is_out_of_memory(error):
                _log.warning("no memory to capture a decode step; all CUDA graphs were dropped")
                return False
            self._failures += 1
            _log.exception("a decode step could not be captured; continuing without CUDA graphs")
            if self._failures == _MAX_FAILURES:
                self._capture = None
                self._on_off()
            return False
        self._failures = 0
        # Drop a graph only after the capture, so that the pool stays in use.
        if len(self._graphs) > self._capacity:
            self._graphs.popitem(last=False)
        return True
