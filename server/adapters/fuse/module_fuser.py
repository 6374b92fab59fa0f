"""Fuses the updates of one module: ``Σ w_k ΔW_k``, or a combination of PEFT's, as two factors.

Where every update is a pair of factors, sums, SVDs and errors are computed on the factors, in fp64.
Else the update is dense, in fp32, for the one module at hand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from turret.server.adapters.base import BaseModule
from turret.server.adapters.fuse.combination import ON_UPDATES, Combination
from turret.server.adapters.fuse.factors import Factors, energy_rank, side_by_side, truncated_svd
from turret.server.adapters.fuse.pruned_sum import combine
from turret.server.adapters.operators.adapter_operators import ModuleOperators
from turret.server.adapters.operators.low_rank import LowRank
from turret.server.adapters.weight_update import add_delta, frobenius_norm, has_update, is_low_rank
from turret.server.errors import BudgetExceededError, InvalidRequestError
from turret.server.words import say


@dataclass(frozen=True, slots=True)
class Contribution:
    """One member's update of one module.

    Attributes:
        name: The member's.
        weight: The member's.
        operators: In fp32.
        scaling: What of ``operators.low_rank.b`` is the scaling of a LoRA; PEFT's combinations of
            factors divide it between A and B.
    """

    name: str
    weight: float
    operators: ModuleOperators
    scaling: float = 1.0

    @property
    def low_rank(self) -> LowRank:
        assert self.operators.low_rank is not None, "the combination was checked"
        return self.operators.low_rank


@dataclass(frozen=True, slots=True)
class FusedModule:
    """A module of the result.

    Attributes:
        a: ``[rank, in_features]``, fp32, contiguous.
        b: ``[out_features, rank]``, fp32, contiguous.
        bias: ``Σ w_k bias_k``, ``[out_features]``, fp32, or None.
        error: Frobenius norm of ``b @ a − Σ w_k ΔW_k``.
        reference: That of ``Σ w_k ΔW_k``.
    """

    a: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None
    error: float
    reference: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


class ModuleFuser:
    """Fuses modules one after the other; the order decides which random numbers each one gets.

    Args:
        combination: The requested combination.
        rank: Most singular values to keep, where the combination ends in an SVD without ``energy``.
        max_rank: Largest rank that may come out.
    """

    def __init__(self, combination: Combination, rank: int, max_rank: int) -> None:
        self._combination = combination
        self._rank = rank
        self._max_rank = max_rank
        self._generator = torch.Generator("cpu").manual_seed(combination.seed or 0)

    def check(self, parts: Sequence[Contribution], module: BaseModule) -> None:
        """Refuses what the ranks alone rule out.

        Raises:
            BudgetExceededError: The factors side by side exceed ``max_rank``.
            InvalidRequestError: Factors that have to be combined have different ranks.
        """
        combination = self._combination
        parts = _with_update(parts)
        if combination.is_concatenated:
            self._check_budget(sum(p.low_rank.rank for p in parts if p.weight), module, "adapters")
        elif not combination.is_on_updates and len({p.low_rank.rank for p in parts}) > 1:
            ranks = ", ".join(f"{part.name!r} {part.low_rank.rank}" for part in parts)
            of_updates = f"{combination.name}_svd"
            other = of_updates if of_updates in ON_UPDATES else "svd"
            text = say("UNEQUAL_MEMBERS", ranks=ranks, module=module.name, other=other)
            raise InvalidRequestError.of("adapters", text)

    def fuse(self, parts: Sequence[Contribution], module: BaseModule) -> FusedModule:
        """Fuses what the members do to one module; at least one of them does something.

        Raises:
            BudgetExceededError: ``energy`` needs more than ``max_rank``.
        """
        bias = _sum_of_biases(parts)
        parts = _with_update(parts)
        exact = _sum_of_factors(parts, module)
        if exact is not None:
            fused = self._combined(parts, module) or self._kept(exact, module)
            minus = Factors(-fused.b.double(), fused.a.double())
            error, reference = side_by_side([exact, minus]).norm(), exact.norm()
        else:
            dense = _zeros(module)
            for part in parts:
                add_delta(dense, part.operators, module, part.weight)
            fused = self._combined(parts, module) or truncated_svd(dense, self._choose(module))
            reference = frobenius_norm(dense)
            error = frobenius_norm(dense.addmm_(fused.b, fused.a, alpha=-1.0))
        return FusedModule(fused.a.contiguous(), fused.b.contiguous(), bias, error, reference)

    def _kept(self, exact: Factors, module: BaseModule) -> Factors:
        """The sum of factors as it is, or truncated."""
        if self._combination.is_on_updates:
            return exact.truncated(self._choose(module))
        return Factors(exact.b.float(), exact.a.float())

    def _combined(self, parts: Sequence[Contribution], module: BaseModule) -> Factors | None:
        """The result of a combination that does not approximate the plain sum; else None."""
        combination, generator = self._combination, self._generator
        if combination.is_concatenated or combination.name == "svd":
            return None
        weights = [part.weight for part in parts]
        if combination.is_on_updates:
            updates = [
                lambda p=part: add_delta(_zeros(module), p.operators, module) for part in parts
            ]
            matrix = combine(updates, weights, combination, generator)
            return truncated_svd(matrix, self._choose(module))
        # PEFT multiplies A and B by the root of weight times scaling each, and gives the sign to A.
        scaled = [part.weight * part.scaling for part in parts]
        roots = [math.sqrt(abs(value)) for value in scaled]
        signed = [math.copysign(root, value) for root, value in zip(roots, scaled, strict=True)]
        a = combine([lambda p=part: p.low_rank.a for part in parts], signed, combination, generator)
        b = combine(
            [lambda p=part: _unscaled_b(p) for part in parts], roots, combination, generator
        )
        return Factors(b, a)

    def _choose(self, module: BaseModule):
        energy = self._combination.energy

        def choose_rank(values: torch.Tensor) -> int:
            if energy is None:
                return self._rank
            rank = energy_rank(values, energy)
            self._check_budget(rank, module, "energy")
            return rank

        return choose_rank

    def _check_budget(self, rank: int, module: BaseModule, field: str) -> None:
        if rank > self._max_rank:
            text = say("FUSED_RANK", rank=rank, module=module.name, max_rank=self._max_rank)
            raise BudgetExceededError(text, violations=[(field, text)])


def _with_update(parts: Sequence[Contribution]) -> list[Contribution]:
    return [part for part in parts if has_update(part.operators)]


def _zeros(module: BaseModule) -> torch.Tensor:
    return torch.zeros(module.out_features, module.in_features)


def _unscaled_b(part: Contribution) -> torch.Tensor:
    """``B``, ``[out_features, rank]``, as the checkpoint holds it."""
    return part.low_rank.b.T / (part.scaling or 1.0)


def _sum_of_biases(parts: Sequence[Contribution]) -> torch.Tensor | None:
    biases = [
        part.operators.bias.double() * part.weight
        for part in parts
        if part.operators.bias is not None
    ]
    return torch.stack(biases).sum(0).float() if biases else None


def _sum_of_factors(parts: Sequence[Contribution], module: BaseModule) -> Factors | None:
    """``Σ w_k ΔW_k`` in fp64, or None if it is not made of factors."""
    if not all(is_low_rank(part.operators) for part in parts):
        return None
    # A member of weight 0 would only use up ranks.
    factors = [
        Factors(part.low_rank.b.T.double() * part.weight, part.low_rank.a.double())
        for part in parts
        if part.weight
    ]
    if factors:
        return side_by_side(factors)
    nothing = torch.zeros(module.out_features + module.in_features, 1, dtype=torch.float64)
    return Factors(nothing[: module.out_features], nothing[module.out_features :].T)
