"""The product for a sequence's rows on the GPU path, which depends only on the sequence."""

from __future__ import annotations

import pytest

from turret.server.adapters.adapter import Mix
from turret.server.engine.scheduling.request import Request
from turret.server.engine.scheduling.sequence import Scheduled, Sequence
from turret.server.engine.step.gpu.executor import is_fused, largest_step


def scheduled(prompt: int, computed: int, num_new: int) -> Scheduled:
    sequence = Sequence(Request(request_id="x", prompt_token_ids=(1,) * prompt), Mix(()), 0.0)
    sequence.num_computed = computed
    return Scheduled(sequence, num_new)


@pytest.mark.parametrize(
    ("prompt", "computed", "fused"),
    [(64, 0, True), (64, 63, True), (65, 0, False), (65, 64, False), (65, 65, True), (9, 30, True)],
)
def test_short_prompts_use_the_kernels_of_decoding_rows(prompt, computed, fused):
    """All chunks use the same kernel, because other requests determine where a prompt is cut."""
    for num_new in (1, 3):
        assert is_fused(scheduled(prompt, computed, num_new)) is fused


@pytest.mark.parametrize(("tokens", "seqs"), [(512, 64), (8192, 64), (48, 8), (4, 8)])
def test_memory_is_planned_for_a_long_prompt_beside_short_ones(tokens, seqs):
    step = largest_step(tokens, seqs, 16)
    sizes = [item.num_new for item in step.scheduled]
    assert sum(sizes) == tokens
    assert len(sizes) == min(tokens, seqs)
    assert max(sizes) == tokens - len(sizes) + 1
    # With a token budget for a GPU, some products read dequantised weights.
    assert tokens < 128 or not all(is_fused(item) for item in step.scheduled)
