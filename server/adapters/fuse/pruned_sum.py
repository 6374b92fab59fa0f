"""Weighted sums of tensors with pruning and sign election, as PEFT's ``merge_utils`` defines them.

Every tensor is asked for when it is needed and dropped before the next one, so the memory is that
of a few tensors, however many are combined. Masks are drawn in PEFT's order: from one state of
the generator, both draw the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from turret.server.adapters.fuse.combination import Combination

Task = Callable[[], torch.Tensor]


def combine(
    tasks: Sequence[Task],
    weights: Sequence[float],
    combination: Combination,
    generator: torch.Generator,
) -> torch.Tensor:
    """``Σ w_k p(t_k)``, for TIES over those entries alone whose sign won, divided by their number.

    Args:
        tasks: Return the tensors, all of one shape, fp32; may be called twice, may return views.
        weights: One per tensor.
        combination: Says how ``p`` prunes and whether signs are elected. Votes are cast by the
            unweighted tensors, as in PEFT: a negative weight does not turn a vote round.
        generator: Draws DARE's masks.

    Returns:
        A new tensor, fp32.
    """
    if combination.elects_signs:
        return _with_elected_signs(tasks, weights, combination, generator)
    total: torch.Tensor | None = None
    for task, weight in zip(tasks, weights, strict=True):
        part = _pruned(task(), combination, generator) * weight
        total = part if total is None else total.add_(part)
    assert total is not None, "a mix has members"
    return total


def _with_elected_signs(
    tasks: Sequence[Task],
    weights: Sequence[float],
    combination: Combination,
    generator: torch.Generator,
) -> torch.Tensor:
    state = generator.get_state()
    votes: torch.Tensor | None = None
    for task in tasks:
        vote = _pruned(task(), combination, generator)
        if combination.majority_sign_method == "frequency":
            vote = vote.sign()
        votes = vote.clone() if votes is None else votes.add_(vote)
    assert votes is not None, "a mix has members"
    elected = torch.where(votes >= 0, 1.0, -1.0)
    total, count = torch.zeros_like(votes), votes.zero_()
    # Draw the same masks again instead of keeping all pruned tensors in memory.
    generator.set_state(state)
    for task, weight in zip(tasks, weights, strict=True):
        part = _pruned(task(), combination, generator)
        agrees = part.sign() == elected
        total += part * weight * agrees
        count += agrees
    return total.div_(count.clamp_(min=1.0))


def _pruned(
    tensor: torch.Tensor, combination: Combination, generator: torch.Generator
) -> torch.Tensor:
    """The tensor, or a new one in which the share ``density`` of the entries is left."""
    density = combination.density
    if density is None or density >= 1.0:
        return tensor
    if combination.prunes_at_random:
        kept = torch.bernoulli(torch.full_like(tensor, density), generator=generator)
        return kept.mul_(tensor).div_(density)
    largest = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    kept = torch.zeros_like(tensor, memory_format=torch.contiguous_format)
    kept.view(-1)[largest] = 1.0
    return kept.mul_(tensor)
