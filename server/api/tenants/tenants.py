"""The state of training that all protocols share, and their common operations on it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from turret.server.api.access import Party, TokenTable, bearer_token, token_digest
from turret.server.api.gate import ServingGate
from turret.server.api.tenants.checkpoints import Checkpoint, Checkpoints
from turret.server.api.tenants.futures import Futures
from turret.server.api.tenants.sessions import Model, Sessions
from turret.server.basics.files import reporting_disk_faults
from turret.server.basics.turns import FairPool
from turret.server.errors import AdapterMismatchError, InvalidRequestError, TurretError
from turret.server.training.trainer import Published
from turret.server.words import say

if TYPE_CHECKING:
    from turret.server.models.describe import ModelInfo

_log = logging.getLogger(__name__)

SWEEP_SECONDS = 10.0
_T = TypeVar("_T")


class Tenants:
    """Who trains what. Belongs to one event loop.

    Args:
        gate: Gives access to the training once the model is loaded.
        folder: The directory of checkpoints.
        tokens: Accepted tokens; None lets every caller in, as one client.

    Attributes:
        futures: The results of commands.
        sessions: The sessions of clients, with their models.
    """

    def __init__(self, gate: ServingGate, folder: Path, tokens: TokenTable | None) -> None:
        self.gate = gate
        self.futures = Futures()
        self.sessions = Sessions(gate, self.futures)
        self._folder = folder
        self._has_tokens = tokens is not None
        self._checkpoints: Checkpoints | None = None
        # Messages with sequences are read one at a time, because each takes memory and a lock.
        self._reading = FairPool(ThreadPoolExecutor(1, "turret-pass"))
        self._writing: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._sweeper: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the removal of expired data. Every protocol calls this."""
        if self._sweeper is None:
            self._sweeper = asyncio.ensure_future(self._sweep())

    async def stop(self) -> None:
        """Stop, and wait until all sessions have ended. Every protocol calls this."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
        await self.sessions.close()
        self._reading.close()

    @property
    def checkpoints(self) -> Checkpoints:
        """The checkpoints.

        Raises:
            UnavailableError: The server is starting or shutting down.
            StorageFailedError: The directory cannot be used.
        """
        # Before the server serves, another one may still use the directory.
        self.gate.enter()
        if self._checkpoints is None:
            with reporting_disk_faults():
                self._checkpoints = Checkpoints(self._folder)
        return self._checkpoints

    def owner(self, party: Party) -> str:
        """Identifies a client by its token; empty if the server accepts every caller."""
        if not self._has_tokens:
            return ""
        assert isinstance(party.authorization, str), "the call was authorised"
        return token_digest(bearer_token(party.authorization) or "").hex()

    def info(self) -> ModelInfo:
        """The base model.

        Raises:
            UnavailableError: The server is starting or shutting down.
        """
        return self.gate.enter().model_info

    @contextlib.asynccontextmanager
    async def writing(self, owner: str) -> AsyncIterator[None]:
        """Let a client write a checkpoint or a sampler within the block.

        A client's files are written one after another. So its share counts all of them, and it
        takes only one of the threads that write files.

        Raises:
            InvalidRequestError: The client has used its share of the disk.
        """
        async with self._writing[owner]:
            # All clients together may use half of the disk space that would be free without their
            # files, and one token half of that.
            used = self.checkpoints.bytes_by_owner + self.sessions.bytes_by_owner
            all_used = used.total()
            most = (self.checkpoints.bytes_free + all_used) // 2
            share = most // 2 if owner else most
            if used[owner] >= share or all_used >= most:
                text = say("TRAINING_DISK_FULL", used=used[owner], most=share)
                raise InvalidRequestError.of("path", text)
            yield

    async def read(self, tenant: bytes, read: Callable[[], _T]) -> _T:
        """The result of reading a message, which may take long, off the event loop."""
        return await self._reading.run(tenant, read)

    # Commands, which run when it is their turn.

    async def save(
        self,
        model: Model,
        kind: str,
        name: str,
        *,
        metadata: Mapping[str, str] | None = None,
        ttl_seconds: float | None = None,
        overwrite: bool = False,
    ) -> Checkpoint:
        """Save a checkpoint. It includes the optimizer only if its kind is ``weights``.

        Raises:
            InvalidRequestError: The name is invalid or taken, or the client has too many.
        """
        training = self.sessions.training()

        async def write(folder: Path) -> None:
            await training.save(model.number, folder, with_optimizer=kind == "weights")

        draft = Checkpoint(
            run=model.model_id,
            kind=kind,
            name=name,
            owner=model.owner,
            base=self.info().digest,
            config=model.config,
            metadata=metadata or {},
        )
        if ttl_seconds is not None:
            draft = replace(draft, expires=draft.time + ttl_seconds)
        async with self.writing(model.owner):
            return await self.checkpoints.save(draft, write, overwrite=overwrite)

    async def load(self, model: Model, path: str, *, with_optimizer: bool) -> Checkpoint:
        """Continue a model from a checkpoint.

        Raises:
            TrainingNotFoundError: The checkpoint does not exist.
            AdapterMismatchError: It is of another base model.
            InvalidRequestError: It has no optimizer, or another config.
        """
        checkpoint = self.checkpoints.find(model.owner, path)
        if checkpoint.base != self.info().digest:
            raise AdapterMismatchError(say("CHECKPOINT_OF_OTHER_BASE", path=checkpoint.path))
        if with_optimizer and checkpoint.kind != "weights":
            raise InvalidRequestError.of("optimizer", say("CHECKPOINT_WITHOUT_OPTIMIZER"))
        folder = self.checkpoints.folder(checkpoint)
        training = self.sessions.training()
        await training.load(model.number, folder, with_optimizer=with_optimizer)
        return checkpoint

    async def publish(self, model: Model) -> Published:
        """Register the present weights as the next generation of ``model.inflight``."""
        async with self.writing(model.owner):
            model.inflight = model.adapter
            return await self.sessions.training().publish(model.number, model.inflight)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            try:
                self.futures.sweep()
                self.sessions.sweep()
                await self.checkpoints.sweep()
            except TurretError:
                # The server is starting or shutting down, or its disk failed, which was logged.
                continue
            except Exception:
                _log.exception("the sweep of training failed")
