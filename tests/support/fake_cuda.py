"""CUDA's order of events without a GPU: streams that are as late as possible, and graphs.

Like torch, the fake has 32 streams per priority and assigns them in turn. A capturing stream
rejects waits in both directions, and work of other threads; such a call invalidates the capture.

A stream runs nothing until something waits for it. So a buffer that is overwritten before the wait
for its copy, or read too early, always has wrong values here. Copies with ``non_blocking=True`` are
put on the current stream; ``launch`` puts other work there. Memory pools and cuBLAS workspaces of
graphs follow torch 2.11 or, on request, later versions. The memory of a workspace that was freed
can be used until its pool is gone; without a pool, it cannot. Errors have torch's own texts.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

# Held while work is done, because several threads may wait for one stream.
_device = threading.RLock()


class FakeStream:
    """Work in order, which is done only when something waits for it."""

    def __init__(self, name: str, priority: int = 0) -> None:
        self.name = name
        self.priority = priority
        self.pending: deque[Callable[[], None]] = deque()
        self.capturing: _Graph | None = None

    def refuse(self) -> None:
        """Raise, and spoil the capture, if the stream is capturing."""
        if self.capturing is not None:
            self.capturing.is_spoiled = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    def synchronize(self) -> None:
        self.refuse()
        with _device:
            while self.pending:
                self.pending.popleft()()

    def wait_event(self, event: FakeEvent) -> None:
        self.refuse()
        self.pending.append(event.synchronize)

    def wait_stream(self, other: FakeStream) -> None:
        event = FakeEvent()
        event.record(other)
        self.wait_event(event)


class FakeEvent:
    """A position in a stream."""

    def __init__(self) -> None:
        self._stream: FakeStream | None = None
        self._done = True

    def record(self, stream: FakeStream) -> None:
        stream.refuse()
        self._stream, self._done = stream, False
        token = self._token = object()

        def reached() -> None:
            # An event that was recorded again refers to the later position.
            if self._token is token:
                self._done = True

        stream.pending.append(reached)

    def query(self) -> bool:
        return self._done

    def synchronize(self) -> None:
        with _device:
            while not self._done:
                assert self._stream is not None
                self._stream.pending.popleft()()


class _Workspace:
    """The workspace of cuBLAS on one stream, in a pool's memory or outside of all pools (None)."""

    def __init__(self, pool: int | None) -> None:
        self.pool = pool
        self.is_freed = False


class _Graph:
    """A captured body, which multiplies in the workspace from the time of its capture."""

    def __init__(self, alive: dict[int | None, int]) -> None:
        self.pool: int | None = None
        self.workspace: _Workspace | None = None
        self.thread = threading.get_ident()
        self.is_spoiled = False
        self._alive = alive

    def replay(self) -> None:
        used = self.workspace
        if used is not None and used.is_freed and not self._alive.get(used.pool):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


class FakeCuda:
    """Replaces ``torch.cuda`` within ``with cuda.installed():``.

    Args:
        frees_workspaces: Whether the end of a graph frees the workspace of its stream, and the
            allocator survives a failed capture (torch after 2.12.0).

    Attributes:
        default: The initial current stream.
        num_captures: The number of captured graphs.
        handed_out: Every requested stream, in order.
    """

    def __init__(self, *, frees_workspaces: bool = False) -> None:
        self.default = FakeStream("default")
        self.num_captures = 0
        self._frees_workspaces = frees_workspaces
        self._currents: dict[int, FakeStream] = {}
        self.handed_out: list[FakeStream] = []
        self._streams: dict[int, list[FakeStream]] = {}
        self._pools = 0
        # Whether a capture began and has not succeeded.
        self._is_unfinished = False
        # Graphs that are alive, by pool.
        self._alive: dict[int | None, int] = {}
        # cuBLAS has one handle per thread.
        self._workspaces: dict[tuple[int, FakeStream], _Workspace] = {}

    @property
    def num_pools(self) -> int:
        """The number of memory pools with captured graphs."""
        return len(self._alive)

    @property
    def current(self) -> FakeStream:
        """The calling thread's current stream."""
        return self._currents.get(threading.get_ident(), self.default)

    @current.setter
    def current(self, stream: FakeStream) -> None:
        self._currents[threading.get_ident()] = stream

    def launch(self, work: Callable[[], None]) -> None:
        """Put work on the current stream."""
        capturing = self.current.capturing
        if capturing is not None and capturing.thread != threading.get_ident():
            self.current.refuse()
        self.current.pending.append(work)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Replace the used parts of ``torch.cuda``, and products, which need a workspace."""
        names = {
            "Stream": lambda _=None, priority=0: self._make_stream(priority),
            "Event": lambda **_: FakeEvent(),
            "stream": self._use,
            "default_stream": lambda *_: self.default,
            "current_stream": lambda *_: self.current,
            "synchronize": lambda *_: self._synchronize(),
            "empty_cache": self._empty_cache,
            "graph_pool_handle": self._make_pool,
            "CUDAGraph": lambda: _Graph(self._alive),
            "graph": self._graph,
        }
        with contextlib.ExitStack() as stack:
            for name, value in names.items():
                stack.enter_context(patch.object(torch.cuda, name, value))
            clear = patch.object(torch._C, "_cuda_clearCublasWorkspaces", self._clear, create=True)
            stack.enter_context(clear)
            original = F.linear

            def linear(*args: Any) -> torch.Tensor:
                self._multiply()
                return original(*args)

            stack.enter_context(patch.object(F, "linear", linear))
            stack.enter_context(_LateCopies(self))
            yield

    def _make_stream(self, priority: int = 0) -> FakeStream:
        pool = self._streams.setdefault(
            priority, [FakeStream(f"stream {n} of {priority}", priority) for n in range(32)]
        )
        asked = sum(stream.priority == priority for stream in self.handed_out)
        self.handed_out.append(pool[asked % len(pool)])
        return self.handed_out[-1]

    def _synchronize(self) -> None:
        """Wait for every stream, none of which may be capturing."""
        for stream in [self.default, *self.handed_out]:
            stream.synchronize()

    def _empty_cache(self) -> None:
        if self._is_unfinished and not self._frees_workspaces:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    @contextlib.contextmanager
    def _use(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def _make_pool(self) -> int:
        self._pools += 1
        return self._pools

    @contextlib.contextmanager
    def _graph(
        self,
        graph: _Graph,
        pool: int | None = None,
        stream: FakeStream | None = None,
        capture_error_mode: str = "global",
    ) -> Iterator[None]:
        self._empty_cache()
        pool = self._make_pool() if pool is None else pool
        stream = self._make_stream() if stream is None else stream
        holds = any(w.pool == pool for w in self._workspaces.values())
        if holds and not self._alive.get(pool):
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        before, self.current = self.current, stream
        stream.capturing, graph.pool = graph, pool
        self._is_unfinished = True
        try:
            yield
            if graph.is_spoiled:
                raise RuntimeError("CUDA error: operation failed due to a previous error")
        finally:
            stream.capturing = None
        # This is not reached after an error, because the end of a failed capture raises earlier.
        self.current, self._is_unfinished = before, False
        self.num_captures += 1
        self._alive[pool] = self._alive.get(pool, 0) + 1
        weakref.finalize(graph, self._ended, stream, pool)

    def _ended(self, stream: FakeStream, pool: int) -> None:
        self._alive[pool] -= 1
        if self._frees_workspaces:
            self._clear(stream)

    def _clear(self, of: FakeStream | None = None) -> None:
        """Free the workspaces of a stream, or of all."""
        for place in [place for place in self._workspaces if of in (None, place[1])]:
            self._workspaces.pop(place).is_freed = True

    def _multiply(self) -> None:
        place, graph = (threading.get_ident(), self.current), self.current.capturing
        pool = None if graph is None else graph.pool
        found = self._workspaces.setdefault(place, _Workspace(pool))
        if graph is not None:
            graph.workspace = found


class _LateCopies(TorchDispatchMode):
    """Puts asynchronous copies on the current stream; they read their source when executed."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self._cuda = cuda

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_copy = func.overloadpacket.__name__ == "copy_"
        if is_copy and (args[2] if len(args) > 2 else kwargs.get("non_blocking", False)):
            target, source = args[0], args[1]
            self._cuda.launch(lambda: func(target, source))
            return target
        return func(*args, **kwargs)
