"""The update of LoHa (FedPara, arXiv 2108.06098) with its gradients, in rank space.

The update ``ΔW = s·(w1a w1b) ⊙ (w2a w2b)`` is the low-rank update ``s·K Q`` of rank ``r²`` with the
row-wise and column-wise Khatri-Rao products ::

    K[o, ij] = w1a[o, i] · w2a[o, j]        [out, r²]
    Q[ij, c] = w1b[i, c] · w2b[j, c]        [r², in]

so ``y = s·(x Qᵀ) Kᵀ``. That takes ``r² (in + out)`` products a token where ΔW takes ``in · out``:
fewer for every rank that the server serves. ΔW is never built, and what autograd keeps is ``x`` as
it came, the factors, and ``x Qᵀ`` with ``r²`` numbers a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable


class HadamardProduct(torch.autograd.Function):
    """``HadamardProduct.apply(x, w1a, w1b, w2a, w2b, scaling)``; see :func:`hadamard_product`."""

    @staticmethod
    def forward(ctx: Any, x, w1a, w1b, w2a, w2b, scaling: float) -> torch.Tensor:
        u = x.to(w1a.dtype) @ _rows(w1b, w2b).T
        ctx.save_for_backward(x, w1a, w1b, w2a, w2b, u)
        ctx.scaling = scaling
        return u @ _columns(w1a, w2a).T * scaling

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor):  # type: ignore[override]
        x, w1a, w1b, w2a, w2b, u = ctx.saved_tensors
        rank = w1a.shape[1]
        grad = (grads[0] * ctx.scaling).flatten(0, -2)
        grad_u = grad @ _columns(w1a, w2a)
        grad_k = (grad.T @ u.flatten(0, -2)).unflatten(1, (rank, rank))
        grad_q = (grad_u.T @ x.to(w1a.dtype).flatten(0, -2)).unflatten(0, (rank, rank))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_u @ _rows(w1b, w2b)).view(x.shape).to(x.dtype)
        return (
            grad_x,
            torch.einsum("oij,oj->oi", grad_k, w2a),
            torch.einsum("ijc,jc->ic", grad_q, w2b),
            torch.einsum("oij,oi->oj", grad_k, w1a),
            torch.einsum("ijc,ic->jc", grad_q, w1b),
            None,
        )


def hadamard_product(
    x: torch.Tensor,
    w1a: torch.Tensor,
    w1b: torch.Tensor,
    w2a: torch.Tensor,
    w2b: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """``s·((w1a w1b) ⊙ (w2a w2b)) x`` for every row, differentiable in all but ``scaling``.

    Args:
        x: ``[..., in]``, any float dtype; it is kept in it and multiplied in that of the factors.
        w1a: ``[out, r]``, any float dtype.
        w1b: ``[r, in]``, dtype of ``w1a``.
        w2a: ``[out, r]``, dtype of ``w1a``.
        w2b: ``[r, in]``, dtype of ``w1a``.
        scaling: ``s``.

    Returns:
        ``[..., out]``, dtype of ``w1a``.
    """
    return HadamardProduct.apply(x, w1a, w1b, w2a, w2b, scaling)


def _columns(w1a: torch.Tensor, w2a: torch.Tensor) -> torch.Tensor:
    """``K``, ``[out, r²]``."""
    return (w1a[:, :, None] * w2a[:, None, :]).flatten(1)


def _rows(w1b: torch.Tensor, w2b: torch.Tensor) -> torch.Tensor:
    """``Q``, ``[r², in]``."""
    return (w1b[:, None, :] * w2b[None, :, :]).flatten(0, 1)
