"""Acceptance of draft tokens; each token is drawn as if it were alone."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from builders.sequences import sequence_with

from turret.server.engine.scheduling.request import StopConditions
from turret.server.engine.scheduling.sequence import Scheduled, Sequence
from turret.server.engine.step.runner import draw_tokens
from turret.server.engine.step.sampler import NO_MASKS, Adjustment, Draw, Sampler

VOCAB = 40
ENDS = frozenset({3})
PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0, "seed": 3},
    "filtered": {"temperature": 0.7, "seed": 4, "top_k": 9, "top_p": 0.8, "min_p": 0.01},
    "penalised": {
        "temperature": 0.0,
        "repetition_penalty": 2.0,
        "presence_penalty": 1.0,
        "frequency_penalty": 0.5,
    },
    "biased": {"temperature": 0.9, "seed": 5, "logit_bias": {4: 2.0}, "frequency_penalty": -0.5},
    "long": {
        "temperature": 0.0,
        "stop": StopConditions(min_tokens=5, stop_token_ids=frozenset({7})),
    },
}


def rows_of(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3.0 * torch.randn(count, VOCAB, generator=generator)


def one_by_one(sequence: Sequence, rows: torch.Tensor) -> list[Draw]:
    """The tokens that separate steps for each row draw."""
    sampler, draws = Sampler(ENDS), list[Draw]()
    for row in rows:
        (draw,) = sampler.draw(row.clone().unsqueeze(0), [sequence])
        draws.append(draw)
        sequence.tokens.append(draw.token_id)
    return draws


def make(name: str) -> Sequence:
    return sequence_with((5, 5, 9), logprobs=True, **PARAMS[name])


@pytest.mark.parametrize("num_right", [0, 1, 4])
def test_drafts_are_sampled_as_if_tokens_came_one_by_one(num_right: int) -> None:
    """A step with all kinds of requests, one of them without a draft."""
    items, expected, logits = [], [], []
    for number, name in enumerate(PARAMS):
        rows = rows_of(5, number)
        truth = one_by_one(make(name), rows)
        tokens = [draw.token_id for draw in truth]
        draft = (*tokens[:num_right], (tokens[num_right] + 1) % VOCAB, 0, 0, 0)[:4]
        if name == "biased":
            draft = ()
        items.append(Scheduled(make(name), 1, draft))
        count = 1 + min(num_right, len(draft))
        expected.append(truth[:count])
        logits.append(rows[: 1 + len(draft)])
    sampler = Sampler(ENDS)
    before = [list(item.sequence.tokens) for item in items]
    drawn = draw_tokens(sampler, torch.cat(logits), items, NO_MASKS)
    assert drawn == expected
    assert [item.sequence.tokens for item in items] == before
    # A step that is repeated because memory ran out draws the same tokens.
    assert draw_tokens(sampler, torch.cat(logits), items, NO_MASKS) == expected
    # The next step continues from there.
    for item, draws, name in zip(items, drawn, PARAMS, strict=True):
        item.sequence.tokens += [draw.token_id for draw in draws]
        alone = make(name)
        alone.tokens[:] = item.sequence.tokens
        row = rows_of(1, 99)
        (next_draw,) = sampler.draw(row.clone(), [item.sequence])
        assert next_draw == Sampler(ENDS).draw(row.clone(), [alone])[0], name


def test_bans_end_in_the_middle_of_a_draft() -> None:
    rows = torch.full((4, VOCAB), -1.0)
    rows[:, 3], rows[:, 8] = 5.0, 4.0
    sequence = sequence_with((8,), temperature=0.0, stop=StopConditions(min_tokens=3))
    (draws,) = draw_tokens(Sampler(ENDS), rows, [Scheduled(sequence, 1, (8, 8, 8))], NO_MASKS)
    assert [draw.token_id for draw in draws] == [8, 8, 3]


def test_steps_without_drafts_sample_all_rows_at_once() -> None:
    calls: list[int] = []
    draw = Sampler.draw

    def counted(sampler: Sampler, logits: torch.Tensor, *args: Any) -> list[Draw]:
        calls.append(len(logits))
        return draw(sampler, logits, *args)

    items = [Scheduled(sequence_with(temperature=0.0), 1) for _ in range(3)]
    with patch.object(Sampler, "draw", counted):
        draws = draw_tokens(Sampler(), rows_of(3, 1), items, NO_MASKS)
    assert list(map(len, draws)) == [1, 1, 1]
    assert calls == [3]


def test_token_counts_match_the_text_after_a_step_is_recomputed() -> None:
    """Tokens that are drawn differently in the repetition are not counted."""
    sequence = sequence_with((5, 5), temperature=0.0, frequency_penalty=1.0)
    adjustment = Adjustment(sequence, frozenset(), torch.device("cpu"))

    def counts(drawn: tuple[int, ...] = ()) -> dict[int, float]:
        row = torch.zeros(VOCAB)
        adjustment.apply(row, drawn)
        return {token: float(-row[token]) for token in row.nonzero().flatten().tolist()}

    assert counts((5, 6)) == {5: 3.0, 6: 1.0}
    assert counts((5, 6)) == {5: 3.0, 6: 1.0}
    assert counts() == {5: 2.0}
    assert counts((7,)) == {5: 2.0, 7: 1.0}
    sequence.tokens.append(7)
    assert counts() == {5: 2.0, 7: 1.0}
