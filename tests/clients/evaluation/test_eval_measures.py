"""The metrics of ``turret eval`` alone."""

from __future__ import annotations

import math

import pytest
from scipy.stats import binomtest

from turret.clients.evaluate import (
    Estimate,
    Judged,
    MixReport,
    estimate,
    estimate_mean,
    exact_match,
    gain,
    label_figures,
    macro_f1_of_sets,
    mean,
    micro_f1_of_sets,
    named_label,
    perplexity,
    token_f1,
)


@pytest.mark.parametrize(
    ("answer", "reference", "exact", "f1"),
    [
        (" Lima\n", "Lima", 1, 1),
        ("lima.", "Lima", 0, 1),
        ("the city of Lima", "Lima", 0, 0.4),
        ("a b", "b c", 0, 0.5),
        # A repeated word counts as often as it occurs in both: 2 common words, of 2 and of 3.
        ("a a", "a a b", 0, 0.8),
        ("", "Lima", 0, 0),
        ("!", "?", 0, 1),
    ],
)
def test_exact_match_and_token_f1_of_answers(answer: str, reference: str, exact: float, f1: float):
    assert exact_match(answer, reference) == exact
    assert token_f1(answer, reference) == pytest.approx(f1)


def test_the_first_label_in_an_answer_counts():
    labels = ("bug", "bug report", "praise")
    assert named_label("This is PRAISE, no bug", labels) == "praise"
    assert named_label("a bug report", labels) == "bug report"
    assert named_label("debugging", labels) is None


def test_perplexity_weights_tokens_not_texts():
    scores = [(-8.0, 8), (-4.0, 1)]
    assert perplexity(scores) == pytest.approx(math.exp(12 / 9))
    assert perplexity([(-1e9, 1)]) == math.inf


def test_intervals_contain_the_value_and_shrink_with_more_examples():
    few, many = ([0.0, 1.0] * n for n in (5, 500))
    narrow, wide = estimate(many, mean), estimate(few, mean)
    assert wide.low is not None
    assert wide.high is not None
    assert narrow.low is not None
    assert narrow.high is not None
    assert wide.low < narrow.low < narrow.value == 0.5 < narrow.high < wide.high
    # The 95% interval of the binomial distribution with 1000 examples.
    assert narrow.high - 0.5 == pytest.approx(1.96 * 0.5 / math.sqrt(1000), rel=0.15)
    assert estimate(many, mean) == narrow


@pytest.mark.parametrize("total", [1, 5, 24, 1000])
def test_the_interval_of_a_proportion_is_the_wilson_interval(total: int):
    for right in {0, 1, total // 3, total - 1, total}:
        values = [1.0] * right + [0.0] * (total - right)
        expected = binomtest(right, total).proportion_ci(0.95, method="wilson")
        found = estimate_mean(values)
        assert found.value == right / total
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
        assert found.low is not None
        assert found.high is not None
        assert found.low <= found.value <= found.high
        assert found.high - found.low > 1 / (total + 4)
    # If no example is right, the lower bound is 0; if all are, the upper bound is 1.
    assert (estimate_mean([0.0] * total).low, estimate_mean([1.0] * total).high) == (0, 1)


def test_identical_examples_give_an_interval_only_for_a_proportion():
    for values in ([0.4], [0.4] * 50):
        found = estimate_mean(values)
        assert (found.value, found.low, found.high) == (pytest.approx(0.4), None, None)
    # Scores between 0 and 1 use the bootstrap.
    assert estimate_mean([0.0, 0.4, 1.0]) == estimate([0.0, 0.4, 1.0], mean)
    # Values that differ only by rounding give no interval.
    assert estimate([(-0.1 * n, n) for n in range(1, 20)], perplexity).low is None
    assert estimate([(-1e9, 1)] * 3, perplexity) == Estimate(math.inf, None, None)
    same = [(("a",), ("a",)), (("b",), ("b",))] * 9
    assert estimate(same, macro_f1_of_sets) == Estimate(1, None, None)


def test_predicting_no_label_is_correct_if_there_is_none():
    nothing = [((), ()), ((), ())]
    assert (micro_f1_of_sets(nothing), macro_f1_of_sets(nothing)) == (1, 1)
    assert label_figures(nothing) == {}


def test_macro_f1_matches_the_textbook_formula():
    # Labels a, b, c: precision and recall 1/2 and 1, 1 and 1/3, 0 and 0.
    pairs = [("a", "a"), ("a", "b"), ("b", "b"), ("c", "b")]
    a, b = 2 * (1 / 2) / (3 / 2), 2 * (1 / 3) / (4 / 3)
    sets = [((found,), (right,)) for found, right in pairs]
    assert macro_f1_of_sets(sets) == pytest.approx((a + b + 0) / 3)
    # If each text has one label, micro F1 equals the accuracy.
    assert micro_f1_of_sets(sets) == pytest.approx(2 / 4)


def test_a_gain_is_paired_and_positive_if_the_result_improved():
    def report(scores: list[float], logprobs: list[float]) -> MixReport:
        judged = tuple(
            Judged(line, "", logprob, 1, {"exact_match": score})
            for line, (score, logprob) in enumerate(zip(scores, logprobs, strict=True))
        )
        return MixReport("mix", len(judged), {}, judged, {})

    before = report([0.0, 1.0, 0.0, 0.0] * 5, [-3.0, -1.0, -2.0, -2.0] * 5)
    after = report([1.0, 1.0, 0.0, 1.0] * 5, [-1.0, -0.5, -1.0, -1.5] * 5)
    found = gain("exact_match", before, after)
    assert found.value == 0.5
    assert found.low is not None
    assert found.high is not None
    assert 0.0 < found.low < 0.5 < found.high
    worse = gain("exact_match", after, before)
    assert (worse.value, worse.high) == (-0.5, -found.low)
    lower = gain("perplexity", before, after)
    assert lower.value == pytest.approx(math.exp(2.0) - math.exp(1.0))
    assert lower.low is not None
    assert lower.low > 0.0
    # If every draw gives the same gain, there is no interval.
    assert gain("exact_match", before, before).low is None
