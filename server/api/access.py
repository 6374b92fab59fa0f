"""Access control: bearer tokens, roles, and limits on what each caller may run at once."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import resource
import secrets
import stat
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Generic, TypeVar

from turret.server import log
from turret.server.basics.files import read_regular
from turret.server.basics.settings import is_ip_address
from turret.server.basics.turns import Limit, Places
from turret.server.config import MIB, Config
from turret.server.errors import PermissionDeniedError, QueueFullError, UnauthenticatedError
from turret.server.words import say

_log = logging.getLogger(__name__)

_T = TypeVar("_T")
_Stamp = tuple[tuple[int, ...], ...]


class WatchedFiles(Generic[_T]):
    """A value that is read from files, and read again when they change. Not thread-safe.

    Args:
        paths: The files.
        read: Reads the files; raises OSError or ValueError if they are invalid.
        what: The name of the files' content in the log.

    Attributes:
        newest: The value that was read last; invalid files leave it unchanged.

    Raises:
        OSError: The error that ``read`` raised.
        ValueError: The error that ``read`` raised.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], _T], what: str) -> None:
        self._paths = tuple(paths)
        self._read = read
        self._what = what
        # Take the stamp before reading, so that the next look notices a change that happens
        # meanwhile.
        self._seen = self._stamp()
        self._reported: _Stamp | None = None
        self.newest = read()

    def look(self) -> bool:
        """Read the files again if they have changed; returns whether ``newest`` was replaced."""
        stamp = self._stamp()
        if stamp is None or stamp == self._seen:
            return False
        try:
            for path in self._paths:
                # Reject a FIFO here: some readers would wait for its writer and block the reload.
                read_regular(path)
            # The files are readable, so if they are invalid, try them again only after a change.
            # Unreadable files are tried again at every look, because the server may only be short
            # of memory or file descriptors.
            self._seen = stamp
            self.newest = self._read()
        except (OSError, ValueError, MemoryError) as error:
            if isinstance(error, MemoryError):
                self._seen = None
            # TLS looks at the files for each connection, so log each problem only once.
            if stamp != self._reported:
                self._reported = stamp
                _log.error(
                    f"cannot read the {self._what} again; keeping the old ones",
                    extra=log.fields(reason=str(error) or repr(error)),
                )
            return False
        _log.info(f"{self._what} reloaded")
        return True

    def forget(self) -> None:
        """Make the next look read the files even if they have not changed."""
        self._seen = self._reported = None

    def _stamp(self) -> _Stamp | None:
        """A stamp that changes when a file is written or replaced; None while a file is missing."""
        try:
            stats = [path.stat() for path in self._paths]
        except OSError:
            return None
        # A copy can preserve a file's mtime, but not its ctime.
        return tuple((s.st_ino, s.st_size, s.st_ctime_ns) for s in stats)


# Host names by which a browser may call a server without tokens.

_HOST = re.compile(r"(?:\[(?P<address>[0-9a-z:.%]+)\]|(?P<name>[^\s:@/?#\[\]\\]*))(?::[0-9]*)?")


def is_own_host(host: str, names: Collection[str] = ()) -> bool:
    """Whether a Host header excludes DNS rebinding, the use of another site's name for this server.

    Nobody can rebind an IP address or localhost. A request without the header does not come from a
    browser.

    Args:
        host: The header. An unusual form (``localhost:80@evil.example``) is not accepted.
        names: Additional accepted names, in lower case.
    """
    host = host.strip().lower()
    if not host:
        return True
    found = _HOST.fullmatch(host)
    if found is None:
        return False
    name = found["address"] or found["name"].rstrip(".")
    is_localhost = name == "localhost" or name.endswith(".localhost")
    return is_localhost or name in names or is_ip_address(name)


# Bearer tokens with roles.

ROLES = ("inference", "admin", "metrics", "training")


def bearer_token(authorization: str) -> str | None:
    """The token of a header ``Bearer TOKEN``; None if the header has another form."""
    scheme, _, token = authorization.partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def token_digest(token: str) -> bytes:
    """The digest under which a token is stored; it identifies the token without disclosing it."""
    return hashlib.sha256(token.encode()).digest()


class TokenTable:
    """The accepted tokens. The table has only their digests, so that a dump discloses nothing."""

    def __init__(self, entries: Iterable[tuple[str, frozenset[str]]]) -> None:
        self._entries = tuple((token_digest(token), roles) for token, roles in entries)

    @classmethod
    def read(cls, path: Path) -> TokenTable:
        """Read lines ``TOKEN ROLE[,ROLE]``; blank lines and ``#`` lines are skipped.

        Raises:
            ValueError: A malformed line, an unknown role, a duplicate token, or no token at all.
                The message has the line's number but not its text.
            OSError: The file cannot be read.
        """
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            _log.warning("other users can read the token file; its mode should be 0600")
        return cls.parse(path)

    @classmethod
    def parse(cls, path: Path) -> TokenTable:
        """Like :meth:`read`, but without a warning about the file's mode."""
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


# How often the token file is checked for changes, without SIGHUP.
POLL_SECONDS = 5.0
NOTHING_TO_RELOAD = "nothing to read again: no --token-file"


class TokenReloader:
    """Reads a token file again when it has changed. An invalid file changes nothing.

    Args:
        path: The file.
        tokens: The table that gets the tokens of the file.
    """

    def __init__(self, path: Path, tokens: TokenTable) -> None:
        self._files = WatchedFiles((path,), lambda: TokenTable.read(path), "tokens")
        self._tokens = tokens
        self._asked = asyncio.Event()

    def reload(self) -> None:
        """Read the file now, even if it has not changed."""
        self._files.forget()
        self._asked.set()

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            try:
                async with asyncio.timeout(POLL_SECONDS):
                    await self._asked.wait()
            except TimeoutError:
                pass
            self._asked.clear()
            if await asyncio.to_thread(self._files.look):
                self._tokens.replace(self._files.newest)


INFERENCE = "turret.v1.Inference"
ADAPTERS = "turret.v1.Adapters"
TRAINING = "turret.v1.Training"

# The role that each service requires.

# Services that are not listed (health, reflection) are open: they reveal nothing about the content.
SERVICE_ROLES = {
    INFERENCE: "inference",
    ADAPTERS: "admin",
    TRAINING: "training",
    # The metrics are not a service of turret.v1, but a listening address may serve them too.
    "metrics": "metrics",
}


def authorize(tokens: TokenTable | None, service: str, authorization: object) -> None:
    """Check that a caller may use a service.

    Args:
        tokens: The accepted tokens; None accepts every caller.
        service: Full name of the service that is called, a key of ``SERVICE_ROLES``. A protocol
            without services passes the name of the equivalent service.
        authorization: The client's ``authorization`` header, ``Bearer TOKEN``. A value that is not
            a string counts as missing.

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


# Limits on connections, which leave enough descriptors for files.

# Limit of one listening address. A connection costs a descriptor and, with TLS, tens of KB.
MOST_CONNECTIONS = 4096
# Descriptors kept free of connections, for files of adapters and uploads, the log and the model.
RESERVED_DESCRIPTORS = 512
# A server with fewer descriptors than the reserve still accepts this many connections.
_LEAST_CONNECTIONS = 16


def most_connections(num_addresses: int) -> int:
    """The maximum number of connections of each listening address; further ones are closed.

    All addresses together leave ``RESERVED_DESCRIPTORS`` free. For this, the process's soft limit
    on descriptors is raised, as far as the hard limit allows.
    """
    wanted = num_addresses * MOST_CONNECTIONS + RESERVED_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    share = (soft - RESERVED_DESCRIPTORS) // num_addresses
    return max(min(share, MOST_CONNECTIONS), _LEAST_CONNECTIONS)


# Limits on a party's open requests, and the cached prefixes that a party may use.

# How many requests of one call the engine gets at a time. A list of a thousand prompts must not
# fill the queue in which others wait.
MAX_AT_A_TIME = 64
# Concurrent exports, which have open files until the client has read them.
MAX_EXPORTS = 32
# Keeps salts unpredictable outside this process, even for somebody who knows the tokens.
_SECRET = secrets.token_bytes(32)


def peer_address(peer: str) -> str:
    """The address of a gRPC peer without its port: ``ipv4:10.0.0.1``; a unix socket is one peer."""
    return peer.rpartition(":")[0] if peer.startswith("ip") else peer.partition(":")[0]


def salt_of(tenant: bytes, asked: str) -> bytes:
    """The salt of a request's cached blocks; empty if every request may use them.

    Args:
        tenant: See ``Party.tenant``.
        asked: The ``cache_salt`` that the request carries, or nothing.
    """
    if not tenant and not asked:
        return b""
    return blake2b(tenant + asked.encode(), digest_size=16, key=_SECRET).digest()


class MessageMemory:
    """Counts the bytes of messages until their calls end. Belongs to one event loop.

    Args:
        most_bytes: The limit for all clients together; each token has half of it.
    """

    def __init__(self, most_bytes: int = 512 * MIB) -> None:
        self._most_bytes = most_bytes
        self._held: Counter[bytes] = Counter()
        self._all_held = 0

    def hold(self, tenant: bytes, num_bytes: int) -> None:
        """Count bytes until ``release`` is called with the same arguments.

        Raises:
            QueueFullError: The messages of all clients, or of this token, would take too much.
        """
        limits = [(self._all_held, self._most_bytes)]
        if tenant:
            limits.append((self._held[tenant], self._most_bytes // 2))
        for held, most in limits:
            if held + num_bytes > most:
                raise QueueFullError(say("MESSAGES_FULL", held=held, most=most))
        self._held[tenant] += num_bytes
        self._all_held += num_bytes

    def release(self, tenant: bytes, num_bytes: int) -> None:
        """Undo ``hold``."""
        self._all_held -= num_bytes
        self._held[tenant] -= num_bytes
        if not self._held[tenant]:
            del self._held[tenant]


@dataclass(frozen=True, slots=True)
class Shares:
    """The limits on the open requests of one party.

    Attributes:
        per_token: Maximum number of requests per token; 0 means no limit.
        per_peer: Maximum number of requests per client address; 0 means no limit.
        separates_tokens: Whether requests of one token never find cached prefixes of another.
        places: The open requests of all parties.
        messages: The memory of the messages of all parties.
    """

    per_token: int = 0
    per_peer: int = 0
    separates_tokens: bool = False
    places: Places = field(default_factory=Places)
    messages: MessageMemory = field(default_factory=MessageMemory)

    @classmethod
    def of(cls, config: Config) -> Shares:
        """The shares that the operator configured."""
        limits, security = config.scheduler, config.security
        return cls(
            limits.max_requests_per_token,
            limits.max_requests_per_peer,
            separates_tokens=security.token_file is not None and not security.share_prefixes,
            messages=MessageMemory(limits.max_queued_bytes),
        )

    def transfer(self, kind: str, most: int, tenant: Hashable) -> AbstractContextManager[None]:
        """Count a transfer of files while the block runs; it holds open files or disk space.

        Args:
            kind: What is transferred.
            most: The maximum number of transfers of this kind. One tenant may have three quarters.
            tenant: The tenant; empty for the tenant that everybody shares, which may have all.

        Raises:
            QueueFullError: That many transfers are running already.
        """
        of_one = Limit((kind, tenant), most * 3 // 4, "TOO_MANY_CALLS_OF_TOKEN")
        return self.places.hold(Limit(kind, most, "TOO_MANY_CALLS"), *([of_one] if tenant else ()))


@dataclass(frozen=True, slots=True)
class Party:
    """The client of a request, whose requests are counted together over all protocols.

    Attributes:
        shares: The limits on its open requests.
        authorization: The header, which identifies its token.
        peer: Its address in gRPC's form, such as ``ipv4:10.0.0.1:4711``.
    """

    shares: Shares
    authorization: str | bytes | None = None
    peer: str = ""

    def hold(self) -> AbstractContextManager[None]:
        """Count a request while the block runs.

        Raises:
            QueueFullError: The party has reached its limit.
        """
        limits, shares = [], self.shares
        if shares.per_peer:
            place, param = ("peer", peer_address(self.peer)), "max_requests_per_peer"
            limits.append(Limit(place, shares.per_peer, "PEER_LIMIT_REACHED", param))
        if shares.per_token and isinstance(self.authorization, str):
            place, param = ("token", self._token), "max_requests_per_token"
            limits.append(Limit(place, shares.per_token, "TOKEN_LIMIT_REACHED", param))
        return shares.places.hold(*limits)

    @property
    def tenant(self) -> bytes:
        """An id that separates cached prefixes; empty if all requests share them."""
        is_apart = self.shares.separates_tokens and isinstance(self.authorization, str)
        return self._token if is_apart else b""

    @property
    def _token(self) -> bytes:
        # Use the token alone, so that different spellings of the header do not make one party count
        # as several.
        authorization = str(self.authorization)
        return token_digest(bearer_token(authorization) or authorization)

    @property
    def most_at_once(self) -> int:
        """The number of answers of one call that may run at once, within the party's own limit."""
        limits = (self.shares.per_token, self.shares.per_peer, MAX_AT_A_TIME)
        return min(filter(None, limits))
