"""How the components of a gated adapter lie side by side in the pack."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from turret.server.adapters.operators.adapter_operators import AdapterOperators
from turret.server.adapters.operators.gate import Gate


def gates_of(operators: AdapterOperators) -> list[Gate]:
    """An adapter's gates in all modules."""
    found = (ops.get(Gate) for ops in operators.modules.values())
    return [gate for gate in found if gate is not None]


def components_of(operators: AdapterOperators) -> tuple[int, ...]:
    """Each component's largest rank, which it occupies in every module; empty without gates."""
    ranks = [ranks_of(gate) for gate in gates_of(operators)]
    return tuple(max(column) for column in zip(*ranks, strict=True))


def ranks_of(gate: Gate) -> tuple[int, ...]:
    """Each component's rank in one module."""
    return tuple(end - start for start, end in pairwise(gate.rank_indptr))


def bounds_of(components: Sequence[int]) -> list[tuple[int, int]]:
    """First and end rank of each component, counted from the first component's start."""
    return list(pairwise(accumulate(components, initial=0)))


def moves_of(components: Sequence[int], gate: Gate) -> list[tuple[slice, slice]]:
    """Source and target ranks of a module's components, with adjacent ranges merged."""
    moves: list[tuple[int, int, int]] = []
    for (target, _), (start, end) in zip(
        bounds_of(components), pairwise(gate.rank_indptr), strict=True
    ):
        if moves and moves[-1][1] == start and moves[-1][2] == target:
            moves[-1] = (moves[-1][0], end, target + end - start)
        elif end > start:
            moves.append((start, end, target + end - start))
    return [(slice(s, e), slice(to - (e - s), to)) for s, e, to in moves]
