"""Evaluates a base model, adapters and mixes on a test set, through a running server.

The results are those of the adapters as served: answers come from ``Generate`` (greedy), and
perplexities from ``Score`` on the tokens of the right answers, given the prompts.

Token F1 is SQuAD's (arXiv 1606.05250, section 6.1) on case-folded words, without punctuation and
regardless of their order. Articles stay, because answers need not be English sentences.

Intervals of proportions are Wilson's (1927, doi 10.1080/01621459.1927.10502953). Those of other
figures are percentiles of the bootstrap (Efron 1979), which draws the examples with replacement.
"""

from __future__ import annotations

import math
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from turret.clients.client import TurretClient
from turret.clients.errors import (
    AuthenticationError,
    NotFoundError,
    PermissionDeniedError,
    TurretRpcError,
    UnavailableError,
)
from turret.clients.requests import AdapterWeight
from turret.clients.results import Classification
from turret.clients.rows import EvalExample
from turret.clients.words import say
from turret.words import counted

_RESAMPLES = 1000
# The standard normal quantile with 2.5% above it.
_Z = 1.959963984540054
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure over a test set, with the bounds of its 95% interval in the same unit.

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
    """A statistic of the examples with its 95% bootstrap interval, the same in every run.

    If all draws have the same value, as for one example or for answers that are all correct, the
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
    it reaches to 16%.
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
        precision: The share of right answers among the texts for which this label was found, or
            None if there are no such texts.
        recall: The share of the texts with this label for which it was found, or None if there are
            no such texts.
        examples: The number of texts for which this label is right.
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


METRICS = ("perplexity", "exact_match", "token_f1", "label_accuracy")
# Metrics of adapters that classify, which support no others. The second tuple is for texts that may
# have several labels.
CLASS_METRICS = ("accuracy", "macro_f1")
LABEL_SET_METRICS = ("accuracy", "micro_f1", "macro_f1")
# A label applies if its probability is above this.
_THRESHOLD = 0.5
_MOST_RETRIES = 30
# Failures that do not depend on a line of the test set, so their errors do not name one.
_NOT_OF_A_LINE = (AuthenticationError, NotFoundError, PermissionDeniedError, UnavailableError)

NamedMix = tuple[AdapterWeight, ...]
# The tokens of an example: those of the prompt, and those of the right answer.
_Encoded = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    """Options of an evaluation.

    Attributes:
        metrics: Names from ``METRICS``, ``CLASS_METRICS`` or ``LABEL_SET_METRICS``.
        labels: The labels that ``label_accuracy`` looks for in an answer.
        max_tokens: Maximum number of tokens of an answer.
        concurrency: Number of simultaneous calls, which the server batches.
    """

    metrics: tuple[str, ...]
    labels: tuple[str, ...] = ()
    max_tokens: int = 128
    concurrency: int = 16


@dataclass(frozen=True, slots=True)
class Judged:
    """The result of one mix on one example.

    Attributes:
        line: The example's line in the test set.
        answer: The generated text or the label found; None if no metric needs it.
        logprob: Natural log probability of the right answer's tokens; None if not needed.
        tokens: The number of these tokens.
        scores: The score in [0, 1] for each metric of single answers.
        reference: The right answer.
        labels: The labels found and the right ones, if an example may have several; else None.
    """

    line: int
    answer: str | None
    logprob: float | None
    tokens: int
    scores: dict[str, float]
    reference: str = ""
    labels: LabelPair | None = None


@dataclass(frozen=True, slots=True)
class MixReport:
    """One mix's figures over the test set, and its examples in the file's order.

    ``labels`` are the figures of each label, if an example may have several; else empty.
    """

    mix: str
    examples: int
    metrics: dict[str, Estimate]
    judged: tuple[Judged, ...]
    labels: dict[str, LabelFigures]

    @property
    def extent(self) -> str:
        """The number of examples as text, such as ``3 examples``."""
        return counted(self.examples, "example")


def mix_name(mix: NamedMix) -> str:
    """A mix in the command line's notation; ``base`` if it is empty."""
    return "+".join(map(str, mix)) or "base"


def evaluate(
    client: TurretClient,
    examples: Sequence[EvalExample],
    mixes: Sequence[NamedMix],
    options: EvalOptions,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[MixReport]:
    """Evaluate every mix on every example; the calls of all mixes run together.

    Ctrl-C closes the client, which ends the running calls.

    Args:
        client: A client of the server.
        examples: The test set, not empty.
        mixes: The mixes; an empty one is the base model alone.
        options: The metrics and limits.
        on_progress: Called with the numbers of finished and of all examples, over all mixes; with 0
            as soon as the server has answered.

    Raises:
        TurretRpcError: A call failed; the message names the test set's line and the mix.
        ValueError: A right answer has no tokens, or an adapter predicts numbers where an example
            has several labels.
    """
    for mix in mixes:
        # Report an unknown name before the first example. Once this call has succeeded, a server
        # that cannot be reached must have gone away.
        _called(mix_name(mix), partial(client.tokenize, "a", adapters=mix))
    on_progress(0, len(examples) * len(mixes))
    with ThreadPoolExecutor(options.concurrency) as pool:
        try:
            encoded = _encode(client, pool, examples, options)
            # Order calls by example: mixes then share batches throughout.
            calls = [
                partial(_judge, client, example, tokens, mix, options)
                for example, tokens in zip(examples, encoded, strict=True)
                for mix in mixes
            ]
            judged = _run(pool, calls, on_progress)
        except BaseException as error:
            # Cancel calls that have not started. The with statement then waits only for the others.
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, KeyboardInterrupt):
                # Nobody needs the results of the running calls, so end them too.
                client.close()
            raise
    return [
        _report(mix, judged[index :: len(mixes)], options.metrics)
        for index, mix in enumerate(mixes)
    ]


def _run(
    pool: ThreadPoolExecutor,
    calls: Sequence[Callable[[], _T]],
    on_progress: Callable[[int, int], None],
) -> list[_T]:
    """Results in the order of the calls; the first failure ends the run."""
    futures = [pool.submit(call) for call in calls]
    for done, future in enumerate(as_completed(futures), start=1):
        future.result()
        on_progress(done, len(futures))
    return [future.result() for future in futures]


def _encode(
    client: TurretClient,
    pool: ThreadPoolExecutor,
    examples: Sequence[EvalExample],
    options: EvalOptions,
) -> list[_Encoded | None]:
    """The tokens of all examples; None for each if perplexity is not measured."""
    if "perplexity" not in options.metrics:
        return [None] * len(examples)
    before, after = _special_tokens(client)
    calls = [partial(_encode_one, client, each, before, after) for each in examples]
    return _run(pool, calls, lambda done, total: None)


def _special_tokens(client: TurretClient) -> tuple[int, int]:
    """The numbers of tokens that the tokenizer adds before and after any text."""
    first, second = (client.tokenize(text).token_ids for text in ("a", "b"))
    before = next((i for i, (x, y) in enumerate(zip(first, second, strict=False)) if x != y), 0)
    reversed_pairs = zip(reversed(first), reversed(second), strict=False)
    after = next((i for i, (x, y) in enumerate(reversed_pairs) if x != y), 0)
    return before, after


def _encode_one(client: TurretClient, example: EvalExample, before: int, after: int) -> _Encoded:
    def ask() -> _Encoded:
        prompt = client.tokenize(example.prompt).token_ids
        if isinstance(example.prompt, str):
            prompt = prompt[: len(prompt) - after]
        # Tokenise the answer alone, as trainers do: its first token never merges with the prompt.
        reference = client.tokenize(example.reference).token_ids
        reference = reference[before : len(reference) - after]
        if not reference:
            raise ValueError(say("ANSWER_WITHOUT_TOKENS", line=example.line))
        return prompt, reference

    return _called(f"line {example.line}", ask)


def _judge(
    client: TurretClient,
    example: EvalExample,
    encoded: _Encoded | None,
    mix: NamedMix,
    options: EvalOptions,
) -> Judged:
    place = f"line {example.line}, {mix_name(mix)}"
    logprob, answer, count = None, None, 0
    if encoded is not None:
        prompt, reference = encoded
        score = _called(place, partial(client.score, (*prompt, *reference), adapters=mix))
        scored, count = score.tokens[len(prompt) :], len(reference)
        logprob = sum(token.logprob for token in scored if token.logprob is not None)
    if not {*METRICS[1:]}.isdisjoint(options.metrics):
        length = options.max_tokens
        generate = partial(client.generate, adapters=mix, temperature=0.0, max_tokens=length)
        answer = _called(place, partial(generate, example.prompt)).text
    scores = {} if answer is None else _compare(answer, example.reference, options)
    labels = None
    if not {*LABEL_SET_METRICS}.isdisjoint(options.metrics):
        classify = partial(client.classify, [example.prompt], adapters=mix)
        (found,) = _called(place, classify).classifications
        if example.labels is None:
            answer = found.label
            scores = {"accuracy": float(answer == example.reference)}
        else:
            labels = _held(found, place), example.labels
            scores = {"accuracy": float({*labels[0]} == {*labels[1]})}
    return Judged(example.line, answer, logprob, count, scores, example.reference, labels)


def _held(found: Classification, place: str) -> tuple[str, ...]:
    probabilities = found.probabilities
    if None in probabilities.values():
        raise ValueError(say("NO_LABELS_OF_ADAPTER", place=place))
    return tuple(label for label, share in probabilities.items() if (share or 0.0) > _THRESHOLD)


def _compare(answer: str, reference: str, options: EvalOptions) -> dict[str, float]:
    scores = {
        "exact_match": lambda: exact_match(answer, reference),
        "token_f1": lambda: token_f1(answer, reference),
        "label_accuracy": lambda: float(named_label(answer, options.labels) == reference),
    }
    return {name: scores[name]() for name in options.metrics if name in scores}


def _called(place: str, call: Callable[[], _T]) -> _T:
    """The call's result; waits and retries while the server's queue is full."""
    for attempt in range(_MOST_RETRIES + 1):
        try:
            return call()
        except TurretRpcError as error:
            is_of_mix = any(each.field.startswith("adapters") for each in error.violations)
            if isinstance(error, _NOT_OF_A_LINE) or is_of_mix:
                raise
            if error.reason != "QUEUE_FULL" or attempt == _MOST_RETRIES:
                raise error.at(place) from None
            time.sleep(error.retry_delay or 1.0)
    raise AssertionError("the last attempt returns or raises")


def _report(mix: NamedMix, judged: Sequence[Judged], metrics: Sequence[str]) -> MixReport:
    figures: dict[str, Estimate] = {}
    for metric in metrics:
        part, statistic = _measure(metric, judged)
        parts = [part(each) for each in judged]
        is_mean = statistic is mean
        figures[metric] = estimate_mean(parts) if is_mean else estimate(parts, statistic)
    labels = label_figures([each.labels for each in judged if each.labels is not None])
    return MixReport(mix_name(mix), len(judged), figures, tuple(judged), labels)


def _measure(
    metric: str, judged: Sequence[Judged]
) -> tuple[Callable[[Judged], Any], Callable[[Sequence[Any]], float]]:
    """Two functions: a metric's input from one example, and its value for all of these inputs."""
    if metric == "perplexity":
        return (lambda each: (each.logprob, each.tokens)), perplexity
    of_sets = {"micro_f1": micro_f1_of_sets, "macro_f1": macro_f1_of_sets}
    if judged[0].labels is not None and metric in of_sets:
        return (lambda each: each.labels), of_sets[metric]
    if metric == "macro_f1":
        return (lambda each: ((each.answer,), (each.reference,))), macro_f1_of_sets
    return (lambda each: each.scores[metric]), mean


def gain(metric: str, before: MixReport, after: MixReport) -> Estimate:
    """How much better one mix is than another on the same examples, in the unit of the metric.

    The bootstrap interval is that of the difference: each drawn example counts with both results.
    """
    part, statistic = _measure(metric, before.judged)
    # A lower perplexity is better.
    sign = -1.0 if metric == "perplexity" else 1.0

    def difference(pairs: Sequence[tuple[Any, Any]]) -> float:
        first, second = zip(*pairs, strict=True)
        return sign * (statistic(second) - statistic(first))

    pairs = [(part(a), part(b)) for a, b in zip(before.judged, after.judged, strict=True)]
    return estimate(pairs, difference)
