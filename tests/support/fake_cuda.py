"""Imitates CUDA's streams, events and graphs without a GPU; streams run as late as they may.

A stream runs nothing until somebody waits for it. So a buffer that is read or overwritten before
its copy was waited for has the wrong values here every time. Copies with ``non_blocking=True`` are
put on the current stream, and ``launch`` puts other work there.
Memory pools and cuBLAS workspaces of graphs follow torch 2.11, or the versions after it.
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


class FakeStream:
    """A queue of work that runs in order, but only when somebody waits for it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.pending: deque[Callable[[], None]] = deque()

    def synchronize(self) -> None:
        while self.pending:
            self.pending.popleft()()

    def wait_event(self, event: FakeEvent) -> None:
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
        self._stream, self._done = stream, False
        token = self._token = object()

        def reached() -> None:
            # An event that was recorded again marks the later position.
            if self._token is token:
                self._done = True

        stream.pending.append(reached)

    def query(self) -> bool:
        return self._done

    def synchronize(self) -> None:
        while not self._done:
            assert self._stream is not None
            self._stream.pending.popleft()()


class _Workspace:
    """Of cuBLAS on one stream; in a pool's memory, or outside all pools (None)."""

    def __init__(self, pool: int | None) -> None:
        self.pool = pool
        self.is_freed = False


class _Graph:
    """A captured function. Its products use the workspace that existed when it was captured."""

    def __init__(self) -> None:
        self.stream: FakeStream | None = None
        self.workspace: _Workspace | None = None

    def replay(self) -> None:
        if self.workspace is not None and self.workspace.is_freed:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


class FakeCuda:
    """Replaces ``torch.cuda`` inside ``with cuda.installed():``.

    Args:
        frees_workspaces: The end of a graph frees the workspace of its stream (torch 2.12).

    Attributes:
        default: The stream that is current at the beginning.
        num_captures: Number of graphs that were captured.
    """

    def __init__(self, *, frees_workspaces: bool = False) -> None:
        self.default = FakeStream("default")
        self.num_captures = 0
        self._frees_workspaces = frees_workspaces
        self._currents: dict[int, FakeStream] = {}
        self._streams = 0
        self._capturing: _Graph | None = None
        self._pool: int | None = None
        self._pools = 0
        self._alive: dict[int, int] = {}
        # cuBLAS has a handle for each thread.
        self._workspaces: dict[tuple[int, FakeStream], _Workspace] = {}

    @property
    def workspaces_outside_pools(self) -> bool:
        """Whether no pool of graphs holds memory that outlives its graphs."""
        return all(workspace.pool is None for workspace in self._workspaces.values())

    @property
    def num_pools(self) -> int:
        """Memory pools that graphs were captured into."""
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
        self.current.pending.append(work)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Replace what the server uses of ``torch.cuda``, and products, which need a workspace."""
        names = {
            "Stream": lambda *_, **__: self._make_stream(),
            "Event": lambda **_: FakeEvent(),
            "stream": self._use,
            "default_stream": lambda *_: self.default,
            "current_stream": lambda *_: self.current,
            "synchronize": lambda *_: self.current.synchronize(),
            "graph_pool_handle": self._make_pool,
            "CUDAGraph": _Graph,
            "graph": self._graph,
        }
        with contextlib.ExitStack() as stack:
            for name, value in names.items():
                stack.enter_context(patch.object(torch.cuda, name, value))
            original = F.linear

            def linear(*args: Any) -> torch.Tensor:
                self._multiply()
                return original(*args)

            stack.enter_context(patch.object(F, "linear", linear))
            stack.enter_context(_LateCopies(self))
            yield

    def _make_stream(self) -> FakeStream:
        self._streams += 1
        return FakeStream(f"stream {self._streams}")

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
        pool = self._make_pool() if pool is None else pool
        stream = self._make_stream() if stream is None else stream
        holds = any(w.pool == pool for w in self._workspaces.values())
        if holds and not self._alive.get(pool):
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        graph.stream, self._capturing, self._pool = stream, graph, pool
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self._capturing = self._pool = None
        # Not after an error: the end of a capture that has failed raises before it gets here.
        self.current = before
        self.num_captures += 1
        self._alive[pool] = self._alive.get(pool, 0) + 1
        weakref.finalize(graph, self._ended, stream, pool)

    def _ended(self, stream: FakeStream, pool: int) -> None:
        self._alive[pool] -= 1
        if self._frees_workspaces:
            for place in [place for place in self._workspaces if place[1] is stream]:
                self._workspaces.pop(place).is_freed = True

    def _multiply(self) -> None:
        place = threading.get_ident(), self.current
        found = self._workspaces.setdefault(place, _Workspace(self._pool))
        if self._capturing is not None:
            self._capturing.workspace = found


class _LateCopies(TorchDispatchMode):
    """Puts asynchronous copies on the current stream: they read their source when it gets there."""

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
