"""Learned weights of fused adapters, per token (AdapterFusion, arXiv 2005.00247, section 3.2).

For ``K`` frozen low-rank components with ``v_k = A_k x``, a query ``q = Wq x`` and keys ``Wk``::

    α = softmax_k(q · Wk B_k v_k)            y += Σ_k α_k B_k v_k

``Wk B_k`` is folded once at load to ``[d_k, r_k]``, so the score costs ``d_k · r_k`` per component,
and the gate sits between shrink and expand: the updates themselves are never computed twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from turret.kernels.row_linear import row_linear


def fusion_gate_reference(
    q: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, rank_indptr: Sequence[int]
) -> torch.Tensor:
    """Gate by torch products; the CPU path as well as the Triton kernel's oracle.

    Args:
        q: Queries, ``[num_rows, d_k]``, any float dtype.
        v: Rank activations of all components side by side, ``[num_rows, ranks]``, any float dtype.
        keys: ``(Wk B_k)ᵀ`` of all components, ``[ranks, d_k]``, any float dtype.
        rank_indptr: Where each component's ranks begin and end, ``[K + 1]``.

    Returns:
        ``α``, ``[num_rows, K]``, fp32. A row's bits do not depend on the other rows.
    """
    terms = row_linear(q.float(), keys.float()) * v
    members = torch.zeros(len(rank_indptr) - 1, keys.shape[0], device=q.device)
    for k in range(len(rank_indptr) - 1):
        members[k, rank_indptr[k] : rank_indptr[k + 1]] = 1.0
    scores = row_linear(terms, members)
    # Element by element over the few components: a library softmax may vectorise over rows.
    top = scores.amax(dim=1, keepdim=True)
    weights = (scores - top).exp()
    total = weights[:, :1].clone()
    for k in range(1, weights.shape[1]):
        total += weights[:, k : k + 1]
    return weights / total
