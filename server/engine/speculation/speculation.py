"""Drafts for a step: which sequences get how many tokens to check."""

from __future__ import annotations

from turret.server.engine.speculation.drafter import Drafter
from turret.server.engine.speculation.memory import Memories
from turret.server.engine.speculation.step_cost import StepCost
from turret.server.engine.speculation.step_value import StepValue

# Rows of a step, drafts included, beyond which nothing is guessed: its rows cost computing, and
# every draft row makes logits of the whole vocabulary.
_MAX_ROWS = 96


class Speculation:
    """What is known of costs and chances, for all sequences. Used by the engine thread alone.

    Args:
        cost: Of a step's rows.
        remembers: Whether answers are guessed from earlier ones with the same memory key too.
    """

    def __init__(self, cost: StepCost, *, remembers: bool = True) -> None:
        self._cost = cost
        self._remembers = remembers
        self._memories = Memories()

    def plan(self, num_rows: int) -> StepPlan:
        """Begin the drafts of a step.

        Args:
            num_rows: Rows that it computes in any case.
        """
        return StepPlan(self._memories, StepValue(num_rows, self._cost.fixed_rows), num_rows)

    def ended(self, drafter: Drafter) -> None:
        """A sequence has run to its end."""
        if self._remembers:
            drafter.end(self._memories.of(drafter.memory_key))


class StepPlan:
    """The drafts of one step.

    Args:
        memories: What earlier answers were.
        value: Of the step.
        num_rows: Its rows without drafts.
    """

    def __init__(self, memories: Memories, value: StepValue, num_rows: int) -> None:
        self._memories = memories
        self._value = value
        self._num_rows = num_rows

    def draft(self, drafter: Drafter, most: int) -> tuple[int, ...]:
        """At most so many tokens for the step to check for a sequence; often none."""
        most = min(most, _MAX_ROWS - self._num_rows)
        if most <= 0:
            return ()
        draft = drafter.draft(self._memories.of(drafter.memory_key), self._value, most)
        self._num_rows += len(draft)
        return draft
