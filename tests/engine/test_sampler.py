"""The sampler compared with transformers' processors and with the expected distributions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from builders.sequences import sequence_with
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from turret.server.engine.scheduling.request import StopConditions
from turret.server.engine.scheduling.sequence import Sequence
from turret.server.engine.step.sampler import Draw, Sampler

VOCAB = 50


def logits_of(seed: int = 0) -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 2.0


def draw(logits: torch.Tensor, sequence: Sequence, sampler: Sampler | None = None) -> Draw:
    return (sampler or Sampler()).draw(logits.clone().unsqueeze(0), [sequence])[0]


def drawn(logits: torch.Tensor, count: int = 400, **params: Any) -> Counter[int]:
    """The tokens of ``count`` sequences with different seeds."""
    return Counter(
        draw(logits, sequence_with(seed=seed, **params)).token_id for seed in range(count)
    )


def test_temperature_zero_is_the_likeliest_token() -> None:
    logits = logits_of()
    assert draw(logits, sequence_with(temperature=0.0)).token_id == int(logits.argmax())


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


# The exact distribution of draws, from a sweep over all uniform numbers.


NUM_UNIFORMS = 1000


class SweptSampler(Sampler):
    """Draws with 0, 1/n, 2/n, … instead of random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self._count = 0

    def _uniform(self, sequence: Sequence, ahead: int = 0) -> float:
        self._count += 1
        return (self._count - 1) / NUM_UNIFORMS


def shares(logits: torch.Tensor, **params: Any) -> torch.Tensor:
    """The share of [0, 1) that leads to each token."""
    sampler, sequence = SweptSampler(), sequence_with((7, 8, 8), **params)
    found: Counter[int] = Counter()
    for _ in range(NUM_UNIFORMS):
        (draw,) = sampler.draw(logits.clone().unsqueeze(0), [sequence])
        found[draw.token_id] += 1
    return torch.tensor([found[i] / NUM_UNIFORMS for i in range(logits.shape[0])])


def expected(logits: torch.Tensor, **params: Any) -> torch.Tensor:
    """The distribution from which transformers' ``generate`` draws."""
    steps: Any = LogitsProcessorList()
    if "repetition_penalty" in params:
        steps.append(RepetitionPenaltyLogitsProcessor(params["repetition_penalty"]))
    steps.append(TemperatureLogitsWarper(params.get("temperature", 1.0)))
    if "top_k" in params:
        steps.append(TopKLogitsWarper(params["top_k"]))
    if "top_p" in params:
        steps.append(TopPLogitsWarper(params["top_p"]))
    if "min_p" in params:
        steps.append(MinPLogitsWarper(params["min_p"]))
    ids: Any = torch.tensor([sequence_with((7, 8, 8)).tokens])
    return steps(ids, logits.clone().unsqueeze(0))[0].softmax(-1)


@pytest.mark.parametrize("scale", [0.5, 3.0])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 1},
        {"top_k": 4},
        {"top_k": 1000},
        {"top_p": 0.01},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"top_k": 6, "top_p": 0.7},
        {"top_k": 8, "min_p": 0.15, "temperature": 1.7},
        {"top_p": 0.9, "min_p": 0.1},
        {"top_k": 7, "top_p": 0.95, "min_p": 0.05, "temperature": 0.8, "repetition_penalty": 1.4},
        {"repetition_penalty": 0.7},
    ],
    ids=str,
)
def test_the_distribution_is_that_of_transformers(params: dict[str, Any], scale: float) -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3)) * scale
    found, target = shares(logits, **params), expected(logits, **params)
    assert bool((target[found > 0] > 0).all())
    assert float((found - target).abs().max()) <= 1.5 / NUM_UNIFORMS


@pytest.mark.parametrize("params", [{"top_p": 0.999}, {"top_p": 0.5}, {"top_k": 500}])
def test_flat_distributions_over_many_tokens_are_filtered_exactly(params: dict[str, Any]) -> None:
    """There are more candidates than the sampler considers first."""
    logits = torch.randn(2000, generator=torch.Generator().manual_seed(4)) * 0.01
    kept = set(expected(logits, **params).nonzero().flatten().tolist())
    found = set(shares(logits, **params).nonzero().flatten().tolist())
    assert found <= kept
    # A sweep over nearly equal tokens hits all of them, or another one in every step.
    assert len(found) >= min(len(kept), NUM_UNIFORMS) * 0.95


def test_penalties_shift_logits_by_their_definition() -> None:
    """Presence counts once, frequency per occurrence, for generated tokens (7 once, 8 twice)."""
    logits = torch.randn(12, generator=torch.Generator().manual_seed(5))
    shifted = logits.clone()
    shifted[7] -= 0.9 + 0.4 * 1
    shifted[8] -= 0.9 + 0.4 * 2
    shifted[2] += 1.5
    found = shares(logits, presence_penalty=0.9, frequency_penalty=0.4, logit_bias={2: 1.5})
    assert float((found - shifted.softmax(-1)).abs().max()) <= 1.5 / NUM_UNIFORMS
