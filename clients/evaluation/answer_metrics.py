"""Compares answers with the right ones, and computes intervals for means over few answers.

Token F1 is SQuAD's (arXiv 1606.05250, section 6.1) on case-folded words, without punctuation and
regardless of their order. Articles stay, because answers need not be English sentences.

Intervals of proportions are Wilson's (1927, doi 10.1080/01621459.1927.10502953). Those of other
figures are percentiles of the bootstrap (Efron 1979), which draws the examples with replacement.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

_RESAMPLES = 1000
# The standard normal quantile with 2.5 % above it.
_Z = 1.959963984540054
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure over a test set, with the bounds of its 95 % interval in the same unit.

    The bounds are None if the examples allow none; see :func:`estimate`.
    """

    value: float
    low: float | None
    high: float | None


def exact_match(answer: str, reference: str) -> float:
    """1.0 if both texts are the same except for whitespace at the ends, else 0.0."""
    return float(answer.strip() == reference.strip())


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of the common words' share in each of the two texts, in [0, 1]."""
    given, right = (Counter(re.findall(r"\w+", t.casefold())) for t in (answer, reference))
    if not given or not right:
        return float(given == right)
    common = (given & right).total()
    return 2 * common / (given.total() + right.total())


def named_label(answer: str, labels: Sequence[str]) -> str | None:
    """The first label that occurs in an answer as a whole word, ignoring case, or None.

    If several labels begin at the same position, the longest counts.
    """
    longest_first = sorted(labels, key=len, reverse=True)
    choices = "|".join(re.escape(label.casefold()) for label in longest_first)
    found = re.search(rf"(?<!\w)(?:{choices})(?!\w)", answer.casefold())
    if found is None:
        return None
    return next(label for label in labels if label.casefold() == found.group())


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean of some numbers."""
    return math.fsum(values) / len(values)


def perplexity(scores: Sequence[tuple[float, int]]) -> float:
    """``exp(-sum of logprobs / number of tokens)``; infinite if it exceeds a float's range.

    Args:
        scores: For each text, the sum of its natural log probabilities and its number of tokens.
    """
    tokens = sum(count for _, count in scores)
    try:
        return math.exp(-math.fsum(logprob for logprob, _ in scores) / tokens)
    except OverflowError:
        return math.inf


def estimate(values: Sequence[_T], statistic: Callable[[Sequence[_T]], float]) -> Estimate:
    """A statistic of the examples with its 95 % bootstrap interval, the same in every run.

    If all draws have the same value, as for one example or for answers that are all right, the
    bootstrap gives no interval, and there are no bounds.
    """
    rng = random.Random(0)
    drawn = sorted(statistic(rng.choices(values, k=len(values))) for _ in range(_RESAMPLES))
    tail = round(_RESAMPLES * 0.025)
    low, high = drawn[tail], drawn[-tail - 1]
    if math.isclose(low, high):
        return Estimate(statistic(values), None, None)
    return Estimate(statistic(values), low, high)


def estimate_mean(values: Sequence[float]) -> Estimate:
    """The mean of scores in [0, 1] with its interval: Wilson's if every score is 0 or 1.

    Otherwise the interval is the bootstrap's. Wilson's interval never has width zero: for 0 of 20,
    it reaches to 16 %.
    """
    if not {*values} <= {0.0, 1.0}:
        return estimate(values, mean)
    total, share = len(values), mean(values)
    width = _Z * math.sqrt(share * (1 - share) / total + _Z**2 / (4 * total**2))
    middle, whole = share + _Z**2 / (2 * total), 1 + _Z**2 / total
    low = 0.0 if share == 0 else (middle - width) / whole
    high = 1.0 if share == 1 else (middle + width) / whole
    return Estimate(share, low, high)


# Metrics for texts that may have several labels.

# Labels found for one text, and its right labels, without duplicates.
LabelPair = tuple[tuple[str, ...], tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class LabelFigures:
    """The figures of one label over a test set.

    Attributes:
        f1: ``2 TP / (2 TP + FP + FN)``, in [0, 1].
        precision: The share of the texts with this label found for which it is right, or None.
        recall: The share of the texts with this right label for which it was found, or None.
        examples: The number of texts for which it is right.
    """

    f1: float
    precision: float | None
    recall: float | None
    examples: int


def label_figures(pairs: Sequence[LabelPair]) -> dict[str, LabelFigures]:
    """Figures for each label that was found or is right for some text, by the label's name."""
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
    """F1 of all decisions together, in [0, 1]; 1 if no label was found and none is right."""
    both, found, right = _counts(pairs)
    total = found.total() + right.total()
    return 2 * both.total() / total if total else 1.0


def macro_f1_of_sets(pairs: Sequence[LabelPair]) -> float:
    """The mean F1 over all labels; labels that occur on neither side are ignored."""
    figures = label_figures(pairs).values()
    return mean([each.f1 for each in figures]) if figures else 1.0


def _counts(pairs: Sequence[LabelPair]) -> tuple[Counter[str], Counter[str], Counter[str]]:
    both: Counter[str] = Counter()
    found: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for predicted, wanted in pairs:
        found.update(predicted)
        right.update(wanted)
        both.update({*predicted} & {*wanted})
    return both, found, right
