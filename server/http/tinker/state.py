"""The state of the Tinker API, and the functions that its handlers share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turret.server.api.services import Services
from turret.server.api.tenants.futures import Future, Result
from turret.server.api.tenants.tenants import Model, Session
from turret.server.basics.codes import Code
from turret.server.basics.names import BASE
from turret.server.errors import InvalidRequestError, TrainingNotFoundError
from turret.server.http.endpoint import Exchange
from turret.server.http.refusals import HttpRefusal
from turret.server.http.schemas.fields import wrong_type
from turret.server.words import say

_SHOWN_CHARS = 200


@dataclass(frozen=True, slots=True)
class Link:
    """A link to an archive, or to one file.

    Attributes:
        owner: The client that asked for it.
        folder: The directory with the files.
        name: The name of the file; empty for an archive.
        expires: When the link expires, in Unix seconds.
    """

    owner: str
    folder: Path
    name: str
    expires: float


class TinkerState:
    """The state of the Tinker API. Belongs to one event loop.

    Args:
        services: The services; they must have tenants.

    Attributes:
        tenants: The state of training that all protocols share.
        links: Links to archives and files, by the secret in them.
    """

    def __init__(self, services: Services) -> None:
        assert services.tenants is not None
        self.services = services
        self.tenants = services.tenants
        self.links: dict[str, Link] = {}

    def owner(self, exchange: Exchange) -> str:
        """Identifies the client by its token; empty if the server accepts every caller."""
        return self.tenants.owner(exchange.call.party)

    def session(self, exchange: Exchange, session_id: str) -> Session:
        """A session of the client, which counts as a sign of life.

        Raises:
            HttpRefusal: The session has ended, or belongs to another client.
        """
        try:
            return self.tenants.sessions.find(self.owner(exchange), session_id)
        except TrainingNotFoundError:
            raise session_gone(session_id) from None

    def check_base(self, name: str) -> None:
        """Check that a name is that of the base model.

        Raises:
            HttpRefusal: It is another name.
        """
        if name not in (BASE, self.tenants.info().name):
            text = say("NO_SUCH_MODEL", model=name[:_SHOWN_CHARS])
            raise HttpRefusal(404, Code.NOT_FOUND, text)

    def command(
        self,
        exchange: Exchange,
        model: Model,
        number: int,
        run: Callable[[], Awaitable[Result]],
        size: int = 0,
    ) -> Future:
        """The future of a command. A command that was sent before already has one.

        Raises:
            HttpRefusal: The command was sent before, and its result is no longer kept.
            QueueFullError: Too many commands wait.
        """
        owner, request_id = model.owner, f"{model.model_id}:{number}"
        if found := self.tenants.futures.find(owner, request_id):
            return found
        if model.log.is_past(number):
            raise gone()
        return model.log.add(number, owner, request_id, run, size)


def session_gone(session_id: str) -> HttpRefusal:
    """The error for a session that has ended. Its status makes clients stop their heartbeats."""
    text = say("SESSION_NOT_FOUND", session=session_id[:_SHOWN_CHARS])
    return HttpRefusal(410, Code.NOT_FOUND, text)


def gone() -> HttpRefusal:
    """The error for a result that does not exist or is no longer kept."""
    return HttpRefusal(410, Code.NOT_FOUND, say("RESULT_GONE"))


def number_of(raw: Any, path: str = "seq_id") -> int:
    """The number of a command.

    Raises:
        InvalidRequestError: The value is not a valid number.
    """
    if type(raw) is not int or not 0 < raw < 1 << 31:
        raise InvalidRequestError.of(path, wrong_type("a positive integer", raw))
    return raw
