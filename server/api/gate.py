"""Whether RPCs are served now, and by what."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from turret.server.engine.request import Output, Request
from turret.server.errors import UnavailableError


class StreamLike(Protocol):
    """One request's outputs; see ``turret.server.engine.engine.Stream``."""

    def __aiter__(self) -> AsyncIterator[Output]: ...
    def cancel(self) -> None: ...


class EngineLike(Protocol):
    """The part of the engine that RPCs use."""

    async def submit(self, request: Request) -> StreamLike: ...


class TokenizerLike(Protocol):
    """The part of the tokenizer that RPCs use."""

    def encode(self, text: str) -> list[int]: ...
    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]: ...
    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str: ...
    def token_text(self, token_id: int) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """What answers RPCs once the model is loaded."""

    engine: EngineLike
    registry: Any
    merger: Any
    tokenizer: TokenizerLike
    model_info: Any
    methods: tuple[str, ...] = ()


class Gate:
    """Closed while the model loads and from shutdown on; open in between."""

    def __init__(self) -> None:
        self._backend: Backend | None = None
        self._reason = "the server is starting: the model is not loaded yet"

    def open(self, backend: Backend) -> None:
        """Serve from now on."""
        self._backend = backend

    def close(self, reason: str) -> None:
        """Refuse every further RPC with UNAVAILABLE and this text."""
        self._backend = None
        self._reason = reason

    def enter(self) -> Backend:
        """The backend.

        Raises:
            UnavailableError: The server is starting, draining or dead.
        """
        if self._backend is None:
            raise UnavailableError(self._reason)
        return self._backend
