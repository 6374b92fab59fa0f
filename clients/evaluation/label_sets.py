"""How the labels found for texts compare with the right ones, where any number of them may hold."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

# Of one text: the labels found, and the right ones, each once.
LabelPair = tuple[tuple[str, ...], tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class LabelFigures:
    """One label over a test set.

    Attributes:
        f1: ``2 TP / (2 TP + FP + FN)``, in [0, 1].
        precision: The share of right ones where it was found; None if it never was.
        recall: The share found where it is right; None if it never is.
        examples: Where it is right.
    """

    f1: float
    precision: float | None
    recall: float | None
    examples: int


def label_figures(pairs: Sequence[LabelPair]) -> dict[str, LabelFigures]:
    """Each label that is found or right anywhere, by its name."""
    both, found, right = _counts(pairs)
    return {
        label: LabelFigures(
            2 * both[label] / (found[label] + right[label]),
            both[label] / found[label] if found[label] else None,
            both[label] / right[label] if right[label] else None,
            right[label],
        )
        for label in sorted(found.keys() | right.keys())
    }


def micro_f1_of_sets(pairs: Sequence[LabelPair]) -> float:
    """F1 of all decisions together, in [0, 1]; 1 where no label is found and none is right."""
    both, found, right = _counts(pairs)
    total = found.total() + right.total()
    return 2 * both.total() / total if total else 1.0


def macro_f1_of_sets(pairs: Sequence[LabelPair]) -> float:
    """The mean over labels of each one's F1; labels that are in neither count for nothing."""
    both, found, right = _counts(pairs)
    labels = found.keys() | right.keys()
    if not labels:
        return 1.0
    return math.fsum(2 * both[each] / (found[each] + right[each]) for each in labels) / len(labels)


def _counts(pairs: Sequence[LabelPair]) -> tuple[Counter[str], Counter[str], Counter[str]]:
    both: Counter[str] = Counter()
    found: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for told, wanted in pairs:
        found.update(told)
        right.update(wanted)
        both.update({*told} & {*wanted})
    return both, found, right
