"""LoHa (FedPara, arXiv 2108.06098) and LoKr (LyCORIS, arXiv 2309.14859) on 4-bit weights."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.loha import layer as loha
from peft.tuners.lokr import layer as lokr

# PEFT treats a ``Linear4bit`` as a linear layer, reads the shape of its packed weight, and adds a
# dense update of that shape. The layers here support an NF4 base (QLoRA, arXiv 2305.14314): they
# take the shape from the features and add the update as a product of its factors. PEFT does
# everything else (targets, patterns, initial values, saving and loading), so the checkpoints have
# PEFT's format.


def hadamard_product(
    x: torch.Tensor,
    w1a: torch.Tensor,
    w1b: torch.Tensor,
    w2a: torch.Tensor,
    w2b: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """``s·((w1a w1b) ⊙ (w2a w2b)) x`` for every row.

    This is the low-rank update ``s·K Q`` of rank ``r²``, with the Khatri-Rao products ``K[o, ij] =
    w1a[o, i] · w2a[o, j]`` and ``Q[ij, c] = w1b[i, c] · w2b[j, c]``. It takes ``r² (in + out)``
    products per token, which is less than ``in · out`` for every supported rank.

    Args:
        x: ``[..., in]``, any float dtype; multiplied in the factors' dtype.
        w1a: ``[out, r]``.
        w1b: ``[r, in]``.
        w2a: ``[out, r]``.
        w2b: ``[r, in]``.
        scaling: ``s``.

    Returns:
        ``[..., out]`` in the factors' dtype.
    """
    columns = (w1a[:, :, None] * w2a[:, None, :]).flatten(1)
    rows = (w1b[:, None, :] * w2b[None, :, :]).flatten(0, 1)
    return x.to(w1a.dtype) @ rows.T @ columns.T * scaling


def kronecker_product(
    x: torch.Tensor, w1: torch.Tensor, w2: tuple[torch.Tensor, ...], scaling: float
) -> torch.Tensor:
    """``s·kron(w1, w2) x`` for every row: ``s·vec(w1 · X · w2ᵀ)`` for ``x`` as a matrix ``X``.

    Args:
        x: ``[..., in_m · in_n]``, any float dtype; multiplied in the factors' dtype.
        w1: ``[out_l, in_m]``.
        w2: ``([out_k, in_n],)``, or ``([out_k, r], [r, in_n])``.
        scaling: ``s``.

    Returns:
        ``[..., out_l · out_k]`` in the factors' dtype.
    """
    inner = x.to(w1.dtype).unflatten(-1, (w1.shape[1], -1))
    for factor in reversed(w2):
        inner = inner @ factor.T
    return (w1 @ inner).flatten(-2) * scaling


class Nf4LohaLinear(loha.Linear):
    """A ``Linear4bit`` with LoHa adapters on it."""

    def create_adapter_parameters(self, adapter_name: str, r: int, shape: tuple[int, ...]) -> None:
        """Like PEFT's method, but for the shape of the weight, not that of its packed form."""
        size: Any = self.out_features, self.in_features
        super().create_adapter_parameters(adapter_name, r, size)

    def _get_delta_activations(
        self, adapter_name: str, input: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        factors = (self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b)
        w1a, w1b, w2a, w2b = (factor[adapter_name] for factor in factors)
        y = hadamard_product(input, w1a, w1b, w2a, w2b, self.scaling[adapter_name])
        return _dropped(self, adapter_name, y) if self.training else y


class Nf4LokrLinear(lokr.Linear):
    """A ``Linear4bit`` with LoKr adapters on it."""

    def _factors(self, name: str) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        # The first factor is small, so its product costs almost nothing.
        if name in self.lokr_w1:
            w1 = self.lokr_w1[name]
        else:
            w1 = self.lokr_w1_a[name] @ self.lokr_w1_b[name]
        if name in self.lokr_w2:
            return w1, (self.lokr_w2[name],)
        return w1, (self.lokr_w2_a[name], self.lokr_w2_b[name])

    def _get_delta_activations(
        self, adapter_name: str, input: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        w1, w2 = self._factors(adapter_name)
        y = kronecker_product(input, w1, w2, self.scaling[adapter_name])
        return _dropped(self, adapter_name, y) if self.training else y


def _dropped(layer: Nf4LohaLinear | Nf4LokrLinear, name: str, y: torch.Tensor) -> torch.Tensor:
    """PEFT's ``rank_dropout``: drops rows of the update (outputs), the same rows for all tokens.

    Args:
        layer: The layer.
        name: The name of the adapter.
        y: ``[..., out]``.
    """
    share = layer.rank_dropout[name]
    if not share:
        return y
    kept = (torch.rand(y.shape[-1], device=y.device) > share).to(y.dtype)
    # LoHa always keeps the mean; LoKr has a switch for it.
    is_mean_kept = layer.rank_dropout_scale.get(name, True)
    return y * (kept / kept.mean() if is_mean_kept else kept)
