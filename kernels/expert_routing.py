"""Assigns rows to the experts of a mixture (arXiv 1701.06538) and combines the experts' results.

    p = softmax(scores)        choose the per_token experts of highest p; the lower number wins ties
    y = Σ_j p_j · expert_j(x)  in descending order of p, divided by Σ_j p_j if the model requires it

A *pair* is a row and one of its experts. Pairs are ordered by expert, so that the pairs of an
expert are one run; within a run they keep the order of the rows. A row's result does not depend on
how many other rows chose its experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from turret.kernels.rows import row_exp_
from turret.lazy_torch import torch


@dataclass(frozen=True)
class Routing:
    """The pairs of a step.

    Attributes:
        rows: The row of each pair, ``[pairs]`` int64.
        experts: The expert of each pair, ``[pairs]`` int64, ascending.
        ends: The end of each expert's pairs, ``[experts]`` int64.
        places: The positions of each row's pairs, ``[rows, per_token]`` int64, by descending
            weight.
        weights: The weights of the pairs in ``places``, ``[rows, per_token]`` fp32.
    """

    rows: torch.Tensor
    experts: torch.Tensor
    ends: torch.Tensor
    places: torch.Tensor
    weights: torch.Tensor

    @cached_property
    def runs(self) -> tuple[tuple[int, slice], ...]:
        """(Expert, its pairs) for experts that have pairs. Slow on a GPU, whose data it copies."""
        bounds = pairwise((0, *self.ends.tolist()))
        return tuple((e, slice(low, high)) for e, (low, high) in enumerate(bounds) if high > low)


def route_reference(scores: torch.Tensor, per_token: int, *, normalizes: bool) -> Routing:
    """Choose the experts of every row.

    Args:
        scores: ``[rows, experts]``, fp16, bf16 or fp32.
        per_token: The number of experts that process a row.
        normalizes: Whether a row's weights are scaled so that their sum is 1.
    """
    scores = scores.float()
    chosen = scores.sort(dim=1, descending=True, stable=True).indices[:, :per_token]
    exp = row_exp_(scores - scores.amax(1, keepdim=True))
    weights = exp.gather(1, chosen)
    weights = weights / _sum(weights if normalizes else exp)
    return sort_pairs(chosen, weights, scores.shape[1])


def sort_pairs(chosen: torch.Tensor, weights: torch.Tensor, num_experts: int) -> Routing:
    """Put pairs in the order of their experts.

    Args:
        chosen: ``[rows, per_token]`` int64.
        weights: ``[rows, per_token]`` fp32.
        num_experts: The number of experts in the layer.
    """
    per_token = chosen.shape[1]
    experts, order = chosen.flatten().sort(stable=True)
    places = torch.empty_like(order)
    places.scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    numbers = torch.arange(num_experts, device=order.device)
    ends = torch.searchsorted(experts, numbers, right=True)
    rows = order.div(per_token, rounding_mode="floor")
    return Routing(rows, experts, ends, places.view(-1, per_token), weights)


def combine_reference(y: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Sum the results of a row's experts, in fp32 and in the order of their weights; one rounding.

    Args:
        y: ``[pairs, width]``.
        routing: The pairs.

    Returns:
        ``[rows, width]``, dtype of ``y``.
    """
    total = torch.zeros(routing.places.shape[0], y.shape[1], device=y.device)
    for place, weight in zip(routing.places.unbind(1), routing.weights.unbind(1), strict=True):
        total += y.index_select(0, place).float() * weight[:, None]
    return total.to(y.dtype)


def _sum(x: torch.Tensor) -> torch.Tensor:
    """The sum of every row, ``[rows, 1]``, by halves, so that no library chooses the order."""
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        rest = x[:, 2 * half :]
        x = x[:, :half] + x[:, half : 2 * half]
        if rest.shape[1]:
            x = torch.cat((x[:, :-1], x[:, -1:] + rest), dim=1)
    return x
