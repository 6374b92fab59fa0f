"""What a draft token is worth beside what its row costs."""

from __future__ import annotations


class StepValue:
    """Whether one more draft token in a step is worth its row.

    A step of ``r`` rows takes as long as ``fixed_rows + r`` rows alone. A draft token pays where
    its chance is higher than what a row's time brings anyhow: tokens of the step over its time. So
    one request alone drafts where one in eight tokens is right, 64 of them where nine in ten are.

    Args:
        num_rows: Rows of the step, each of which a request needs.
        fixed_rows: See ``StepCost``.
    """

    def __init__(self, num_rows: int, fixed_rows: float) -> None:
        self._tokens = float(num_rows)
        self._time = fixed_rows + num_rows

    def pays(self, chance: float) -> bool:
        """Whether a token that is right with this chance is worth its row."""
        return chance * self._time > self._tokens

    def add(self, chance: float) -> None:
        """The step has a row more, for such a token."""
        self._tokens += chance
        self._time += 1.0
