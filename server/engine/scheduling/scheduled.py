"""What a step computes, as the scheduler has chosen it. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from turret.server.engine.scheduling.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Scheduled:
    """Compute ``num_new`` tokens of a sequence, from its ``num_computed`` on, with one mix.

    Those of ``draft`` come behind them: guesses at the next ones.
    """

    sequence: Sequence
    num_new: int
    draft: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        """Positions to be computed."""
        return self.num_new + len(self.draft)

    @property
    def samples(self) -> bool:
        """Whether this completes the tokens known so far, so that a next one can be drawn."""
        return self.sequence.num_computed + self.num_new == len(self.sequence.tokens)


@dataclass(frozen=True, slots=True)
class Step:
    """One engine iteration.

    Attributes:
        scheduled: What to compute.
        new_blocks: Blocks that changed owner, to be zeroed first.
        num_preempted: Sequences that lost their blocks.
        presets: Then to be filled from the sequence's adapter: its blocks from this index up to
            its ``num_preset`` positions.
    """

    scheduled: tuple[Scheduled, ...]
    new_blocks: tuple[int, ...]
    num_preempted: int
    presets: tuple[tuple[Sequence, int], ...] = ()
