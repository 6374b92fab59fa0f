"""The sampler compared with transformers' processors and with the expected distributions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from builders.sequences import sequence_with
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from turret.server.engine.scheduling.request import StopConditions
from turret.server.engine.scheduling.sequence import Sequence
from turret.server.engine.step.sampler import Draw, Sampler

VOCAB = 50


def logits_of(seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def draw(logits: torch.Tensor, sequence: Sequence, sampler: Sampler | None = None) -> Draw:
    return (sampler or Sampler()).draw(logits.clone().unsqueeze(0), [sequence])[0]


def drawn(logits: torch.Tensor, count: int = 400, **params: Any) -> Counter[int]:
    """The tokens of ``count`` sequences with different seeds."""
    return Counter(
        draw(logits, sequence_with(seed=seed, **params)).token_id for seed in range(count)
    )


def support(warped: torch.Tensor) -> set[int]:
    return set(torch.isfinite(warped[0]).nonzero().squeeze(1).tolist())


def test_temperature_zero_is_the_likeliest_token() -> None:
    logits = logits_of()
    assert draw(logits, sequence_with(temperature=0.0)).token_id == int(logits.argmax())


@pytest.mark.parametrize(
    ("params", "warper"),
    [
        ({"top_k": 5}, TopKLogitsWarper(5)),
        ({"top_p": 0.7}, TopPLogitsWarper(0.7)),
        ({"min_p": 0.1}, MinPLogitsWarper(0.1)),
    ],
)
def test_filters_keep_the_same_tokens_as_transformers(params: dict[str, Any], warper: Any) -> None:
    for seed in range(4):
        logits = logits_of(seed, scale=1.0)
        ids: Any = torch.zeros(1, 1, dtype=torch.long)
        kept = support(warper(ids, logits.unsqueeze(0).clone()))
        found = drawn(logits, **params)
        assert set(found) <= kept
        # Rare tokens may be missing by chance, but not likely ones.
        probabilities = logits.softmax(-1)
        mass = float(probabilities[sorted(kept)].sum())
        likely = {token for token in kept if float(probabilities[token]) / mass > 0.03}
        assert likely <= set(found)


def test_draws_follow_the_distribution() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.2, 1e-9]))
    found = drawn(logits, count=3000)
    for token, expected in ((0, 0.5), (1, 0.3), (2, 0.2)):
        assert abs(found[token] / 3000 - expected) < 0.04


def test_temperature_flattens() -> None:
    logits = torch.log(torch.tensor([0.9, 0.1]))
    share = drawn(logits, count=2000, temperature=2.0)[1] / 2000
    assert abs(share - 0.25) < 0.04  # sqrt(0.1) / (sqrt(0.9) + sqrt(0.1))


def test_repetition_penalty_is_that_of_transformers() -> None:
    logits = logits_of(1)
    sequence = sequence_with((7, 8), temperature=0.0, repetition_penalty=1.7, logprobs=True)
    processor = RepetitionPenaltyLogitsProcessor(1.7)
    ids: Any = torch.tensor([sequence.tokens])
    for seen in (int(logits.argmax()), 3):
        shifted = logits.clone()
        shifted[seen] = logits.max() + 0.1
        expected = int(processor(ids, shifted.unsqueeze(0).clone()).argmax())
        assert draw(shifted, sequence).token_id == expected


def test_presence_and_frequency_count_the_output_only() -> None:
    logits = torch.zeros(VOCAB)
    logits[3], logits[7], logits[8], logits[9] = 5.0, 5.2, 5.1, 4.0
    plain = sequence_with((7, 8, 8), temperature=0.0)
    assert draw(logits, plain).token_id == 7
    # 7 was drawn once, 8 twice; 3 is in the prompt and does not count.
    present = sequence_with((7, 8, 8), temperature=0.0, presence_penalty=1.0)
    assert draw(logits, present).token_id == 3
    frequent = sequence_with((7, 8, 8), temperature=0.0, frequency_penalty=0.15)
    assert draw(logits, frequent).token_id == 7


def test_bias_and_bans_apply_to_greedy_draws() -> None:
    logits = logits_of()
    best = int(logits.argmax())
    other = (best + 1) % VOCAB
    assert draw(logits, sequence_with(temperature=0.0, logit_bias={other: 100.0})).token_id == other
    for stop_token_ids, own in ((frozenset({best}), ()), (frozenset(), {best})):
        stop = StopConditions(min_tokens=2, stop_token_ids=frozenset(own))
        sequence, sampler = sequence_with(temperature=0.0, stop=stop), Sampler(stop_token_ids)
        drawn_ids = []
        for _ in range(3):
            drawn_ids.append(draw(logits, sequence, sampler).token_id)
            sequence.tokens.append(drawn_ids[-1])
        assert best not in drawn_ids[:2]
        assert drawn_ids[2] == best


class OneRow(Sampler):
    """Records the logits from which it drew."""

    def adjusted(self, logits: torch.Tensor, sequence: Sequence) -> torch.Tensor:
        rows = logits.clone().unsqueeze(0)
        self.draw(rows, [sequence])
        return rows[0]


def adjusted_one_by_one(logits: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    """Penalties and biases computed token by token, from the whole text."""
    row, params = logits.clone(), sequence.request.sampling
    for token in set(sequence.tokens):
        factor = params.repetition_penalty
        row[token] = row[token] / factor if row[token] > 0 else row[token] * factor
    for token, times in Counter(sequence.tokens[sequence.prompt_end :]).items():
        row[token] -= params.presence_penalty + params.frequency_penalty * torch.tensor(
            float(times)
        )
    for token, bias in params.logit_bias.items():
        row[token] += bias
    return row


def test_state_kept_between_steps_does_not_change_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens one by one, with a jump in between, so that the first tensors are too small."""
    monkeypatch.setattr("turret.server.engine.step.sampler._FIRST_CAPACITY", 8)
    vocab = 300
    generator = torch.Generator().manual_seed(3)
    bias = {i: float(torch.randn((), generator=generator)) * 20 for i in range(0, vocab, 3)}
    sequence = sequence_with(
        temperature=0.0,
        repetition_penalty=1.3,
        presence_penalty=0.7,
        frequency_penalty=0.1,
        logit_bias=bias,
    )
    sampler = OneRow()
    for step in range(40):
        logits = torch.randn(vocab, generator=generator) * 4
        expected = adjusted_one_by_one(logits, sequence)
        assert torch.equal(sampler.adjusted(logits, sequence), expected), step
        count = 40 if step == 20 else 1
        sequence.tokens += torch.randint(vocab, (count,), generator=generator).tolist()


class CountedBiases(dict[int, float]):
    """Counts how often it is iterated."""

    walks = 0

    def __iter__(self) -> Iterator[int]:
        self.walks += 1
        return super().__iter__()

    def values(self) -> Any:
        self.walks += 1
        return super().values()

    def items(self) -> Any:
        self.walks += 1
        return super().items()


def test_biases_are_read_once_per_request() -> None:
    biases = CountedBiases(dict.fromkeys(range(VOCAB), 0.5))
    sequence, sampler = sequence_with(temperature=0.0, logit_bias=biases), Sampler()
    draw(logits_of(), sequence, sampler)
    walks = biases.walks
    for _ in range(20):
        draw(logits_of(), sequence, sampler)
    assert biases.walks == walks > 0


def test_logprobs_are_those_of_the_unmodified_distribution() -> None:
    logits = logits_of()
    expected = logits.log_softmax(-1)
    found = draw(logits, sequence_with(temperature=0.5, top_k=1, logprobs=True, seed=1))
    assert found.logprob == pytest.approx(float(expected[found.token_id]))
    values, ids = expected.topk(2)
    assert [token for token, _ in found.top] == ids.tolist()
    assert [value for _, value in found.top] == pytest.approx(values.tolist())


def test_a_seed_repeats_and_ignores_the_batch() -> None:
    rows = torch.stack([logits_of(seed) for seed in range(5)])

    def tokens(numbers: list[int]) -> list[list[int]]:
        """Six tokens for each numbered row, drawn in one batch."""
        sampler, sequences = Sampler(), [sequence_with(seed=i) for i in numbers]
        found: list[list[int]] = [[] for _ in numbers]
        for _ in range(6):
            draws = sampler.draw(rows[numbers].clone(), sequences)
            for row, item in zip(found, draws, strict=True):
                row.append(item.token_id)
        return found

    together = tokens([0, 1, 2, 3, 4])
    assert [tokens([i])[0] for i in range(5)] == together
    assert len({tuple(row) for row in together}) > 1


def test_the_last_possible_token_absorbs_rounding() -> None:
    logits = torch.full((VOCAB,), float("-inf"))
    logits[2] = 0.0
    assert set(drawn(logits, count=20)) == {2}
    assert set(drawn(logits, count=20, top_p=0.5)) == {2}
