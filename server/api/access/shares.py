"""Limits on a party's open requests, and whose cached prefixes a party may use."""

from __future__ import annotations

import contextlib
import resource
import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from hashlib import blake2b

from turret.server.api.access.tokens import bearer_token, token_digest
from turret.server.config import Config
from turret.server.errors import QueueFullError
from turret.server.words import say

# Limits on connections, which leave enough descriptors for files.

# Limit of one listening address. A connection costs a descriptor and, with TLS, tens of KB.
MOST_CONNECTIONS = 4096
# Descriptors kept free of connections, for files of adapters and uploads, the log and the model.
RESERVED_DESCRIPTORS = 512
# A server with fewer descriptors than the reserve still accepts this many connections.
_LEAST_CONNECTIONS = 16


def most_connections(num_doors: int) -> int:
    """The limit for each of ``num_doors`` listening addresses; connections beyond it are closed.

    All doors together leave ``RESERVED_DESCRIPTORS``. The process's soft limit of descriptors is
    raised for that, as far as the hard one allows.
    """
    wanted = num_doors * MOST_CONNECTIONS + RESERVED_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    share = (soft - RESERVED_DESCRIPTORS) // num_doors
    return max(min(share, MOST_CONNECTIONS), _LEAST_CONNECTIONS)


_RETRY_SECONDS = 1.0
# How many requests of one call the engine gets at a time: a list of a thousand prompts must not
# fill the queue that others wait in.
MAX_AT_A_TIME = 64
# Keeps salts unpredictable outside this process, even for somebody who knows the tokens.
_SECRET = secrets.token_bytes(32)


def peer_address(peer: str) -> str:
    """The address of a gRPC peer without its port: ``ipv4:10.0.0.1``; a unix socket is one peer."""
    return peer.rpartition(":")[0] if peer.startswith("ip") else peer.partition(":")[0]


def salt_of(tenant: bytes, asked: str) -> bytes:
    """The salt of a request's cached blocks; empty if every request may use them.

    Args:
        tenant: See ``Shares.tenant``.
        asked: The ``cache_salt`` that the request carries, or nothing.
    """
    if not tenant and not asked:
        return b""
    return blake2b(tenant + asked.encode(), digest_size=16, key=_SECRET).digest()


class Shares:
    """Counts open requests by bearer token and by client address. Belongs to one event loop.

    Args:
        per_token: Most of one token; 0 is no limit.
        per_peer: Most of one client address; 0 is no limit.
        separates_tokens: Whether the requests of one token find no cached prefix of another's.
    """

    def __init__(
        self, per_token: int = 0, per_peer: int = 0, *, separates_tokens: bool = False
    ) -> None:
        self._separates_tokens = separates_tokens
        self._limits = {"token": per_token, "peer": per_peer}
        self._open: Counter[tuple[str, str]] = Counter()

    @property
    def least(self) -> int:
        """The most that any party may have open at once; 0 is no limit."""
        return min((limit for limit in self._limits.values() if limit), default=0)

    @classmethod
    def of(cls, config: Config) -> Shares:
        """The shares that the operator configured."""
        limits, security = config.scheduler, config.security
        return cls(
            limits.max_requests_per_token,
            limits.max_requests_per_peer,
            separates_tokens=security.token_file is not None and not security.share_prefixes,
        )

    def tenant(self, authorization: str | bytes | None) -> bytes:
        """Identifies whose cached prefixes a request may use; empty if all requests share them."""
        if not self._separates_tokens or not isinstance(authorization, str):
            return b""
        return _token_name(authorization)

    @contextlib.contextmanager
    def hold(self, authorization: str | bytes | None, peer: str) -> Iterator[None]:
        """Count a request while the block runs.

        Args:
            authorization: The header; it tells whose the request is.
            peer: Where the client is, as gRPC says it: ``ipv4:10.0.0.1:4711``.

        Raises:
            QueueFullError: The token or the address has as many as it may.
        """
        parties = [("peer", peer_address(peer))]
        if isinstance(authorization, str):
            parties.append(("token", _token_name(authorization).hex()))
        limited = [party for party in parties if self._limits[party[0]]]
        for party in limited:
            limit = self._limits[party[0]]
            if self._open[party] >= limit:
                said = (
                    say("TOKEN_LIMIT_REACHED", max_requests_per_token=limit)
                    if party[0] == "token"
                    else say("PEER_LIMIT_REACHED", max_requests_per_peer=limit)
                )
                raise QueueFullError(said, retry_after_seconds=_RETRY_SECONDS)
        self._open.update(limited)
        try:
            yield
        finally:
            for party in limited:
                self._open[party] -= 1
                if not self._open[party]:
                    del self._open[party]


def _token_name(authorization: str) -> bytes:
    # Use the token alone, so that spellings of the header do not turn one party into several.
    return token_digest(bearer_token(authorization) or authorization)


@dataclass(frozen=True, slots=True)
class Party:
    """The client of a request, whose requests are counted together; see ``Shares.hold``."""

    shares: Shares
    authorization: str | bytes | None = None
    peer: str = ""

    def hold(self) -> AbstractContextManager[None]:
        """Count a request while the block runs.

        Raises:
            QueueFullError: The party has as many as it may.
        """
        return self.shares.hold(self.authorization, self.peer)

    @property
    def tenant(self) -> bytes:
        """See ``Shares.tenant``."""
        return self.shares.tenant(self.authorization)

    @property
    def most_at_once(self) -> int:
        """How many answers of one call the engine gets at once, within the party's own limit."""
        return min(self.shares.least or MAX_AT_A_TIME, MAX_AT_A_TIME)
