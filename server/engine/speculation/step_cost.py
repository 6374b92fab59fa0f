"""What a row costs beside a step: measured, since it differs by machine, model and compute path."""

from __future__ import annotations

# Rows that take as long as what a step takes whatever its rows, before anything was measured: a
# decode step reads all weights, and a CPU multiplies some rows meanwhile.
_FIRST = 7.0
_LEAST, _MOST = 0.5, 64.0
# Weight of a new step in the average, and the spread of rows that counts as much as the guess.
_RATE = 0.02
_SPREAD = 1.0


class StepCost:
    """A line through the decode steps of late, seconds over rows: exponentially weighted.

    Attributes:
        fixed_rows: Where the line crosses zero, in rows: what a step costs without any. Between 0.5
            and 64; 7 as long as steps of different numbers of rows are too few to tell.
    """

    def __init__(self) -> None:
        self.fixed_rows = _FIRST
        self._rows = self._seconds = self._spread = self._slope = 0.0
        self._is_first = True

    def took(self, num_rows: int, seconds: float) -> None:
        """Learn from a step that computed nothing but rows of answers."""
        if self._is_first:
            self._is_first = False
            self._rows, self._seconds = float(num_rows), seconds
            return
        # West (1979), with weights that fade.
        more_rows, more_seconds = num_rows - self._rows, seconds - self._seconds
        self._rows += _RATE * more_rows
        self._seconds += _RATE * more_seconds
        kept = 1.0 - _RATE
        self._spread = kept * (self._spread + _RATE * more_rows * more_rows)
        self._slope = kept * (self._slope + _RATE * more_rows * more_seconds)
        self._fit()

    def _fit(self) -> None:
        if self._spread <= 0.0 or self._seconds <= 0.0:
            return
        # Cost of a row by least squares. The first guess counts as observations of _SPREAD on the
        # line through the mean that ``_FIRST`` gives.
        guess = self._seconds / (_FIRST + self._rows)
        each = (self._slope + _SPREAD * guess) / (self._spread + _SPREAD)
        fixed = _MOST if each <= 0.0 else self._seconds / each - self._rows
        self.fixed_rows = min(max(fixed, _LEAST), _MOST)
