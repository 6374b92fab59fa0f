"""The dense update ``ΔW`` of one module, from any method's operators.

    ΔW = B A + (w1a w1b) ⊙ (w2a w2b) + kron(w1, w2) + (g − 1) ⊙ W + W ⊙ (l − 1)ᵀ + g ⊙ W Dᵀ
         + C + W ⊙ bᵀ a + s ⊙ W_p + S + D

``W`` is the weight served. For DoRA this is ``g ⊙ (W + s·B A) − W``, as ``g`` is in ``B`` already.
"""

from __future__ import annotations

from dataclasses import fields

import torch

from turret.server.adapters.base import BaseModule
from turret.server.adapters.operators.adapter_operators import (
    AdapterOperators,
    InputBlocks,
    ModuleOperators,
)
from turret.server.adapters.operators.updates import Hadamard

# Rows of a Hadamard product made at once: two temporaries of 1024 x 14336 in fp32 are 117 MB.
_ROWS_PER_BLOCK = 1024

# What a weight update cannot be made of: operators that are not in the formula above.
_FROM_BASE = frozenset({"gain", "input_gain", "input_blocks", "pairs", "modulated"})
_WEIGHT_OPERATORS = _FROM_BASE | {
    *("low_rank", "hadamard", "kronecker", "circulant", "sparse", "dense", "bias")
}
_WORDS = {"experts": "update of experts", "attention": "prompt that layers attend to"}
_LOW_RANK_OPERATORS = frozenset({"low_rank", "bias"})


def beyond_updates(operators: AdapterOperators) -> tuple[str, ...]:
    """Names of what an adapter does beyond changing weights and biases, such as a soft prompt."""
    parts = {field.name for field in fields(operators) if field.init} - {"modules"}
    found = {name for name in parts if getattr(operators, name) is not None}
    for module in operators.modules.values():
        found |= _used(module) - _WEIGHT_OPERATORS
    return tuple(sorted(_WORDS.get(name, name.replace("_", " ")) for name in found))


def beyond_low_rank(operators: AdapterOperators) -> tuple[str, ...]:
    """Names of the operators that are no pair of factors, such as a gain."""
    found: set[str] = set()
    for module in operators.modules.values():
        found |= _used(module) - _LOW_RANK_OPERATORS
    return tuple(sorted(name.replace("_", " ") for name in found))


def is_low_rank(module: ModuleOperators) -> bool:
    """Whether ``ΔW`` is ``B A`` alone, or nothing."""
    return _used(module) <= _LOW_RANK_OPERATORS


def has_update(module: ModuleOperators) -> bool:
    """Whether there is a ``ΔW``, and not a bias alone."""
    return bool(_used(module) - {"bias"})


def _used(module: ModuleOperators) -> set[str]:
    return {field.name for field in fields(module) if getattr(module, field.name) is not None}


def add_delta(
    total: torch.Tensor, operators: ModuleOperators, module: BaseModule, weight: float = 1.0
) -> torch.Tensor:
    """Adds ``weight · ΔW`` in place.

    Args:
        total: ``[out_features, in_features]``, fp32, on the CPU.
        operators: In any dtype; computed in fp32.
        module: The base's; dequantised at most once, and only for gains.
        weight: The member's.

    Returns:
        ``total``.
    """
    low_rank, gain, input_gain = operators.low_rank, operators.gain, operators.input_gain
    if low_rank is not None:
        total.addmm_(low_rank.b.T.float(), low_rank.a.float(), alpha=weight)
    if operators.hadamard is not None:
        _add_hadamard(total, operators.hadamard, weight)
    if operators.kronecker is not None:
        w1, *w2 = (factor.float() for factor in operators.kronecker.tensors())
        total.add_(torch.kron(w1, w2[0] if len(w2) == 1 else w2[0] @ w2[1]), alpha=weight)
    if operators.circulant is not None:
        total.add_(_circulant_matrix(operators.circulant.kernel.float()), alpha=weight)
    if operators.sparse is not None:
        values, columns = operators.sparse.values.float(), operators.sparse.columns
        places = operators.sparse.rows(), columns.to(torch.int64)
        total.index_put_(places, values * weight, accumulate=True)
    if operators.dense is not None:
        total.add_(operators.dense.weight, alpha=weight)
    if _used(operators) & _FROM_BASE:
        served = module.dequantize()
        if gain is not None:
            total.addcmul_(served, (gain - 1.0)[:, None], value=weight)
        if input_gain is not None:
            total.addcmul_(served, (input_gain - 1.0)[None, :], value=weight)
        if operators.input_blocks is not None:
            _add_input_blocks(total, operators.input_blocks, served, gain, weight)
        if operators.pairs is not None:
            halves = served.unflatten(0, (-1, 2, operators.pairs.group // 2))
            others = halves.flip(1).flatten(0, 2)
            total.addcmul_(others, operators.pairs.sine[:, None], value=weight)
        if operators.modulated is not None:
            factors = operators.modulated
            _add_product(total, served, (factors.b.T, factors.a), weight)
    return total


def _add_input_blocks(
    total: torch.Tensor,
    update: InputBlocks,
    served: torch.Tensor,
    gain: torch.Tensor | None,
    weight: float,
) -> None:
    """``g ⊙ W Dᵀ``, block by block."""
    scale = weight if gain is None else weight * gain[:, None]
    for number in range(served.shape[1] // update.size):
        columns = slice(number * update.size, (number + 1) * update.size)
        block = update.blocks[min(number, len(update.blocks) - 1)].float()
        total[:, columns] += scale * (served[:, columns] @ block.T)


def _circulant_matrix(kernel: torch.Tensor) -> torch.Tensor:
    """``[out, in]``, of kernels ``[out / b, in / b, b]``: entry ``(j, i)`` is ``(i − j) mod b``."""
    places = torch.arange(kernel.shape[2])
    differences = (places[None, :] - places[:, None]) % kernel.shape[2]
    return kernel[:, :, differences].permute(0, 2, 1, 3).flatten(2).flatten(0, 1)


def _add_hadamard(total: torch.Tensor, factors: Hadamard, weight: float) -> None:
    w1a, w1b, w2a, w2b = (factor.float() for factor in factors.tensors())
    for start in range(0, total.shape[0], _ROWS_PER_BLOCK):
        rows = slice(start, start + _ROWS_PER_BLOCK)
        first, second = w1a[rows] @ w1b, w2a[rows] @ w2b
        total[rows].addcmul_(first, second, value=weight)


def _add_product(
    total: torch.Tensor,
    served: torch.Tensor,
    factors: tuple[torch.Tensor, torch.Tensor],
    weight: float,
) -> None:
    """``W ⊙ (left right)``, some rows at a time."""
    left, right = (factor.float() for factor in factors)
    for start in range(0, total.shape[0], _ROWS_PER_BLOCK):
        rows = slice(start, start + _ROWS_PER_BLOCK)
        total[rows].addcmul_(served[rows], left[rows] @ right, value=weight)


def frobenius_norm(matrix: torch.Tensor) -> float:
    """The root of the sum of all squares, summed in float64."""
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
