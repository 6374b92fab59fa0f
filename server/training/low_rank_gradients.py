"""Gradients of adapters with only low-rank updates, by compiled kernels.

For one module, with ``z = a x`` and ``dz = b dy``::

    da = dzᵀ x        db = zᵀ dy        dx += dz a

All modules of a projection and all segments are computed together, in fp32. The order of each sum
depends on the segment alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from turret.kernels.cpu.products import ProductBatch
from turret.server.adapters.operators.adapter_operators import ModuleOperators
from turret.server.adapters.operators.low_rank import LowRank


def is_low_rank(module: ModuleOperators) -> bool:
    """Whether a module has a low-rank update and nothing else."""
    return len(module.operators) == 1 and isinstance(module.operators[0], LowRank)


@dataclass(slots=True)
class LowRankGradients:
    """The updates of one segment in the modules of one projection.

    Attributes:
        x: The input, ``[rows, in]``.
        rows: Its rows in the pass.
        parts: For each adapted module, the leaves ``a`` and ``b``, and the gradient of the result,
            ``[rows, out]`` fp32.
    """

    x: torch.Tensor
    rows: slice
    parts: Sequence[tuple[Sequence[torch.Tensor], torch.Tensor]]


def add_low_rank_gradients(segments: Sequence[LowRankGradients], of_input: torch.Tensor) -> None:
    """Add the gradients to those of the leaves and to that of the projection's input.

    Args:
        segments: The updates of separate rows.
        of_input: ``[rows, in]`` fp32.
    """
    if not segments:
        return
    first, second = ProductBatch(), ProductBatch()
    shrunk = []
    for each in segments:
        factors = [a.detach() for (a, _), _ in each.parts]
        a = factors[0] if len(factors) == 1 else torch.cat(factors)
        # The activations of all ranks, and their gradients: [ranks, rows].
        z, of_z = torch.empty(2, len(a), len(each.x))
        first.dots(a, each.x, z)
        start = 0
        for (_, b), grad in each.parts:
            first.dots(b.detach(), grad, of_z[start : start + len(b)])
            start += len(b)
        shrunk.append((a, z, of_z))
    first.run()
    kept, found = [], []
    for each, (a, z, of_z) in zip(segments, shrunk, strict=True):
        of_a, turned = torch.empty(a.shape), of_z.T.contiguous()
        kept.append(turned)
        second.columns(of_z, each.x, of_a)
        second.columns(turned, a, of_input[each.rows], adds=True)
        start = 0
        for (leaf_a, leaf_b), grad in each.parts:
            ranks = slice(start, start + len(leaf_b))
            of_b = torch.empty(leaf_b.shape)
            second.columns(z[ranks], grad, of_b)
            found += [(leaf_a, of_a[ranks]), (leaf_b, of_b)]
            start = ranks.stop
    second.run()
    for leaf, more in found:
        leaf.grad = more if leaf.grad is None else leaf.grad.add_(more)
