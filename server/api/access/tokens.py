"""Bearer tokens with roles."""

from __future__ import annotations

import hashlib
import hmac
import logging
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from turret.server import log
from turret.server.basics.files import read_regular
from turret.server.errors import PermissionDeniedError, UnauthenticatedError
from turret.server.words import say

# Values that are read from files, and read again when the files change.

_log = logging.getLogger(__name__)

_T = TypeVar("_T")
_Stamp = tuple[tuple[int, int, int], ...]


class WatchedFiles(Generic[_T]):
    """Not thread-safe.

    Args:
        paths: The files.
        read: Reads them; raises OSError or ValueError if they are no good.
        what: What they hold, for the log.

    Attributes:
        newest: What was read last; files that are no good change nothing.

    Raises:
        OSError: What ``read`` raised.
        ValueError: What ``read`` raised.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], _T], what: str) -> None:
        self._paths = tuple(paths)
        self._read = read
        self._what = what
        # Take the stamp before reading: the next look then notices a change made meanwhile.
        self._seen = self._stamp()
        self.newest = read()

    def look(self) -> bool:
        """Read the files again if they have changed; returns whether ``newest`` is another one."""
        stamp = self._stamp()
        if stamp is None or stamp == self._seen:
            return False
        self._seen = stamp
        try:
            for path in self._paths:
                # Reject a FIFO here: some readers would wait for its writer and block the reload.
                read_regular(path)
            self.newest = self._read()
        except (OSError, ValueError) as error:
            _log.error(f"{self._what} stay as they were", extra=log.fields(reason=error))
            return False
        _log.info(f"{self._what} read again")
        return True

    def forget(self) -> None:
        """Make the next look read the files, changed or not."""
        self._seen = None

    def _stamp(self) -> _Stamp | None:
        """Changes whenever a file is written or replaced; None while one is missing."""
        try:
            stats = [path.stat() for path in self._paths]
        except OSError:
            return None
        return tuple((s.st_ino, s.st_size, s.st_mtime_ns) for s in stats)


ROLES = ("inference", "admin", "metrics")


def bearer_token(authorization: str) -> str | None:
    """The token of a header ``Bearer TOKEN``; None if the header has another form."""
    scheme, _, token = authorization.partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def token_digest(token: str) -> bytes:
    """The digest that is stored of a token, which identifies it without disclosing it."""
    return hashlib.sha256(token.encode()).digest()


class TokenTable:
    """The accepted tokens. Holds digests only, so a dump of it discloses nothing."""

    def __init__(self, entries: Iterable[tuple[str, frozenset[str]]]) -> None:
        self._entries = tuple((token_digest(token), roles) for token, roles in entries)

    @classmethod
    def read(cls, path: Path) -> TokenTable:
        """Read lines ``TOKEN ROLE[,ROLE]``; blank lines and ``#`` lines are skipped.

        Raises:
            ValueError: A malformed line, an unknown role, a token given twice, or no token at all.
                Names the line, never its text.
            OSError: The file cannot be read.
        """
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            _log.warning("the token file is open to other users; its mode should be 0600")
        return cls.parse(path)

    @classmethod
    def parse(cls, path: Path) -> TokenTable:
        """As :meth:`read`, but without a warning about the file's mode."""
        entries: dict[str, frozenset[str]] = {}
        try:
            text = read_regular(path).decode()
        except UnicodeDecodeError:
            raise ValueError(say("TOKEN_FILE_NOT_TEXT", path=path)) from None
        for number, line in enumerate(text.splitlines(), start=1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if len(words) != 2:
                raise ValueError(say("TOKEN_LINE_MALFORMED", path=path, line=number))
            token, roles = words[0], frozenset(words[1].split(","))
            if not (token.isascii() and token.isprintable()):
                raise ValueError(say("TOKEN_NOT_ASCII", path=path, line=number))
            if not roles <= set(ROLES):
                # The unknown word may be a token, so the message does not repeat it.
                roles_known = ", ".join(ROLES)
                raise ValueError(say("ROLE_UNKNOWN", path=path, line=number, choices=roles_known))
            if token in entries:
                raise ValueError(say("TOKEN_DUPLICATE", path=path, line=number))
            entries[token] = roles
        if not entries:
            raise ValueError(say("TOKEN_FILE_EMPTY", path=path))
        return cls(entries.items())

    def replace(self, other: TokenTable) -> None:
        """Accept another table's tokens instead, from the next call on."""
        self._entries = other._entries

    def has_role(self, role: str) -> bool:
        """Whether any token has the role."""
        return any(role in roles for _, roles in self._entries)

    def roles_of(self, token: str) -> frozenset[str] | None:
        """The roles of a token; None if it is unknown. Takes the same time for every token."""
        presented = token_digest(token)
        found = None
        for digest, roles in self._entries:
            if hmac.compare_digest(digest, presented):
                found = roles
        return found


# Bearer tokens with roles, and which role each service asks for.

# Services that are not listed (health, reflection) are open: they reveal nothing about the content.
SERVICE_ROLES = {
    "turret.v1.Inference": "inference",
    "turret.v1.Adapters": "admin",
    # Not a service of turret.v1: a listening address may serve the metrics too.
    "metrics": "metrics",
}


def authorize(tokens: TokenTable | None, service: str, authorization: object) -> None:
    """Let a call pass, or raise.

    Args:
        tokens: The accepted tokens; None accepts every caller.
        service: Full name of the service that is called, a key of ``SERVICE_ROLES``. A door that
            has no services names the one that does the same.
        authorization: What the client sent as ``authorization``: ``Bearer TOKEN``. Anything but a
            string is as good as nothing.

    Raises:
        UnauthenticatedError: No token, or an unknown one.
        PermissionDeniedError: The token lacks the service's role.
    """
    role = SERVICE_ROLES.get(service)
    if role is None:
        return
    if role not in roles_of(tokens, authorization):
        raise PermissionDeniedError(say("ROLE_MISSING", role=role, service=service))


def roles_of(tokens: TokenTable | None, authorization: object) -> frozenset[str]:
    """The roles of a caller; arguments as for ``authorize``.

    Raises:
        UnauthenticatedError: No token, or an unknown one.
    """
    if tokens is None:
        return frozenset(ROLES)
    if not isinstance(authorization, str):
        raise UnauthenticatedError(say("TOKEN_MISSING"))
    token = bearer_token(authorization)
    if token is None:
        # The header may contain a token, so the message does not repeat it.
        raise UnauthenticatedError(say("TOKEN_MALFORMED"))
    roles = tokens.roles_of(token)
    if roles is None:
        raise UnauthenticatedError(say("TOKEN_UNKNOWN"))
    return roles
