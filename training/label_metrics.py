"""How the labels found compare with the right ones, in the figures of ``turret eval --classify``.

F1 is ``2 TP / (2 TP + FP + FN)``; a label that is neither found nor right anywhere has none, and
counts for nothing in the mean.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

# Predicted and correct label indices of one example.
Judged = tuple[tuple[int, ...], tuple[int, ...]]


def label_metrics(
    judged: Sequence[Judged], labels: Sequence[str], *, is_multi_label: bool
) -> dict[str, Any]:
    """Figures over examples, each in [0, 1].

    Args:
        judged: At least one.
        labels: By number.
        is_multi_label: Whether any number of them may hold.

    Returns:
        ``accuracy`` (the share of examples with exactly the right labels) and ``macro_f1`` (the
        mean of the labels' F1); where any number may hold also ``micro_f1`` (of all decisions
        together) and ``label_f1`` (each label's, by its name).
    """
    both = Counter(label for found, right in judged for label in {*found} & {*right})
    either = Counter(label for pair in judged for side in pair for label in side)
    f1 = {label: 2 * both[label] / count for label, count in sorted(either.items())}
    figures: dict[str, Any] = {
        "accuracy": sum({*found} == {*right} for found, right in judged) / len(judged),
        # No label is found nor right anywhere: nothing is wrong.
        "macro_f1": sum(f1.values()) / len(f1) if f1 else 1.0,
    }
    if is_multi_label:
        total = either.total()
        figures["micro_f1"] = 2 * both.total() / total if total else 1.0
        figures["label_f1"] = {labels[label]: value for label, value in f1.items()}
    return figures
