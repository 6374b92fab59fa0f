"""The members of a fusion: read again in fp32, and checked against what was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from turret.server.adapters.adapter import Adapter
from turret.server.adapters.checkpoint.findings import Finding, refuse_all
from turret.server.adapters.fuse.combination import Combination
from turret.server.adapters.fuse.module_fuser import Contribution
from turret.server.adapters.lowering.lowered import Lowered
from turret.server.adapters.weight_update import beyond_low_rank, beyond_updates
from turret.server.errors import InvalidRequestError
from turret.server.words import say


@dataclass(frozen=True, slots=True)
class Member:
    """One adapter of the mix.

    Attributes:
        adapter: The generation that is fused.
        weight: Its weight.
        lowered: Its operators in fp32.
    """

    adapter: Adapter
    weight: float
    lowered: Lowered

    def part(self, module: str) -> Contribution | None:
        """The member's update of a module, or None."""
        operators = self.lowered.operators.modules.get(module)
        if operators is None:
            return None
        scaling = self.lowered.scalings.get(module, 1.0)
        return Contribution(self.adapter.name, self.weight, operators, scaling)


def check_prompts(adapters: Sequence[Adapter]) -> None:
    """Rejects members that their facts alone rule out, before anything is read.

    Raises:
        InvalidRequestError: Lists the members that no LoRA can represent.
    """
    found: list[Finding] = []
    for index, adapter in enumerate(adapters):
        if adapter.num_soft_tokens or adapter.num_prefix_positions:
            found.append(_unfit(index, adapter, "it puts tokens or keys before the prompt"))
        if adapter.invocation:
            found.append(_unfit(index, adapter, "it acts only after its invocation"))
    refuse_all(found)


def check_operators(members: Sequence[Member], combination: Combination) -> None:
    """Rejects members that the combination cannot represent.

    Raises:
        InvalidRequestError: Lists all of them, each with the part that does not fit.
    """
    found: list[Finding] = []
    for index, member in enumerate(members):
        operators, adapter = member.lowered.operators, member.adapter
        if adapter.facts.vocab_size:
            found.append(_unfit(index, adapter, "it has a vocabulary of its own"))
        elif extra := beyond_updates(operators):
            why = f"a fusion cannot include its {' and '.join(extra)}"
            found.append(_unfit(index, adapter, why))
        elif not combination.is_on_updates and (extra := beyond_low_rank(operators)):
            why = (
                f"{combination.name} needs low-rank factors, but it has a"
                f" {' and a '.join(extra)}; use a combination with svd"
            )
            found.append(_unfit(index, adapter, why))
    refuse_all(found)


def rank_of_result(members: Sequence[Member], combination: Combination) -> int:
    """Maximum number of singular values to keep, for combinations that end in an SVD.

    Raises:
        InvalidRequestError: The request sets no rank, and no member has one.
    """
    if combination.rank is not None:
        return combination.rank
    ranks = [rank for member in members for rank in member.lowered.ranks]
    if not ranks and combination.is_on_updates and combination.energy is None:
        raise InvalidRequestError.of("rank", say("RANK_REQUIRED"))
    return max(ranks, default=1)


def _unfit(index: int, adapter: Adapter, why: str) -> Finding:
    text = say("NOT_FUSABLE", adapter=adapter.name, method=adapter.facts.method, why=why)
    return f"adapters[{index}].name", text
