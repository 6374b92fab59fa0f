"""LoHa (FedPara, arXiv 2108.06098): ``Δ(x) = s·((w1a w1b) ⊙ (w2a w2b)) x``, ``s = alpha/r``.

The update is computed in rank space (``server/adapters/operators/hadamard.py``), which needs
``r² (in + out)`` products per token, while a dense update needs ``in · out``. The adapter is
rejected unless the first number is smaller. For a square module of size ``d``, this means
``r² < d/2``.
"""

from __future__ import annotations

from turret.server.adapters.checkpoint import MAX_REPORTED
from turret.server.adapters.methods.kit import *
from turret.server.errors import BudgetExceededError

_ROLES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def highest_rank(inputs: int, outputs: int) -> int:
    """The highest rank at which rank space is cheaper than a dense update."""
    return math.isqrt((outputs * inputs - 1) // (outputs + inputs))


def _check_cost(adapter: Reading) -> None:
    over = [m for m in adapter.modules.values() if m.rank > highest_rank(m.inputs, m.outputs)]
    if not over:
        return
    rank = max(m.rank for m in over)
    text = say("RANK_TOO_COSTLY", path=adapter.path, rank=rank, modules=len(over))
    raise BudgetExceededError(
        text,
        violations=[
            (m.name, say("NOT_IN_RANGE", least=1, most=most, value=m.rank))
            for m in over[:MAX_REPORTED]
            for most in [highest_rank(m.inputs, m.outputs)]
        ],
    )


def _operators(m: Module) -> Piece:
    first, *others = (m.tensors[role] for role in _ROLES)
    wide = torch.promote_types(m.reading.dtype, torch.float32)
    return Hadamard(first.to(wide) * m.scaling, *others)


def _start(m: NewModule) -> dict[str, torch.Tensor]:
    first = m.kaiming(m.outputs, m.rank), m.kaiming(m.rank, m.inputs)
    second = m.kaiming(m.outputs, m.rank), m.zeros(m.rank, m.inputs)
    return dict(zip(_ROLES, (*first, *second), strict=True))


METHOD = LinearMethod(
    name="loha",
    peft_types={"LOHA"},
    ignored=LYCORIS_IGNORED,
    alpha="alpha",
    has_patterns=True,
    tensors=dict(zip(_ROLES, ((OUT, R), (R, IN), (OUT, R), (R, IN)), strict=True)),
    check_all=_check_cost,
    operators=_operators,
    start=Start(_start),
)
