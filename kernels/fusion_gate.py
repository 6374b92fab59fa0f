"""The weights that each token gives an adapter's components, between shrink and expand.

For ``K`` frozen low-rank components with ``v_k = A_k x``, ``y += Σ_k α_k B_k v_k``. There are three
sources of ``α``. A learned fusion (AdapterFusion, arXiv 2005.00247, section 3.2) has a
query ``q = Wq x`` and keys ``Wk``::

    α = softmax_k(q · Wk B_k v_k)

``Wk B_k`` is folded to ``[d_k, r_k]`` once at load. The score then costs ``d_k · r_k`` per
component, and the updates themselves are never computed twice. A router (Arrow, arXiv 2405.11157,
section 3.2) has a prototype ``p_k`` per component, and only the ``top_k`` best share the softmax::

    α = softmax over top_k of |p_k · x| / T

X-LoRA (arXiv 2402.07148) takes ``α`` from a classifier of the token's state after a first pass.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

from turret.kernels.rows import row_exp_, row_linear
from turret.lazy_torch import torch

# Sizes are padded to multiples of this, so that fewer shapes need a trial (``rows.py``).
GATE_MULTIPLE = 16
# Maximum number of components of an adapter in the Triton kernel, whose programs hold all scores.
MAX_COMPONENTS = 64


def fusion_gate_reference(
    q: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, rank_indptr: Sequence[int]
) -> torch.Tensor:
    """Weights from queries and keys, in torch; also the oracle of the Triton kernel.

    Args:
        q: Queries, ``[num_rows, d_k]``, any float dtype.
        v: Rank activations of all components side by side, ``[num_rows, ranks]``, any float dtype.
        keys: ``(Wk B_k)ᵀ`` of all components, ``[ranks, d_k]``, any float dtype.
        rank_indptr: The beginnings and ends of the components' ranks, ``[K + 1]``. A component
            without ranks scores 0; ranks past the last end belong to no component.

    Returns:
        ``α``, ``[num_rows, K]``, fp32. A row's bits do not depend on the other rows.
    """
    members = _members(tuple(rank_indptr), v.shape[1], q.device)
    keys = _padded(keys.float(), GATE_MULTIPLE)
    terms = row_linear(_padded(q.float()), keys) * _padded(v)
    return _softmax(row_linear(terms, members)[:, : len(rank_indptr) - 1])


def routing_gate_reference(
    similarities: torch.Tensor, top_k: int, temperature: float
) -> torch.Tensor:
    """Weights from prototypes, the same on all paths.

    Args:
        similarities: ``p_k · x``, ``[num_rows, K]`` fp32.
        top_k: The number of most similar components that share a row's weight; the first ones win
            ties. All others have weight 0.
        temperature: The divisor of similarities; above 0.

    Returns:
        ``α``, ``[num_rows, K]``, fp32. A row's bits do not depend on the other rows.
    """
    scores = similarities.abs()
    return _softmax(scores / temperature, _largest(scores, top_k))


def given_gate_reference(
    logits: torch.Tensor,
    *,
    temperature: float | None,
    top_k: int | None,
    is_renormalised: bool,
) -> torch.Tensor:
    """Weights from a classifier, the same on all paths.

    Args:
        logits: ``[num_rows, K]`` fp32.
        temperature: The divisor of logits before a softmax; None for no softmax.
        top_k: The number of largest weights of a row that are kept; the first ones win ties. None
            keeps all.
        is_renormalised: Whether the kept weights other than 0 are replaced with their softmax.

    Returns:
        ``α``, ``[num_rows, K]``, fp32. A row's bits do not depend on the other rows.
    """
    gates = logits if temperature is None else _softmax(logits / temperature)
    if top_k is not None:
        gates = gates * _largest(gates, top_k)
    if not is_renormalised:
        return gates
    kept = gates != 0
    # A row of zeros stays a row of zeros.
    return torch.where(kept, _softmax(gates, kept), 0.0)


def _largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """A mask of each row's ``count`` largest scores, ``[rows, K]``; the first ones win ties."""
    order = torch.arange(scores.shape[1], device=scores.device)
    mine, other = scores[:, :, None], scores[:, None, :]
    is_before = (other > mine) | ((other == mine) & (order[None, :] < order[:, None]))
    return is_before.sum(2) < count


def _softmax(scores: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
    """Softmax over each row's kept components, which include the one with the largest score."""
    # Compute element by element: a library's softmax may vectorise over rows.
    top = scores.amax(dim=1, keepdim=True)
    weights = row_exp_(scores - top)
    if kept is not None:
        weights *= kept
    total = weights[:, :1].clone()
    for k in range(1, weights.shape[1]):
        total += weights[:, k : k + 1]
    return weights / total


def _padded(values: torch.Tensor, row_multiple: int = 1) -> torch.Tensor:
    """Append zeros: columns to a multiple of ``GATE_MULTIPLE``, rows to ``row_multiple``."""
    rows, columns = -values.shape[0] % row_multiple, -values.shape[1] % GATE_MULTIPLE
    return torch.nn.functional.pad(values, (0, columns, 0, rows)) if rows or columns else values


@functools.lru_cache(maxsize=256)
def _members(rank_indptr: tuple[int, ...], ranks: int, device: torch.device) -> torch.Tensor:
    """A matrix with 1 where a rank (column) belongs to a component (row); both are padded."""
    members = torch.zeros(len(rank_indptr) - 1, ranks, device=device)
    for k, (start, end) in enumerate(itertools.pairwise(rank_indptr)):
        members[k, start:end] = 1.0
    return _padded(members, GATE_MULTIPLE)
