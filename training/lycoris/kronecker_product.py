"""The update of LoKr (LyCORIS, arXiv 2309.14859) with its gradients, factor by factor.

With ``x`` read as a matrix ``X`` of ``[in_m, in_n]``, row-major::

    y = s·kron(w1, w2) x = s·vec(w1 · X · w2ᵀ),         w2 whole, or w2a w2b

Neither ``kron(w1, w2)`` nor a decomposed ``w2`` is built, and what autograd keeps is ``x`` as it
came and the factors: the products between them are computed again on the way back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable


class KroneckerProduct(torch.autograd.Function):
    """``KroneckerProduct.apply(x, scaling, w1, *w2)``; see :func:`kronecker_product`."""

    @staticmethod
    def forward(ctx: Any, x, scaling: float, w1, *w2: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w1, *w2)
        ctx.scaling = scaling
        inner = _inner_products(x, w1, w2)[-1]
        return (w1 @ inner).flatten(-2) * scaling

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor):  # type: ignore[override]
        x, w1, *w2 = ctx.saved_tensors
        inners = _inner_products(x, w1, w2)
        grad = (grads[0] * ctx.scaling).unflatten(-1, (w1.shape[0], -1))
        grad_w1 = torch.einsum("...lk,...mk->lm", grad, inners.pop())
        inner_grad = w1.T @ grad
        grad_w2: list[torch.Tensor] = []
        # Backwards: the factor that was applied last is the first of w2.
        for factor, inner in zip(w2, reversed(inners), strict=True):
            grad_w2.append(inner_grad.flatten(0, -2).T @ inner.flatten(0, -2))
            inner_grad = inner_grad @ factor
        grad_x = inner_grad.flatten(-2).to(x.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, None, grad_w1, *grad_w2


def kronecker_product(
    x: torch.Tensor, w1: torch.Tensor, w2: tuple[torch.Tensor, ...], scaling: float
) -> torch.Tensor:
    """``s·kron(w1, w2) x`` for every row, differentiable in all but ``scaling``.

    Args:
        x: ``[..., in_m · in_n]``, any float dtype; it is kept in it and multiplied in that of the
            factors.
        w1: ``[out_l, in_m]``, any float dtype.
        w2: ``([out_k, in_n],)``, or ``([out_k, r], [r, in_n])``; dtype of ``w1``.
        scaling: ``s``.

    Returns:
        ``[..., out_l · out_k]``, dtype of ``w1``.
    """
    return KroneckerProduct.apply(x, scaling, w1, *w2)


def _inner_products(
    x: torch.Tensor, w1: torch.Tensor, w2: tuple[torch.Tensor, ...] | list[torch.Tensor]
) -> list[torch.Tensor]:
    """``X``, then ``X`` times each factor of ``w2`` from the right, ``[..., in_m, *]`` each."""
    inners = [x.to(w1.dtype).unflatten(-1, (w1.shape[1], -1))]
    for factor in reversed(w2):
        inners.append(inners[-1] @ factor.T)
    return inners
