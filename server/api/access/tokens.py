"""Bearer tokens with roles."""

from __future__ import annotations

import hashlib
import hmac
import logging
import stat
from collections.abc import Iterable
from pathlib import Path

from turret.server.basics.closest import did_you_mean
from turret.server.basics.files.regular_file import read_regular

_log = logging.getLogger(__name__)

ROLES = ("inference", "admin", "metrics")
_ALL_ROLES = ", ".join(ROLES)


def bearer_token(authorization: str) -> str | None:
    """The token of a header ``Bearer TOKEN``; None if the header has another form."""
    scheme, _, token = authorization.partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def token_digest(token: str) -> bytes:
    """What is kept of a token: it names the token and does not disclose it."""
    return hashlib.sha256(token.encode()).digest()


def _named(role: str, token: str) -> str:
    """What to say of a word that is no role, unless it may be a token: those are not repeated."""
    if set(token.split(",")) <= set(ROLES):
        return "the token comes first; "
    meant = did_you_mean(role, ROLES)
    return f"{role!r} is no role{meant}; " if meant else "a word after the token is no role; "


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
        """As :meth:`read`, but says nothing of the file's mode."""
        flag = f"--token-file: {path}"
        entries: dict[str, frozenset[str]] = {}
        try:
            text = read_regular(path).decode()
        except UnicodeDecodeError:
            raise ValueError(f"{flag} is no UTF-8 text") from None
        for number, line in enumerate(text.splitlines(), start=1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            where = f"{flag}: line {number}"
            if len(words) != 2:
                raise ValueError(f"{where} is not TOKEN ROLE[,ROLE]")
            token, roles = words[0], frozenset(words[1].split(","))
            if not (token.isascii() and token.isprintable()):
                raise ValueError(f"{where}: a token must be printable ASCII")
            if unknown := sorted(roles - set(ROLES)):
                raise ValueError(f"{where}: {_named(unknown[0], token)}roles are {_ALL_ROLES}")
            if token in entries:
                raise ValueError(f"{where} repeats the token of an earlier line")
            entries[token] = roles
        if not entries:
            raise ValueError(f"{flag} holds no token: a line each, TOKEN ROLE[,ROLE]")
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
