"""What answers requests once the model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # Doors open before torch is loaded, which takes seconds.
    from turret.server.adapters.fuse.fuser import Fuser
    from turret.server.adapters.merge.merger import Merger
    from turret.server.adapters.registry.registry import AdapterRegistry
    from turret.server.api.vocabularies import Vocabularies
    from turret.server.engine.engine import Engine
    from turret.server.models.model_info import ModelInfo
    from turret.server.models.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """The parts of a server; ``server/build.py`` makes them.

    Attributes:
        engine: Runs requests.
        registry: Holds the adapters.
        fuser: Makes new adapters of those there are.
        merger: Merges adapters into the base.
        tokenizer: Turns text into the base model's tokens and back.
        vocabularies: Tokenizers of adapters that have their own, and the base's, and what compiles
            constraints for them.
        model_info: What clients may know of the base model.
        methods: Adapter methods that this build can load, sorted.
    """

    engine: Engine
    registry: AdapterRegistry
    fuser: Fuser
    merger: Merger
    tokenizer: Tokenizer
    vocabularies: Vocabularies
    model_info: ModelInfo
    methods: tuple[str, ...]

    def close(self) -> None:
        """Stop fusing and reading; who waits for either is told. Blocks; drain the engine first."""
        self.vocabularies.close()
        self.fuser.close()
        self.registry.close()
