"""The state of the Tinker API, and the functions that its handlers share."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from turret.server.api.access import bearer_token, token_digest
from turret.server.api.services import Services
from turret.server.api.violations import Violations
from turret.server.basics.codes import Code
from turret.server.basics.files import reporting_disk_faults
from turret.server.basics.names import BASE
from turret.server.basics.turns import FairPool
from turret.server.errors import InvalidRequestError, TurretError
from turret.server.http.endpoint import Exchange
from turret.server.http.refusals import HttpRefusal
from turret.server.http.schemas.fields import Body, Sent, wrong_type
from turret.server.http.tinker.checkpoints import Checkpoints
from turret.server.http.tinker.futures import Future, Futures, Result
from turret.server.http.tinker.sessions import Model, Sessions
from turret.server.models.describe import ModelInfo
from turret.server.words import say

_log = logging.getLogger(__name__)

SWEEP_SECONDS = 10.0
_SHOWN_CHARS = 200
_B = TypeVar("_B", bound=Body)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Link:
    """A link to an archive, or to one file.

    Attributes:
        owner: The client that asked for it.
        folder: The directory with the files.
        name: The name of the file; empty for an archive.
        expires: When it stops working, Unix seconds.
    """

    owner: str
    folder: Path
    name: str
    expires: float


class Door:
    """The state of the Tinker API. Belongs to one event loop.

    Args:
        services: The services; they must have a directory for training.

    Attributes:
        links: Links to archives and files, by the secret in them.
    """

    def __init__(self, services: Services) -> None:
        assert services.training is not None
        self.services = services
        self.futures = Futures()
        self.sessions = Sessions(services.gate, self.futures)
        self._checkpoints: Checkpoints | None = None
        self.links: dict[str, Link] = {}
        # Messages with sequences are read one at a time, because each takes memory and a lock.
        self._reading = FairPool(ThreadPoolExecutor(1, "turret-pass"))
        self._sweeper: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start to remove what has expired."""
        self._sweeper = asyncio.ensure_future(self._sweep())

    async def stop(self) -> None:
        """Stop, and wait until all sessions have ended."""
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
        self.services.gate.enter()
        if self._checkpoints is None:
            assert self.services.training is not None
            with reporting_disk_faults():
                self._checkpoints = Checkpoints(self.services.training)
        return self._checkpoints

    def owner(self, exchange: Exchange) -> str:
        """Identifies the client by its token; empty if the server accepts every caller."""
        if self.services.tokens is None:
            return ""
        authorization = exchange.call.party.authorization
        assert isinstance(authorization, str), "the call was authorised"
        return token_digest(bearer_token(authorization) or "").hex()

    def info(self) -> ModelInfo:
        """The base model.

        Raises:
            UnavailableError: The server is starting or shutting down.
        """
        return self.services.gate.enter().model_info

    def check_base(self, name: str) -> None:
        """Check that a name is that of the base model.

        Raises:
            HttpRefusal: It is another name.
        """
        if name not in (BASE, self.info().name):
            text = say("NO_SUCH_MODEL", model=name[:_SHOWN_CHARS])
            raise HttpRefusal(404, Code.NOT_FOUND, text)

    def check_disk(self, owner: str) -> None:
        """Check that a client may write another checkpoint or sampler.

        Those of all clients may take half of the disk that is free without them, and those of one
        token half of that. What a client is writing is not counted yet: one for each of its models.

        Raises:
            InvalidRequestError: It has taken its share.
        """
        used = self.checkpoints.bytes_by_owner + self.sessions.bytes_by_owner
        all_used = used.total()
        most = (self.checkpoints.bytes_free + all_used) // 2
        share = most // 2 if owner else most
        if used[owner] >= share or all_used >= most:
            text = say("TRAINING_DISK_FULL", used=used[owner], most=share)
            raise InvalidRequestError.of("path", text)

    async def read(self, tenant: bytes, read: Callable[[], _T]) -> _T:
        """The result of reading a message, which may take long, off the event loop."""
        return await self._reading.run(tenant, read)

    def command(
        self,
        exchange: Exchange,
        model: Model,
        number: int,
        run: Callable[[], Awaitable[Result]],
        size: int = 0,
    ) -> Future:
        """The future of a command; one that was sent before has its future already.

        Raises:
            HttpRefusal: The command was sent before, and its result is no longer kept.
            QueueFullError: Too many commands wait.
        """
        owner, request_id = model.owner, f"{model.model_id}:{number}"
        if found := self.futures.find(owner, request_id):
            return found
        if model.log.is_past(number):
            raise gone()
        return model.log.add(number, owner, request_id, run, size)

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


def gone() -> HttpRefusal:
    """The error for a result that does not exist or is no longer kept."""
    return HttpRefusal(410, Code.NOT_FOUND, say("RESULT_GONE"))


def body_of(exchange: Exchange, kind: type[_B]) -> _B:
    """The body of a request.

    Raises:
        InvalidRequestError: Lists every offending field.
    """
    sent: Sent[_B] = exchange.take_body()
    return checked(sent, kind)


def checked(sent: Sent[Any], kind: type[_B]) -> _B:
    """The body that was sent; errors are those of ``body_of``."""
    Violations(list(sent.wrong)).raise_if_any()
    assert isinstance(sent.body, kind)
    return sent.body


def number_of(raw: Any, path: str = "seq_id") -> int:
    """The number of a command.

    Raises:
        InvalidRequestError: The value is not a valid number.
    """
    if type(raw) is not int or not 0 < raw < 1 << 31:
        raise InvalidRequestError.of(path, wrong_type("a positive integer", raw))
    return raw
