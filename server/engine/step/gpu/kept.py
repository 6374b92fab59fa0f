"""What the host keeps from one decode step for the next."""

from __future__ import annotations

from dataclasses import dataclass

from turret.server.adapters.device.gpu.store import GpuAdapterStep
from turret.server.adapters.device.store import Resident
from turret.server.adapters.device.vocabulary import VocabularyGroup
from turret.server.adapters.mix import Mix
from turret.server.engine.scheduling.sequence import Sequence
from turret.server.engine.step.gpu.tables import AttentionWords


@dataclass(frozen=True, slots=True)
class Bound:
    """What the rows of a decode step do with adapters: the same until another sequence comes.

    Attributes:
        mixes: Of every row. Held, so that none is mistaken for a later one.
        adapters: What the store was asked to hold.
        version: Of the store, when the tables were loaded.
        step: The tables; None where every row is the base model's.
        embeddings: Rows whose embeddings adapters change.
        heads: Rows whose heads they change.
    """

    mixes: tuple[Mix, ...]
    adapters: tuple[Resident, ...]
    version: int
    step: GpuAdapterStep | None
    embeddings: list[VocabularyGroup]
    heads: list[VocabularyGroup]


@dataclass(frozen=True, slots=True)
class Prepared:
    """The part of a decode step that does not depend on the tokens of the step before.

    Attributes:
        sequences: One row each.
        computed: How many tokens of each are in the cache before the step.
        begins: Where the block numbers of each begin on the device.
        positions: Of every row.
        attention: What attention is told.
        numbers: How tokens are drawn; empty without a sampler.
    """

    sequences: list[Sequence]
    computed: list[int]
    begins: list[int]
    positions: list[int]
    attention: AttentionWords
    numbers: list[float]

    def fits(self, sequences: list[Sequence], begins: list[int]) -> bool:
        """Whether it is of a step of these sequences as they are now."""
        if self.sequences != sequences or self.begins != begins:
            return False
        return self.computed == [sequence.num_computed for sequence in sequences]
