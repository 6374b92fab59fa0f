"""Random traffic and random administration on one server, with a record of everything."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
from servers.churn_requests import Answer, Mix, Shape, ask
from servers.harassment import Harassment
from servers.server_under_test import ServerUnderTest

from turret.clients.adapter_files import upload_messages
from turret.clients.aio import AsyncTurretClient
from turret.clients.errors import TurretRpcError
from turret.clients.results import Adapter

NUM_CLIENTS = 24
NUM_ADMINS = 4
# Far above all durations here, and far below the deadlines.
STALL_SECONDS = 30.0
WEIGHTS = (1.0, 0.5, -0.5)

Generation = tuple[str, int]


@dataclass(slots=True)
class Ended:
    """An ended request. ``status`` is OK, the failed call's code, or CLIENT_CANCELLED."""

    shape: Shape
    mix: Mix
    status: str
    answer: Answer


@dataclass(slots=True)
class Record:
    """The events of a run.

    Attributes:
        num_sent: The number of sent requests.
        ended: The ended requests.
        digests: The content of each generation, from the admin calls.
        calls: The admin calls by name and status.
        unexpected: Events that must not happen.
        most_bytes: The maximum of adapter bytes per tier.
        resident_bytes: Samples of the process's resident memory.
        exports: The digests and directories of exports.
    """

    num_sent: int = 0
    ended: list[Ended] = field(default_factory=list)
    digests: dict[Generation, str] = field(default_factory=dict)
    calls: collections.Counter[tuple[str, str]] = field(default_factory=collections.Counter)
    unexpected: list[str] = field(default_factory=list)
    most_bytes: collections.Counter[str] = field(default_factory=collections.Counter)
    resident_bytes: list[int] = field(default_factory=list)
    exports: list[tuple[str, Path]] = field(default_factory=list)


class Stalled(AssertionError):
    """An operation took longer than STALL_SECONDS; the message has all threads' stacks."""


class Churn:
    """Runs traffic for a while; ``run`` may be called repeatedly.

    Args:
        client: A client of the server.
        server: The server, which is observed from outside.
        names: The changing adapter names.
        checkpoints: Directories below the adapter root.
        shapes: The possible requests.
        scratch: The directory for exports.
        seed: The seed of all choices.
    """

    def __init__(
        self,
        client: AsyncTurretClient,
        server: ServerUnderTest,
        *,
        names: Sequence[str],
        checkpoints: Sequence[str],
        shapes: Sequence[Shape],
        scratch: Path,
        seed: int,
    ) -> None:
        self.record = Record()
        self._client = client
        self._server = server
        self._names = names
        self._checkpoints = checkpoints
        self._shapes = shapes
        self._scratch = scratch
        self._random = random.Random(seed)
        self.harassment = Harassment(server.address, random.Random(seed))
        self._under_way: dict[object, tuple[str, float]] = {}
        self._num_exports = 0

    async def run(self, seconds: float) -> None:
        """Run traffic for some time, and then wait until the last call has ended.

        Raises:
            Stalled: A call did not end.
        """
        end = time.monotonic() + seconds
        workers = [asyncio.ensure_future(self._ask_until(end)) for _ in range(NUM_CLIENTS)]
        workers += [asyncio.ensure_future(self._administer_until(end)) for _ in range(NUM_ADMINS)]
        workers.append(asyncio.ensure_future(self._harass_until(end)))
        watch = asyncio.ensure_future(self._watch())
        try:
            work = asyncio.gather(*workers)
            await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                watch.result()
            await work
        finally:
            for task in (watch, *workers):
                task.cancel()
            await asyncio.gather(watch, *workers, return_exceptions=True)

    # Traffic

    async def _ask_until(self, end: float) -> None:
        while time.monotonic() < end:
            shape, mix = self._draw()
            fate = self._random.random()
            answer = Answer()
            self.record.num_sent += 1
            with self._timed(f"{shape.kind} {mix}"):
                status = await self._ask(shape, mix, answer, fate)
            self.record.ended.append(Ended(shape, mix, status, answer))

    async def _ask(self, shape: Shape, mix: Mix, answer: Answer, fate: float) -> str:
        limits: dict[str, Any] = {}
        if fate < 0.1:
            limits["deadline_seconds"] = self._random.uniform(0.001, 0.2)
        elif fate < 0.2 and shape.kind == "stream":
            limits["cancel_after"] = self._random.randint(0, 4)
        elif fate < 0.25 and shape.kind != "stream":
            call = asyncio.ensure_future(ask(self._client, shape, mix, answer))
            await asyncio.wait((call,), timeout=self._random.uniform(0.0, 0.1))
            if not call.done():
                call.cancel()
                await asyncio.gather(call, return_exceptions=True)
                return "CLIENT_CANCELLED"
            limits = {}
            return await self._status(lambda: call)
        status = await self._status(lambda: ask(self._client, shape, mix, answer, **limits))
        return "CLIENT_CANCELLED" if status == "OK" and answer.end is None else status

    @staticmethod
    async def _status(call: Callable[[], Awaitable[None]]) -> str:
        try:
            await call()
        except TurretRpcError as error:
            return error.code.name
        return "OK"

    def _draw(self) -> tuple[Shape, Mix]:
        """Draw a request. Larger mixes use fewer shapes, so that all requests can be repeated."""
        source = self._random
        count = source.choice((0, 1, 1, 1, 1, 2, 2, 3))
        names = source.sample(self._names, count)
        if count <= 1:
            shape = source.choice(self._shapes)
            return shape, tuple((name, source.choice(WEIGHTS)) for name in names)
        shape = source.choice(self._shapes[: 2 if count == 2 else 1])
        return shape, tuple(zip(names, (1.0, -0.5, 0.5), strict=False))

    async def _harass_until(self, end: float) -> None:
        while time.monotonic() < end:
            await self.harassment.once()
            await asyncio.sleep(self._random.uniform(0.1, 0.5))
        self.record.unexpected += self.harassment.bugs

    # Administration

    async def _administer_until(self, end: float) -> None:
        calls: dict[str, int] = {
            "load": 8, "replace": 4, "upload": 2, "upload_new": 2, "unload": 2, "force": 1,
            "pin": 2, "unpin": 3, "list": 1, "export": 1, "abandon": 1,
        }  # fmt: skip
        while time.monotonic() < end:
            (verb,) = self._random.choices(list(calls), list(calls.values()))
            name = self._random.choice(self._names)
            with self._timed(f"{verb} {name}"):
                try:
                    await getattr(self, f"_{verb}")(name)
                    self.record.calls[verb, "OK"] += 1
                except TurretRpcError as error:
                    self.record.calls[verb, error.code.name] += 1
            await asyncio.sleep(self._random.uniform(0.0, 0.05))

    def _note(self, adapter: Adapter) -> None:
        known = self.record.digests.setdefault((adapter.uuid, adapter.generation), adapter.digest)
        if known != adapter.digest:
            self.record.unexpected.append(f"two contents of one generation: {adapter}")

    async def _load(self, name: str) -> None:
        path = self._random.choice(self._checkpoints)
        pinned = self._random.random() < 0.1
        self._note(await self._client.adapters.load(name, path, pinned=pinned))

    async def _replace(self, name: str) -> None:
        path = self._random.choice(self._checkpoints)
        self._note(await self._client.adapters.replace(name, path))

    async def _upload(self, name: str, replace: bool = True) -> None:
        folder = self._server.adapter_root / self._random.choice(self._checkpoints)
        self._note(await self._client.adapters.upload(name, folder, replace=replace))

    async def _upload_new(self, name: str) -> None:
        await self._upload(name, replace=False)

    async def _unload(self, name: str) -> None:
        await self._client.adapters.unload(name, drain_seconds=self._random.choice((0.0, 0.5, 5.0)))

    async def _force(self, name: str) -> None:
        await self._client.adapters.unload(name, mode="force", drain_seconds=10.0)

    async def _pin(self, name: str) -> None:
        self._note(await self._client.adapters.pin(name))

    async def _unpin(self, name: str) -> None:
        self._note(await self._client.adapters.unpin(name))

    async def _list(self, name: str) -> None:
        method = self._random.choice((None, "lora", "loha"))
        found = [a async for a in self._client.adapters.list(method=method, page_size=3)]
        if [a.name for a in found] != sorted({a.name for a in found}):
            self.record.unexpected.append(f"listed twice or out of order: {found}")
        for adapter in found:
            self._note(adapter)

    async def _export(self, name: str) -> None:
        self._num_exports += 1
        folder = self._scratch / f"{self._num_exports}"
        adapter = await self._client.adapters.export(name, folder)
        self._note(adapter)
        self.record.exports.append((adapter.digest, folder))

    async def _abandon(self, name: str) -> None:
        """Abandon an upload before the last message."""
        folder = self._server.adapter_root / self._random.choice(self._checkpoints)
        messages = list(upload_messages(name, folder, pinned=False, replace=True))
        gone = asyncio.Event()

        async def send() -> AsyncIterator[Any]:
            for message in messages[: self._random.randint(1, len(messages) - 1)]:
                yield message
            gone.set()
            await asyncio.Event().wait()

        call = self._client.adapters._connection.adapters.UploadAdapter(send())
        await gone.wait()
        call.cancel()
        with contextlib.suppress(grpc.RpcError, asyncio.CancelledError):
            await call

    # Watching

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        token = object()
        self._under_way[token] = what, time.monotonic()
        try:
            yield
        finally:
            del self._under_way[token]

    async def _watch(self) -> None:
        """Check in every sample that budgets hold and no call hangs."""
        process = psutil.Process(self._server.process.pid)
        while True:
            await asyncio.sleep(0.25)
            metrics = await asyncio.to_thread(self._server.metrics)
            for (name, labels), value in metrics.items():
                if name == "turret_adapter_bytes":
                    tier = dict(labels)["tier"]
                    self.record.most_bytes[tier] = max(self.record.most_bytes[tier], int(value))
            self.record.resident_bytes.append(process.memory_info().rss)
            now = time.monotonic()
            late = [what for what, since in self._under_way.values() if now - since > STALL_SECONDS]
            if late:
                raise Stalled(f"{late}\n{await self.stacks()}")

    async def stacks(self) -> str:
        """The stacks of the server's threads, and the server's metrics."""
        before = self._server.log.stat().st_size
        self._server.process.send_signal(signal.SIGUSR1)
        await asyncio.sleep(0.5)
        metrics = await asyncio.to_thread(self._server.metrics)
        counts = {
            f"{name} {dict(labels)}": value
            for (name, labels), value in metrics.items()
            if name in ("turret_sequences", "turret_kv_blocks", "turret_adapter_bytes")
        }
        return f"{counts}\n{self._server.log.read_bytes()[before:].decode(errors='replace')}"
