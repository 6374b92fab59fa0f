"""The forecast of answers' lengths, and the work that it saves the scheduler."""

from __future__ import annotations

import random
from collections.abc import Sequence as SequenceOf

import pytest
from builders.sequences import advance, make_scheduler, sequence_of
from hypothesis import given
from hypothesis import strategies as st

from turret.server.engine.scheduling.scheduler import LengthForecast, Scheduler
from turret.server.engine.scheduling.sequence import Sequence, SequenceState


def answered(count: int, prompt: int = 3, max_tokens: int = 10_000) -> Sequence:
    sequence = sequence_of(range(prompt), max_tokens=max_tokens)
    sequence.tokens += [1] * count
    return sequence


def forecast_of(lengths: SequenceOf[int]) -> LengthForecast:
    forecast = LengthForecast()
    for length in lengths:
        forecast.ended(answered(length))
    return forecast


def test_without_earlier_answers_there_is_no_forecast() -> None:
    assert LengthForecast().tokens_left(answered(0)) == 0
    assert LengthForecast().peak_tokens([answered(0)], 16) == 0


def test_the_forecast_is_the_length_of_an_earlier_answer() -> None:
    forecast = forecast_of([10, 20, 30])
    assert {forecast.tokens_left(answered(0)) for _ in range(100)} == {10, 20, 30}
    assert {forecast.tokens_left(answered(15)) for _ in range(100)} == {5, 15}
    # The answer is longer than all earlier ones, so no further tokens are expected.
    assert forecast.tokens_left(answered(30)) == 0


def test_a_forecast_stays_until_it_is_wrong() -> None:
    forecast = forecast_of([10, 40])
    sequence = next(s for s in map(answered, [0] * 100) if forecast.tokens_left(s) == 10)
    for left in range(9, 0, -1):
        sequence.tokens.append(1)
        assert forecast.tokens_left(sequence) == left
    sequence.tokens.append(1)
    assert forecast.tokens_left(sequence) == 30


def test_a_forecast_never_exceeds_max_tokens() -> None:
    forecast = forecast_of([10, 20, 30])
    lefts = {forecast.tokens_left(answered(2, max_tokens=12)) for _ in range(100)}
    assert lefts == {8, 10}


def test_a_scored_prompt_neither_grows_nor_changes_the_forecast() -> None:
    forecast = LengthForecast()
    scored = sequence_of(range(5), score=True)
    forecast.ended(scored)
    assert forecast.peak_tokens([answered(0)], 16) == 0
    assert forecast_of([7]).tokens_left(scored) == 0


def test_old_answers_are_forgotten() -> None:
    forecast = forecast_of([1000] * 100 + [5] * 64)
    assert {forecast.tokens_left(answered(0)) for _ in range(100)} == {5}


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), min_size=1, max_size=12))
def test_the_peak_matches_a_simulation_of_every_step(spans: list[tuple[int, int]]) -> None:
    # No finished answer was longer than one token, so an answer with one token ends now.
    forecast = forecast_of([1])
    sequences = [answered(0 if left else 1, prompt) for prompt, left in spans]
    for sequence, (_, left) in zip(sequences, spans, strict=True):
        sequence.forecast = left
    lengths = [(len(s.tokens), left) for s, (_, left) in zip(sequences, spans, strict=True)]
    held = [
        sum(tokens + step for tokens, left in lengths if left >= step)
        for step in range(max(left for _, left in spans) + 1)
    ]
    # This count ignores blocks, and thus their unused parts.
    assert forecast.peak_tokens(sequences, 0) == max(held)
    rounded = forecast.peak_tokens(sequences, 16)
    assert max(held) + 8 <= rounded <= max(held) + 8 * len(spans)


def run(scheduler: Scheduler, sequence: Sequence) -> None:
    scheduler.add(sequence)
    while sequence.state is not SequenceState.FINISHED:
        advance(scheduler)


def scheduler_after(lengths: SequenceOf[int]) -> Scheduler:
    """A scheduler with 19 blocks of 4 that has seen answers of these lengths."""
    scheduler = make_scheduler(20)
    for length in lengths:
        run(scheduler, sequence_of([1], "before", max_tokens=length))
    return scheduler


@pytest.mark.parametrize(("history", "together"), [([], 2), ([40], 1), ([8], 2)])
def test_a_request_that_would_be_preempted_later_is_not_admitted(
    history: list[int], together: int
) -> None:
    """Two prompts of 16 tokens fit with answers of 12 tokens each, but not with answers of 40."""
    scheduler = scheduler_after(history)
    first, second = (sequence_of(range(16), name, max_tokens=40) for name in "ab")
    scheduler.add(first)
    scheduler.add(second)
    advance(scheduler)
    assert len(scheduler.running) == together
    while first.state is not SequenceState.FINISHED:
        advance(scheduler)
    advance(scheduler)
    assert second.state is SequenceState.RUNNING


def test_requests_with_short_limits_are_admitted() -> None:
    scheduler = scheduler_after([40])
    for name in "ab":
        scheduler.add(sequence_of(range(16), name, max_tokens=8))
    advance(scheduler)
    assert len(scheduler.running) == 2


def test_a_lone_sequence_is_admitted_whatever_its_forecast() -> None:
    scheduler = scheduler_after([60])
    only = sequence_of(range(40), "a", max_tokens=1000)
    scheduler.add(only)
    advance(scheduler)
    assert only.state is SequenceState.RUNNING


def test_blocks_that_are_shared_are_counted_once() -> None:
    """Four prompts with the same beginning hold 10 + 4 of 19 blocks, not 44."""
    scheduler = scheduler_after([1])
    run(scheduler, sequence_of(range(41), "a", max_tokens=1))
    for last in range(4):
        scheduler.add(sequence_of([*range(40), last], "a", max_tokens=2))
    advance(scheduler)
    assert len(scheduler.running) == 4
    assert scheduler.blocks.num_active == 14


def test_a_forecast_reduces_recomputation(monkeypatch: pytest.MonkeyPatch) -> None:
    """With more requests than fit, compare the recomputed tokens with and without a forecast."""

    def serve() -> tuple[int, int]:
        random.seed(0)
        scheduler = make_scheduler(300, max_num_seqs=64)
        for number in range(150):
            prompt = [random.randrange(1000) for _ in range(random.randint(2, 128))]
            scheduler.add(sequence_of(prompt, f"{number % 40}", random.randint(2, 128)))
        tokens = preemptions = 0
        while scheduler.has_work:
            step = advance(scheduler)
            tokens += sum(item.num_new for item in step.scheduled)
            preemptions += step.num_preempted
        return tokens, preemptions

    tokens, preemptions = serve()
    monkeypatch.setattr(Scheduler, "_will_run_out", lambda *_: False)
    greedy_tokens, greedy_preemptions = serve()
    assert preemptions < greedy_preemptions / 2
    assert tokens < 0.9 * greedy_tokens
