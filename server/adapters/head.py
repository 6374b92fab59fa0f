"""What a classification head tells: its labels, and how its numbers become probabilities."""

from __future__ import annotations

from dataclasses import dataclass

SINGLE_LABEL = "single_label_classification"
MULTI_LABEL = "multi_label_classification"
REGRESSION = "regression"
# Values of ``problem_type`` as transformers writes them.
PROBLEM_TYPES = (SINGLE_LABEL, MULTI_LABEL, REGRESSION)
MAX_LABELS, MAX_LABEL_CHARS = 4096, 256


@dataclass(frozen=True, slots=True)
class Head:
    """A head without its weights.

    Attributes:
        labels: One for each of its numbers, in their order.
        problem_type: One of ``PROBLEM_TYPES``: exactly one label is right, any number of them are,
            or the numbers are the answer.
    """

    labels: tuple[str, ...]
    problem_type: str
