"""The gate, which is open while calls are served, and the backend behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from turret.server.basics.turns import LoopTurns
from turret.server.errors import ServerStartingError, UnavailableError
from turret.server.words import Text, say

if TYPE_CHECKING:
    from turret.server.adapters.fuser import Fuser
    from turret.server.adapters.merger import Merger
    from turret.server.adapters.registry import AdapterRegistry
    from turret.server.api.vocabularies import Vocabularies
    from turret.server.engine.engine import Engine
    from turret.server.models.describe import ModelInfo
    from turret.server.models.tokenizer import Tokenizer
    from turret.server.training.service import TrainingService


# The parts that answer requests once the model is loaded.


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """The parts of a server; ``server/build.py`` makes them.

    Attributes:
        engine: Runs requests.
        registry: Holds the adapters.
        fuser: Makes new adapters from existing ones.
        merger: Merges adapters into the base.
        tokenizer: Turns text into the base model's tokens and back.
        vocabularies: The tokenizers of the base and of adapters with their own, and the compilers
            of constraints for them.
        model_info: The information about the base model for clients.
        methods: Adapter methods that this build can load, sorted.
        training: Trains adapters; None if the server does not train.
        turns: Lets answers begin one at a time, for tenants in turn.
    """

    engine: Engine
    registry: AdapterRegistry
    fuser: Fuser
    merger: Merger
    tokenizer: Tokenizer
    vocabularies: Vocabularies
    model_info: ModelInfo
    methods: tuple[str, ...]
    training: TrainingService | None = None
    turns: LoopTurns = field(default_factory=LoopTurns)

    def close(self) -> None:
        """Stop fusing and reading. Waiting callers get an error. Blocks. Drain the engine first."""
        self.vocabularies.close()
        self.fuser.close()
        self.registry.close()


class ServingGate:
    """The gate is closed while the model loads and after shutdown begins, and open in between.

    Args:
        check: Runs before every call; raises UnavailableError while no call may be answered.
    """

    def __init__(self, check: Callable[[], None] = lambda: None) -> None:
        self._check = check
        self._backend: Backend | None = None
        self._closed_by: Text | None = None

    @property
    def is_open(self) -> bool:
        """Whether calls are served now."""
        return self._backend is not None

    def open(self, backend: Backend) -> None:
        """Serve from now on."""
        self._backend = backend

    def close(self, reason: Text) -> None:
        """Reject every further call with UNAVAILABLE and this text."""
        self._backend = None
        self._closed_by = reason

    def enter(self) -> Backend:
        """The backend.

        Raises:
            ServerStartingError: The model is not loaded yet.
            UnavailableError: The server is draining or dead, or must not answer anything now.
        """
        if self._backend is None:
            if self._closed_by is None:
                raise ServerStartingError(say("SERVER_STARTING"))
            raise UnavailableError(self._closed_by)
        self._check()
        return self._backend
