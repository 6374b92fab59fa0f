"""The state of training that all protocols share, and their common operations on it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from turret.server.api.access import Party, TokenTable, bearer_token, token_digest
from turret.server.api.checkpoints import Checkpoint, Checkpoints, unix_time
from turret.server.api.futures import CommandLog, Futures
from turret.server.api.gate import ServingGate
from turret.server.basics.files import reporting_disk_faults
from turret.server.basics.turns import FairPool
from turret.server.errors import (
    AdapterMismatchError,
    InvalidRequestError,
    QueueFullError,
    TrainingNotFoundError,
    TurretError,
)
from turret.server.training import LearnerConfig, Published
from turret.server.words import say

if TYPE_CHECKING:
    from turret.server.models.describe import ModelInfo
    from turret.server.training.service import TrainingService


# Sessions of clients, with the models that they train and the samplers that they use.
#
# A session ends with everything in it when its client has been silent for a while.

_log = logging.getLogger(__name__)

# Clients send a heartbeat every ten seconds.
SESSION_SECONDS = 300.0
# Limits per owner and per session.
MAX_SESSIONS = 32
MAX_MODELS = 16
MAX_SAMPLERS = 64
_SHOWN_CHARS = 80


@dataclass(slots=True, eq=False, kw_only=True)
class TenantModel:
    """An adapter in training.

    Attributes:
        model_id: The id by which the client refers to the model.
        owner: The client.
        config: The config of the adapter.
        metadata: The client's own notes.
        log: The commands for the model.
        learner: The id of the adapter in the ``TrainingService``; None while there is none.
        used: The Unix time of the last command.
        inflight: The name under which the model's weights are registered for sampling; empty if
            they are not.
        size: The size in bytes of the files of the registered weights.
    """

    model_id: str
    owner: str
    config: LearnerConfig
    metadata: dict[str, str]
    log: CommandLog
    learner: int | None = None
    used: float = field(default_factory=unix_time)
    inflight: str = ""
    size: int = 0

    @property
    def adapter(self) -> str:
        """The name of its adapter for sampling."""
        session_id, _, number = self.model_id.partition(":train:")
        return f"training/{session_id}/{number}"

    @property
    def learner_number(self) -> int:
        """``learner``, for commands that need it.

        Raises:
            TrainingNotFoundError: The adapter could not be created.
        """
        if self.learner is None:
            raise unknown_model(self.model_id)
        return self.learner


@dataclass(slots=True, eq=False, kw_only=True)
class SavedSampler:
    """Weights to sample from.

    Attributes:
        sampler_id: The id by which the client refers to the sampler.
        owner: The client.
        adapter: The name of the adapter; empty for the base model.
        generation: The generation of the adapter; None for the newest.
        path: The path of the checkpoint, if the client named one.
        is_own: Whether the adapter is for this sampler alone, and ends with it.
        size: The size of that adapter's files in bytes.
        running: The number of requests that run.
        used: The time of its last use on the monotonic clock.
    """

    sampler_id: str
    owner: str
    adapter: str = ""
    generation: int | None = None
    path: str | None = None
    is_own: bool = False
    size: int = 0
    running: int = 0
    used: float = field(default_factory=time.monotonic)


@dataclass(slots=True, eq=False, kw_only=True)
class Session:
    """A client's session.

    Attributes:
        session_id: The id by which the client refers to the session.
        owner: The client.
        lasts: The session ends after this many seconds without a sign of life; None for
            ``SESSION_SECONDS``.
        is_numbered: Whether the client numbers the commands of its models.
        seen: The time of its last sign of life on the monotonic clock.
        models: Its models by id.
        samplers: Its samplers by id.
    """

    session_id: str
    owner: str
    lasts: float | None = None
    is_numbered: bool = True
    seen: float = field(default_factory=time.monotonic)
    models: dict[str, TenantModel] = field(default_factory=dict)
    samplers: dict[str, SavedSampler] = field(default_factory=dict)


def unknown_model(model_id: str) -> TrainingNotFoundError:
    """The error for a model that the client does not train."""
    text = say("TRAINED_MODEL_NOT_FOUND", model=model_id[:_SHOWN_CHARS])
    return TrainingNotFoundError(text)


class Sessions:
    """All sessions. Belongs to one event loop.

    Args:
        gate: Gives access to the training once the model is loaded.
        futures: Takes the results of commands.
    """

    def __init__(self, gate: ServingGate, futures: Futures) -> None:
        self._gate = gate
        self._futures = futures
        self._all: dict[str, Session] = {}
        self._waiting_bytes: Counter[str] = Counter()
        # Tasks that drop models or unregister adapters.
        self._ending: set[asyncio.Task[None]] = set()

    def training(self) -> TrainingService:
        """The service that trains.

        Raises:
            UnavailableError: The server is starting or shutting down.
        """
        training = self._gate.enter().training
        assert training is not None, "the server was started with a directory, but cannot train"
        return training

    def begin(self, owner: str, **options: Any) -> Session:
        """A new session; options are other fields of ``Session``.

        Raises:
            QueueFullError: The owner has too many sessions.
        """
        self._check_limit(owner, MAX_SESSIONS, "sessions", list(self._all.values()))
        session = Session(session_id=uuid.uuid4().hex, owner=owner, **options)
        self._all[session.session_id] = session
        return session

    def find(self, owner: str, session_id: str) -> Session:
        """A session; the call counts as a sign of life.

        Raises:
            TrainingNotFoundError: The session has ended, or belongs to another client.
        """
        session = self._all.get(session_id)
        if session is None or session.owner != owner:
            text = say("SESSION_NOT_FOUND", session=session_id[:_SHOWN_CHARS])
            raise TrainingNotFoundError(text)
        session.seen = time.monotonic()
        return session

    def models(self, owner: str, *, is_numbered: bool | None = None) -> list[TenantModel]:
        """All models of an owner, or those of one kind of session (see ``Session``)."""
        return [
            model
            for session in self._all.values()
            for model in session.models.values()
            if model.owner == owner and is_numbered in (None, session.is_numbered)
        ]

    def of(self, model: TenantModel) -> Session:
        """The session of a model that was just found."""
        return self._all[model.model_id.partition(":")[0]]

    @property
    def bytes_by_owner(self) -> Counter[str]:
        """The size of each owner's files for sampling."""
        found: Counter[str] = Counter()
        for session in self._all.values():
            having_files = (*session.samplers.values(), *session.models.values())
            found[session.owner] += sum(each.size for each in having_files)
        return found

    def model(self, owner: str, model_id: str, *, is_numbered: bool = True) -> TenantModel:
        """A model; the call counts as a sign of life of its session.

        Args:
            owner: The client.
            model_id: The model.
            is_numbered: See ``Session``; other models do not exist for the caller.

        Raises:
            TrainingNotFoundError: The model does not exist, or belongs to another client.
        """
        session = self._all.get(model_id.partition(":")[0])
        model = None if session is None else session.models.get(model_id)
        if session is None or model is None or model.owner != owner:
            raise unknown_model(model_id)
        if session.is_numbered != is_numbered:
            raise unknown_model(model_id)
        session.seen = time.monotonic()
        model.used = unix_time()
        return model

    def sampler(self, owner: str, sampler_id: str) -> SavedSampler:
        """A sampler; the call counts as a sign of life of its session.

        Raises:
            TrainingNotFoundError: The sampler does not exist, or belongs to another client.
        """
        session = self._all.get(sampler_id.partition(":")[0])
        sampler = None if session is None else session.samplers.get(sampler_id)
        if session is None or sampler is None or sampler.owner != owner:
            text = say("SAMPLER_NOT_FOUND", sampler=sampler_id[:_SHOWN_CHARS])
            raise TrainingNotFoundError(text)
        session.seen = sampler.used = time.monotonic()
        return sampler

    def add_model(
        self, session: Session, number: int, config: LearnerConfig, metadata: dict[str, str]
    ) -> TenantModel:
        """A new model; ``number`` identifies it within the session.

        Raises:
            QueueFullError: The owner has too many models.
        """
        owner = session.owner
        self._check_limit(owner, MAX_MODELS, "models in training", self.models(owner))
        model_id = f"{session.session_id}:train:{number}"
        log = CommandLog(self._futures, self._waiting_bytes)
        model = TenantModel(
            model_id=model_id, owner=owner, config=config, metadata=metadata, log=log
        )
        session.models[model_id] = model
        return model

    def add_sampler(self, session: Session, sampler: SavedSampler) -> None:
        """Add a sampler; if there are too many, close the least recently used one.

        A sampler that had the same id ends.

        Raises:
            TrainingNotFoundError: The session has ended meanwhile.
            QueueFullError: All samplers are in use.
        """
        try:
            self.find(session.owner, session.session_id)
            before = session.samplers.pop(sampler.sampler_id, None)
            self._make_room(session)
        except (TrainingNotFoundError, QueueFullError):
            self._withdraw(sampler)
            raise
        session.samplers[sampler.sampler_id] = sampler
        if before is not None and before.adapter != sampler.adapter:
            self._withdraw(before)

    def _make_room(self, session: Session) -> None:
        if len(session.samplers) < MAX_SAMPLERS:
            return
        idle = [each for each in session.samplers.values() if not each.running]
        if not idle:
            raise QueueFullError(say("TRAINING_LIMIT_REACHED", most=MAX_SAMPLERS, what="samplers"))
        oldest = min(idle, key=lambda each: each.used)
        del session.samplers[oldest.sampler_id]
        self._withdraw(oldest)

    def drop_model(self, model: TenantModel) -> None:
        """Forget a model. A running pass ends early, and any other running command completes."""
        session = self._all.get(model.model_id.partition(":")[0])
        if session is not None:
            session.models.pop(model.model_id, None)
        self._later(self._drop(model))

    def end(self, session: Session) -> None:
        """End a session, with its models and samplers."""
        if self._all.pop(session.session_id, None) is None:
            return
        for model in session.models.values():
            self._later(self._drop(model))
        for sampler in session.samplers.values():
            self._withdraw(sampler)

    def sweep(self) -> None:
        """End silent sessions, and fail commands that wait for a command that never arrived."""
        now = time.monotonic()
        for session in list(self._all.values()):
            lasts = SESSION_SECONDS if session.lasts is None else session.lasts
            if session.seen + lasts < now:
                self.end(session)
            for model in session.models.values():
                model.log.give_up()

    async def close(self) -> None:
        """Wait until everything that is ending has ended."""
        if self._ending:
            await asyncio.wait(self._ending)

    def _check_limit(
        self, owner: str, most: int, what: str, found: Sequence[Session] | Sequence[TenantModel]
    ) -> None:
        if sum(each.owner == owner for each in found) >= most:
            raise QueueFullError(say("TRAINING_LIMIT_REACHED", most=most, what=what))

    async def _drop(self, model: TenantModel) -> None:
        model.log.abandon()
        # Drop the adapter now: this ends a running pass, which could take hours.
        await self._drop_learner(model)
        await model.log.close()
        # A command that was running may have created an adapter; drop that one too.
        await self._drop_learner(model)
        if model.inflight and self._gate.is_open:
            await self.training().withdraw(model.inflight)

    async def _drop_learner(self, model: TenantModel) -> None:
        # A command that is still running finds no adapter from now on.
        learner, model.learner = model.learner, None
        if learner is not None and self._gate.is_open:
            await self.training().drop(learner)

    def _withdraw(self, sampler: SavedSampler) -> None:
        if sampler.is_own and self._gate.is_open:
            self._later(self._withdrawn(sampler.adapter))

    async def _withdrawn(self, name: str) -> None:
        await self.training().withdraw(name)

    def _later(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(_quietly(work))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)


async def _quietly(work: Coroutine[None, None, None]) -> None:
    """Run work for which no caller waits."""
    try:
        await work
    except TurretError:
        # A server that is shutting down rejects the work, and keeps no state anyway.
        pass
    except Exception:
        _log.exception("a training session could not be ended")


SWEEP_SECONDS = 10.0
_T = TypeVar("_T")


class Tenants:
    """The clients' training sessions and checkpoints. Belongs to one event loop.

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
        # Messages with sequences are read one at a time, because reading one takes memory and the
        # interpreter's lock.
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

        A client's files are written one after another, so that its share counts all of them, and
        that it takes only one of the threads that write files.

        Raises:
            InvalidRequestError: The client has used its share of the disk.
        """
        async with self._writing[owner]:
            # All clients together may use half of the disk space that would be free without their
            # files. If clients have tokens, each may use half of that.
            used = self.checkpoints.bytes_by_owner + self.sessions.bytes_by_owner
            all_used = used.total()
            most = (self.checkpoints.bytes_free + all_used) // 2
            share = most // 2 if owner else most
            if used[owner] >= share or all_used >= most:
                text = say(
                    "TRAINING_DISK_FULL",
                    used=used[owner],
                    most=share,
                    all_used=all_used,
                    all_most=most,
                )
                raise InvalidRequestError.of("path", text)
            yield

    async def read(self, tenant: bytes, read: Callable[[], _T]) -> _T:
        """The result of reading a message off the event loop, because it may take a long time."""
        return await self._reading.run(tenant, read)

    # Commands, which run when it is their turn.

    async def save(
        self,
        model: TenantModel,
        kind: str,
        name: str,
        *,
        metadata: Mapping[str, str] | None = None,
        ttl_seconds: float | None = None,
        overwrite: bool = False,
    ) -> Checkpoint:
        """Save a checkpoint. It includes the optimizer only if its kind is ``weights``.

        Raises:
            InvalidRequestError: The name is invalid or taken, or the client has too many
                checkpoints.
        """
        training = self.sessions.training()

        async def write(folder: Path) -> None:
            await training.save(model.learner_number, folder, with_optimizer=kind == "weights")

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

    async def load(self, model: TenantModel, path: str, *, with_optimizer: bool) -> Checkpoint:
        """Continue a model from a checkpoint.

        Raises:
            TrainingNotFoundError: The checkpoint does not exist.
            AdapterMismatchError: The checkpoint is of another base model.
            InvalidRequestError: The checkpoint has no optimizer, or a different config.
        """
        checkpoint = self.checkpoints.find(model.owner, path)
        if checkpoint.base != self.info().digest:
            raise AdapterMismatchError(say("CHECKPOINT_OF_OTHER_BASE", path=checkpoint.path))
        if with_optimizer and checkpoint.kind != "weights":
            raise InvalidRequestError.of("optimizer", say("CHECKPOINT_WITHOUT_OPTIMIZER"))
        training = self.sessions.training()
        with self.checkpoints.reading(checkpoint) as folder:
            await training.load(model.learner_number, folder, with_optimizer=with_optimizer)
        return checkpoint

    async def publish(self, model: TenantModel) -> Published:
        """Register the present weights as the next generation of ``model.inflight``."""
        async with self.writing(model.owner):
            model.inflight = model.adapter
            training = self.sessions.training()
            published = await training.publish(model.learner_number, model.inflight)
            model.size = published.size
            return published

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            try:
                self.futures.sweep()
                self.sessions.sweep()
                await self.checkpoints.sweep()
            except TurretError:
                # The server is starting or shutting down.
                continue
            except Exception:
                _log.exception("expired training sessions and results could not be removed")
