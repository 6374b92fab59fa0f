"""The dense update ``ΔW`` of one module: the sum of its operators' dense forms.

For DoRA this is ``g ⊙ (W + s·B A) − W``, as ``g`` is in ``B`` already.
"""

from __future__ import annotations

from dataclasses import fields

from turret.lazy_torch import torch
from turret.server.adapters.base import BaseModule
from turret.server.adapters.operators.adapter_operators import AdapterOperators, ModuleOperators
from turret.server.adapters.operators.low_rank import LowRank
from turret.server.adapters.operators.operator import Operator, ServedWeight
from turret.server.adapters.operators.vectors import Bias

_WORDS = {"experts": "update of experts", "attention": "prompt that layers attend to"}


def beyond_updates(operators: AdapterOperators) -> tuple[str, ...]:
    """Names of what an adapter does beyond changing weights and biases, such as a soft prompt."""
    parts = {field.name for field in fields(operators) if field.init} - {"modules"}
    found = {name for name in parts if getattr(operators, name) is not None}
    for module in operators.modules.values():
        found |= {part.name for part in module.operators if not part.has_dense}
    return tuple(sorted(_WORDS.get(name, name.replace("_", " ")) for name in found))


def beyond_low_rank(operators: AdapterOperators) -> tuple[str, ...]:
    """Names of the operators that are no pair of factors, such as a gain."""
    found = {part.name for module in operators.modules.values() for part in _others(module)}
    return tuple(sorted(name.replace("_", " ") for name in found))


def is_low_rank(module: ModuleOperators) -> bool:
    """Whether ``ΔW`` is ``B A`` alone, or nothing."""
    return not _others(module)


def has_update(module: ModuleOperators) -> bool:
    """Whether the module has a ``ΔW``, not only a bias."""
    return any(not isinstance(part, Bias) for part in module.operators)


def _others(module: ModuleOperators) -> list[Operator]:
    return [part for part in module.operators if not isinstance(part, LowRank | Bias)]


def add_delta(
    total: torch.Tensor, operators: ModuleOperators, module: BaseModule, weight: float = 1.0
) -> torch.Tensor:
    """Adds ``weight · ΔW`` in place.

    Args:
        total: ``[out_features, in_features]``, fp32, on the CPU.
        operators: In any dtype; computed in fp32.
        module: The base's; dequantised at most once, and only where an operator needs its weight.
        weight: The member's.

    Returns:
        ``total``.
    """
    operators.add_dense(total, ServedWeight(module.dequantize), weight)
    return total


def frobenius_norm(matrix: torch.Tensor) -> float:
    """The root of the sum of all squares, summed in float64."""
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
