"""LoHa (FedPara, arXiv 2108.06098) and LoKr (LyCORIS, arXiv 2309.14859) on 4-bit weights."""

from __future__ import annotations

from typing import Any, NoReturn

import peft
import torch
from bitsandbytes.nn.modules import Linear4bit
from peft.tuners.loha import layer as loha
from peft.tuners.loha.model import LoHaModel
from peft.tuners.lokr import layer as lokr
from peft.tuners.lokr.layer import factorization
from peft.tuners.lokr.model import LoKrModel
from torch.autograd.function import once_differentiable

from turret.training.base_model import TrainingBase
from turret.training.methods.method import MethodSettings, PeftMethod
from turret.training.settings.checks import expand_targets, highest_loha_rank, module_sizes
from turret.training.words import say

# The update of LoHa with its gradients, in rank space.
#
# The update ``ΔW = s·(w1a w1b) ⊙ (w2a w2b)`` is the low-rank update ``s·K Q`` of rank ``r²``, with
# the row-wise and column-wise Khatri-Rao products::
#
#     K[o, ij] = w1a[o, i] · w2a[o, j]        [out, r²]
#     Q[ij, c] = w1b[i, c] · w2b[j, c]        [r², in]
#
# so ``y = s·(x Qᵀ) Kᵀ``. That takes ``r² (in + out)`` products per token, whereas ΔW takes ``in ·
# out``, which is more for every supported rank. ΔW is never built. autograd keeps ``x`` in its own
# dtype, the factors, and ``x Qᵀ`` with ``r²`` numbers per token.


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
        x: ``[..., in]``, any float dtype; kept in its own dtype, multiplied in the factors' dtype.
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


# The update of LoKr with its gradients, factor by factor. ``X`` is ``x`` as a row-major matrix
# ``[in_m, in_n]``::
#
#     y = s·kron(w1, w2) x = s·vec(w1 · X · w2ᵀ),         w2 whole, or w2a w2b
#
# Neither ``kron(w1, w2)`` nor a decomposed ``w2`` is built, and autograd keeps ``x`` in its own
# dtype and the factors: the backward pass computes the products between them again.


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
        # Go backwards: the factor that was applied last is the first of w2.
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
        x: ``[..., in_m · in_n]``, any float dtype; kept in its own dtype, multiplied in the
            factors' dtype.
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


# Layers for an NF4 base (QLoRA, arXiv 2305.14314), which PEFT lacks.
#
# PEFT treats a ``Linear4bit`` as a linear layer, reads the shape of its packed weight, and adds a
# dense update of that shape. The layers here take the shape from the features and add the update as
# a product of its factors (``hadamard_product``, ``kronecker_product``). PEFT does everything else
# (targets, patterns, initial values, saving and loading), so the checkpoints have PEFT's format.


class Nf4LohaLinear(loha.Linear):
    """A ``Linear4bit`` with LoHa adapters on it."""

    def create_adapter_parameters(self, adapter_name: str, r: int, shape: tuple[int, ...]) -> None:
        """Like PEFT's method, but for the shape of the weight, not that of its packed form.

        Raises:
            ValueError: A dense update would be cheaper than this rank; the server rejects it too.
        """
        wide, high = self.in_features, self.out_features
        assert wide is not None
        assert high is not None
        if r * r * (wide + high) >= wide * high:
            raise ValueError(say("LOHA_RANK_TOO_HIGH", rank=r, inputs=wide, outputs=high))
        super().create_adapter_parameters(adapter_name, r, (high, wide))

    def get_delta_weight(
        self, adapter_name: str, *, apply_rank_dropout: bool = False
    ) -> torch.Tensor:
        """The update as a matrix, ``[out, in]``, which only PEFT's conversions need."""
        w1a, w1b, w2a, w2b = self._factors(adapter_name)
        delta = (w1a @ w1b) * (w2a @ w2b) * self.scaling[adapter_name]
        return _dropped(self, adapter_name, delta.T).T if apply_rank_dropout else delta

    def _factors(self, name: str) -> tuple[torch.Tensor, ...]:
        factors = (self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b)
        return tuple(factor[name] for factor in factors)

    def _get_delta_activations(
        self, adapter_name: str, input: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        w1a, w1b, w2a, w2b = self._factors(adapter_name)
        y = hadamard_product(input, w1a, w1b, w2a, w2b, self.scaling[adapter_name])
        return _dropped(self, adapter_name, y) if self.training else y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        _refuse_merge()


class Nf4LokrLinear(lokr.Linear):
    """A ``Linear4bit`` with LoKr adapters on it."""

    def get_delta_weight(
        self, adapter_name: str, *, apply_rank_dropout: bool = False
    ) -> torch.Tensor:
        """The update as a matrix, ``[out, in]``, which only PEFT's conversions need."""
        w1, w2 = self._factors(adapter_name)
        whole = w2[0] @ w2[1] if len(w2) == 2 else w2[0]
        delta = torch.kron(w1, whole) * self.scaling[adapter_name]
        return _dropped(self, adapter_name, delta.T).T if apply_rank_dropout else delta

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

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        _refuse_merge()


def register_nf4_layers() -> None:
    """Make PEFT use these layers for LoHa and LoKr on a ``Linear4bit``. Idempotent."""
    # PEFT takes the first entry that fits, and a Linear4bit is also a torch.nn.Linear.
    LoHaModel.layers_mapping = {Linear4bit: Nf4LohaLinear, **LoHaModel.layers_mapping}
    LoKrModel.layers_mapping = {Linear4bit: Nf4LokrLinear, **LoKrModel.layers_mapping}


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


def _refuse_merge() -> NoReturn:
    raise NotImplementedError(
        "an adapter is not merged into 4-bit weights; load it on the plain base and merge there"
    )


register_nf4_layers()


def _own_rank(config: MethodSettings, base: TrainingBase) -> float:
    return float(config.rank)


def _loha_rank(config: MethodSettings, base: TrainingBase) -> int:
    targets = expand_targets(base.arch, config.targets)
    return max(1, min(_RANK, highest_loha_rank(tuple(module_sizes(base.arch, targets)))))


_RANK = 8


def _loha_config(config: MethodSettings, base: TrainingBase) -> peft.PeftConfig:
    return peft.LoHaConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        alpha=config.alpha,
        rank_dropout=config.dropout,
        target_modules=list(config.targets),
    )


def _lokr_config(config: MethodSettings, base: TrainingBase) -> peft.PeftConfig:
    return peft.LoKrConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        alpha=config.alpha,
        rank_dropout=config.dropout,
        target_modules=list(config.targets),
        decompose_both=config.decompose_both,
        decompose_factor=config.decompose_factor,
    )


def _decomposed_rank(config: MethodSettings, base: TrainingBase) -> int:
    """The rank to serve; 0 if PEFT decomposes no factor, so that the rank only divides alpha."""
    for _, *sides in module_sizes(base.arch, config.targets):
        if config.rank < max(factorization(side, config.decompose_factor)[1] for side in sides) / 2:
            return config.rank
    return 0


LOHA = PeftMethod(
    name="loha",
    peft_config=_loha_config,
    computed={"rank": _loha_rank, "alpha": _own_rank},
)
LOKR = PeftMethod(
    name="lokr",
    peft_config=_lokr_config,
    computed={"alpha": _own_rank},
    rank_served=_decomposed_rank,
)
