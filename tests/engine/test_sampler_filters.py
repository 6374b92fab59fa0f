"""The exact distribution of draws, from a sweep over all uniform numbers."""

from __future__ import annotations

from collections import Counter
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

from turret.server.engine.scheduling.sequence import Sequence
from turret.server.engine.step.sampler import Sampler

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
    # A sweep of 1000 steps over nearly equal tokens hits at least half of them.
    assert len(found) >= min(len(kept), NUM_UNIFORMS) * 0.45


def test_penalties_shift_logits_by_their_definition() -> None:
    """Presence counts once, frequency per occurrence, for generated tokens (7 once, 8 twice)."""
    logits = torch.randn(12, generator=torch.Generator().manual_seed(5))
    shifted = logits.clone()
    shifted[7] -= 0.9 + 0.4 * 1
    shifted[8] -= 0.9 + 0.4 * 2
    shifted[2] += 1.5
    found = shares(logits, presence_penalty=0.9, frequency_penalty=0.4, logit_bias={2: 1.5})
    assert float((found - shifted.softmax(-1)).abs().max()) <= 1.5 / NUM_UNIFORMS
