"""Fuses the updates of one module into two factors, by the sum or one of PEFT's combinations.

If every update is a pair of factors, the weighted sum, its SVD and the error are computed from the
factors, in fp64. Otherwise, and to combine whole updates, one module's updates at a time become
dense matrices in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from turret.server.adapters.base import BaseModule
from turret.server.adapters.combination import ON_UPDATES, Combination
from turret.server.adapters.operators.adapter_operators import (
    ModuleOperators,
    add_delta,
    frobenius_norm,
    has_update,
    is_low_rank,
)
from turret.server.adapters.operators.low_rank import LoraModule, LowRank
from turret.server.errors import BudgetExceededError, InvalidRequestError
from turret.server.words import say

# Singular values below this share of the largest one are only rounding errors of fp32.
_NOISE = float(torch.finfo(torch.float32).eps)

# Takes descending singular values and returns how many to keep.
ChooseRank = Callable[[torch.Tensor], int]


@dataclass(frozen=True, slots=True)
class Factors:
    """The matrix ``b @ a``.

    Attributes:
        b: ``[rows, rank]``, fp32 or fp64.
        a: ``[rank, columns]``, same dtype.
    """

    b: torch.Tensor
    a: torch.Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def norm(self) -> float:
        """The Frobenius norm, computed without the product and without cancellation."""
        left = torch.linalg.qr(self.b.double(), mode="r").R
        right = torch.linalg.qr(self.a.double().T, mode="r").R
        return float(torch.linalg.matrix_norm(left @ right.T))

    def truncated(self, choose_rank: ChooseRank) -> Factors:
        """The nearest matrix of the chosen rank, as fp32 factors.

        The cost grows with the rank of the given factors.
        """
        qb, rb = torch.linalg.qr(self.b.double())
        qa, ra = torch.linalg.qr(self.a.double().T)
        core = truncated_svd(rb @ ra.T, choose_rank)
        return Factors((qb @ core.b).float(), (core.a @ qa.T).float())


def side_by_side(parts: Sequence[Factors]) -> Factors:
    """One pair of factors for the sum of the products; the ranks add up."""
    return Factors(
        torch.cat([part.b for part in parts], dim=1), torch.cat([part.a for part in parts])
    )


def energy_rank(values: torch.Tensor, energy: float) -> int:
    """The smallest number of singular values whose squares make up a share of the sum of squares.

    Args:
        values: The singular values, descending, not empty.
        energy: The share, in (0, 1].
    """
    held = values.double().square().cumsum(0)
    return min(len(values), int((held < energy * held[-1]).sum()) + 1)


def truncated_svd(matrix: torch.Tensor, choose_rank: ChooseRank) -> Factors:
    """The nearest matrix of the chosen rank (Eckart and Young), as factors in the matrix's dtype.

    As in PEFT, ``a`` has orthonormal rows and ``b`` holds the singular values. Directions that
    consist of rounding errors are never kept, so the rank may be lower than the chosen one.
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    significant = max(1, int((values > _NOISE * values[0]).sum()))
    rank = min(choose_rank(values[:significant]), significant)
    return Factors(left[:, :rank] * values[:rank], right[:rank].contiguous())


def ratio(error: float, reference: float) -> float:
    """The relative error; 0 if both are 0, infinite if only the reference is 0."""
    if reference == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return error / reference


# Weighted sums of tensors with pruning and sign election, as PEFT's ``merge_utils`` defines them.
#
# Each tensor is computed when it is needed and dropped before the next one, so only a few are in
# memory at a time. Masks are drawn in PEFT's order, so turret and PEFT draw the same masks from the
# same state of the generator.


Task = Callable[[], torch.Tensor]


def combine(
    tasks: Sequence[Task],
    weights: Sequence[float],
    combination: Combination,
    generator: torch.Generator,
) -> torch.Tensor:
    """``Σ w_k p(t_k)``; TIES sums only entries whose sign won, and divides by their number.

    Args:
        tasks: Functions that return the tensors, all of one shape, fp32; each may be called twice
            and may return a view.
        weights: One weight per tensor.
        combination: Determines how ``p`` prunes and whether signs are elected. The unweighted
            tensors vote, as in PEFT, so a negative weight does not reverse a vote.
        generator: Draws DARE's masks.

    Returns:
        A new tensor, fp32.
    """
    if combination.elects_signs:
        return _with_elected_signs(tasks, weights, combination, generator)
    total: torch.Tensor | None = None
    for task, weight in zip(tasks, weights, strict=True):
        part = _pruned(task(), combination, generator) * weight
        total = part if total is None else total.add_(part)
    assert total is not None, "a mix has members"
    return total


def _with_elected_signs(
    tasks: Sequence[Task],
    weights: Sequence[float],
    combination: Combination,
    generator: torch.Generator,
) -> torch.Tensor:
    state = generator.get_state()
    votes: torch.Tensor | None = None
    for task in tasks:
        vote = _pruned(task(), combination, generator)
        if combination.majority_sign_method == "frequency":
            vote = vote.sign()
        votes = vote.clone() if votes is None else votes.add_(vote)
    assert votes is not None, "a mix has members"
    elected = torch.where(votes >= 0, 1.0, -1.0)
    total, count = torch.zeros_like(votes), votes.zero_()
    # Draw the same masks again instead of keeping all pruned tensors in memory.
    generator.set_state(state)
    for task, weight in zip(tasks, weights, strict=True):
        part = _pruned(task(), combination, generator)
        agrees = part.sign() == elected
        total += part * weight * agrees
        count += agrees
    return total.div_(count.clamp_(min=1.0))


def _pruned(
    tensor: torch.Tensor, combination: Combination, generator: torch.Generator
) -> torch.Tensor:
    """A new tensor with the share ``density`` of the entries, or the given one if all are kept."""
    density = combination.density
    if density is None or density >= 1.0:
        return tensor
    if combination.prunes_at_random:
        kept = torch.bernoulli(torch.full_like(tensor, density), generator=generator)
        return kept.mul_(tensor).div_(density)
    largest = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    kept = torch.zeros_like(tensor, memory_format=torch.contiguous_format)
    kept.view(-1)[largest] = 1.0
    return kept.mul_(tensor)


@dataclass(frozen=True, slots=True)
class Contribution:
    """One member's update of one module.

    Attributes:
        name: The member's name.
        weight: The member's weight.
        operators: The member's operators in fp32.
        scaling: The scaling of a LoRA, with which ``operators.low_rank.b`` is multiplied. PEFT's
            combinations of factors divide this scaling between A and B.
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
class FusedModule(LoraModule):
    """A module of the result, with ``bias = Σ w_k bias_k``.

    Attributes:
        error: Frobenius norm of ``b @ a − Σ w_k ΔW_k``.
        reference: The Frobenius norm of ``Σ w_k ΔW_k``.
    """

    error: float
    reference: float


class ModuleFuser:
    """Fuses modules one after the other; the order decides which random numbers each one gets.

    Args:
        combination: The requested combination.
        rank: The maximum number of singular values to keep, if the combination ends in an SVD
            without ``energy``.
        max_rank: The maximum rank of the result.
    """

    def __init__(self, combination: Combination, rank: int, max_rank: int) -> None:
        self._combination = combination
        self._rank = rank
        self._max_rank = max_rank
        self._generator = torch.Generator("cpu").manual_seed(combination.seed or 0)

    def check(self, parts: Sequence[Contribution], module: BaseModule) -> None:
        """Rejects members that cannot be fused because of their ranks.

        Raises:
            BudgetExceededError: The rank of the concatenated factors exceeds ``max_rank``.
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
        """Fuses the members' updates of one module; there is at least one update.

        Raises:
            BudgetExceededError: ``energy`` needs a rank over ``max_rank``.
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
        """The sum of factors as it is, or truncated for combinations that end in an SVD."""
        if self._combination.is_on_updates:
            return exact.truncated(self._choose(module))
        return Factors(exact.b.float(), exact.a.float())

    def _combined(self, parts: Sequence[Contribution], module: BaseModule) -> Factors | None:
        """The factors that the combination makes; None for the weighted sum and its SVD."""
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
        # PEFT multiplies both A and B by the square root of weight times scaling; A gets the sign.
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
    """``Σ w_k ΔW_k`` as factors in fp64; None if an update is not a pair of factors."""
    if not all(is_low_rank(part.operators) for part in parts):
        return None
    # Leave out members of weight 0, which would only take up ranks.
    factors = [
        Factors(part.low_rank.b.T.double() * part.weight, part.low_rank.a.double())
        for part in parts
        if part.weight
    ]
    if factors:
        return side_by_side(factors)
    nothing = torch.zeros(module.out_features + module.in_features, 1, dtype=torch.float64)
    return Factors(nothing[: module.out_features], nothing[module.out_features :].T)
