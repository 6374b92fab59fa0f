"""Drafts: their origin, their lengths, and their end when they do not pay off."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turret.server.engine import speculation
from turret.server.engine.speculation import (
    MAX_DRAFT,
    MAX_MATCH,
    START,
    Drafter,
    MixMemory,
    Speculation,
    StepCost,
    StepPlan,
    TextIndex,
)


def agreement(text: Sequence[int], place: int, tail: Sequence[int]) -> int:
    count = 0
    while count < min(place, len(tail), MAX_MATCH) and text[place - 1 - count] == tail[-1 - count]:
        count += 1
    return count


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=60),
    st.integers(1, 7),
    st.lists(st.integers(0, 3), min_size=1, max_size=9),
)
@settings(max_examples=100, derandomize=True, deadline=None, database=None)
def test_the_index_finds_the_longest_match_among_recent_positions(
    text: list[int], piece: int, other: list[int]
) -> None:
    """Compare the index, which reads the text as it grows, with a search of every place."""
    tokens: list[int] = []
    index = TextIndex(tokens, most=1000)
    for start in range(0, len(text), piece):
        tokens += text[start : start + piece]
        index.read()
        for tail in (tokens, other):
            places = [p for p in range(1, len(tokens)) if tokens[p - 1] == tail[-1]][-16:]
            lengths = [agreement(tokens, place, tail) for place in places]
            place, match = index.find(tail)
            assert match == max(lengths, default=0)
            if match:
                assert place == max(p for p, n in zip(places, lengths, strict=True) if n == match)
            else:
                assert place == 0


def test_an_index_forgets_old_positions_and_finds_new_ones() -> None:
    tokens = [7, 8, 9]
    index = TextIndex(tokens, most=50)
    for number in range(1000):
        tokens.append(100 + number)
        index.read()
        assert len(index._before) <= 101
        assert len(index._latest) <= 101
    assert index.find([7, 8]) == (0, 0)
    assert index.find([100 + 990, 100 + 991]) == (3 + 992, 2)
    # For a match at the beginning of the remembered text, no earlier token is compared.
    first = tokens[index._start]
    assert index.find([first - 1, first]) == (index._start + 1, 1)


def make(
    prompt: Sequence[int],
    answer: Sequence[int] = (),
    *,
    max_tokens: int = 100,
    end_ids: frozenset[int] = frozenset(),
    start: int = 0,
    memory_key: str = "mix",
) -> Drafter:
    tokens = [-1] * start + list(prompt)
    drafter = Drafter(
        memory_key,
        tokens,
        start=start,
        prompt_end=len(tokens),
        max_tokens=max_tokens,
        end_ids=end_ids,
    )
    tokens += answer
    return drafter


def test_the_memory_of_a_mix_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculation, "_MAX_TOKENS", 20)
    memory = MixMemory()
    for number in range(200):
        memory.add([START, *range(number, number + 7)])
        assert len(memory._tokens) <= 2 * 20 + 8
    place, match = memory.find([START, 199])
    assert match == 2
    assert memory.after(place, 99) == [*range(200, 206)]
    memory.add([START, *range(1000)])
    assert len(memory._tokens) <= 2 * 20 + 29


def test_the_least_recently_used_mix_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculation, "_MAX_MEMORIES", 2)
    memory = Speculation(StepCost()).memory
    first, second = memory("a"), memory("b")
    assert memory("a") is first
    memory("c")
    assert memory("a") is first
    assert memory("b") is not second


def test_answers_of_others_are_remembered_only_if_enabled() -> None:
    for remembers in (True, False):
        speculation = Speculation(StepCost(), remembers=remembers)
        speculation.ended(make([1], [2, 3, 4, 5]))
        found = speculation.draft(make([9], [2]), speculation.plan(1), 8)
        assert bool(found) is remembers


def test_no_draft_comes_from_the_answers_of_another_memory_key() -> None:
    speculation = Speculation(StepCost())
    speculation.ended(make([1], [2, 3, 4, 5], memory_key="alice"))
    plan = speculation.plan(1)
    assert speculation.draft(make([9], [2], memory_key="bob"), plan, 8) == ()
    assert speculation.draft(make([9], [2], memory_key="alice"), plan, 8)[:2] == (3, 4)


def run(truth: Callable[[int], int], num_tokens: int, num_rows: int = 1) -> tuple[int, int, int]:
    """The steps, draft tokens and accepted tokens until an answer has this many tokens."""
    prompt = [truth(i) for i in range(64)]
    drafter = make(prompt, [truth(64)], max_tokens=num_tokens + 1)
    tokens, memory = drafter._tokens, MixMemory()
    steps = num_draft = num_right = 0
    while len(tokens) < 64 + num_tokens:
        draft = drafter.draft(memory, StepPlan(num_rows, 7.0), 99)
        right = 0
        while right < len(draft) and draft[right] == truth(len(tokens) + right):
            right += 1
        drafter.learn(right)
        tokens += [truth(len(tokens) + i) for i in range(right + 1)]
        steps, num_draft, num_right = steps + 1, num_draft + len(draft), num_right + right
    return steps, num_draft, num_right


def test_repetitive_text_takes_few_steps() -> None:
    steps, num_draft, num_right = run(lambda i: i % 20, 640)
    assert steps < 640 / 8
    assert num_right > 0.9 * num_draft


def noise(size: int) -> Callable[[int], int]:
    source = random.Random(size)
    text = [source.randrange(size) for _ in range(4096)]
    return lambda i: text[i]


@pytest.mark.parametrize("size", [2000, 300, 40])
def test_text_without_repetition_loses_little_speed(size: int) -> None:
    """A row costs an eighth of a step. Few different tokens lead to more wrong drafts."""
    steps, num_draft, _ = run(noise(size), 1000)
    assert (steps * 8 + num_draft) / (1000 * 8) < 1.02


def test_drafts_are_tried_again_after_a_while() -> None:
    plain = noise(40)
    steps, _, _ = run(lambda i: plain(i) if i < 1000 else i % 17, 2000)
    assert steps < 1000 + 1000 / 3


def test_a_wide_batch_drafts_only_likely_tokens() -> None:
    def draft(num_rows: int, sure: int) -> int:
        memory = MixMemory()
        for _ in range(sure):
            memory.own.learn(MAX_MATCH, 8, 8)
        drafter = make([*range(20), *range(8)])
        return len(drafter.draft(memory, StepPlan(num_rows, 7.0), 99))

    assert draft(1, 5) == MAX_DRAFT
    assert 0 < draft(16, 0) < draft(1, 0)
    assert draft(256, 5) == 0
    assert draft(64, 5) > draft(64, 0)


def test_the_rows_of_a_step_are_limited() -> None:
    cost = StepCost()
    cost.fixed_rows = 1e6
    speculation = Speculation(cost)
    plan = speculation.plan(80)
    drafts = [speculation.draft(make([*range(9), *range(9)]), plan, 99) for _ in range(4)]
    assert [len(draft) for draft in drafts] == [MAX_DRAFT, 1, 0, 0]
    assert speculation.draft(make([1, 2, 3, 1, 2, 3]), speculation.plan(512), 99) == ()


def test_the_cost_of_a_row_is_measured() -> None:
    source = random.Random(0)
    for fixed in (1.0, 7.0, 30.0):
        cost = StepCost()
        assert cost.fixed_rows == 7.0
        for _ in range(400):
            rows = source.choice((1, 1, 1, 4, 9, 16))
            cost.took(rows, 0.001 * (fixed + rows) * source.uniform(0.9, 1.1))
        assert fixed / 1.6 < cost.fixed_rows < fixed * 1.6, fixed
