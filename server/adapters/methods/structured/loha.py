"""LoHa (FedPara, arXiv 2108.06098): ``Δ(x) = s·((w1a w1b) ⊙ (w2a w2b)) x``, ``s = alpha/r``.

Computed in rank space (``kernels/adapters/hadamard_shrink.py``), which needs ``r² (in + out)``
products per token where a dense update needs ``in · out``. For a square module the first is fewer
while ``r² < d/2``; past that the adapter is refused.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from turret.server.adapters.base import BaseModel, BaseModule
from turret.server.adapters.checkpoint.findings import MAX_REPORTED, Findings
from turret.server.adapters.checkpoint.no_adapter import OTHER_TRAINING, SAVE_AGAIN
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.lowering.finish import finish
from turret.server.adapters.lowering.lowered import Lowered, Method
from turret.server.adapters.operators.adapter_operators import ModuleOperators
from turret.server.adapters.operators.updates import Hadamard
from turret.server.adapters.peft_format.config.selection_rules import LYCORIS_RULES
from turret.server.adapters.peft_format.module_checkpoint import (
    ModuleFormat,
    Roles,
    read_module_checkpoint,
)
from turret.server.errors import BudgetExceededError

_ROLES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def is_rank_served(rank: int, module: BaseModule) -> bool:
    """Whether rank space is cheaper than a dense update."""
    wide, high = module.in_features, module.out_features
    return rank * rank * (wide + high) < wide * high


def _check(name: str, roles: Roles, module: BaseModule, rank: int, findings: Findings) -> None:
    for role in _ROLES:
        tensor = roles.get(role)
        if tensor is None:
            findings.add(f"{name}.{role}", f"is missing; other factors are there: {SAVE_AGAIN}")
        elif tensor.ndim != 2:
            findings.add(f"{name}.{role}", f"must be 2-D, not {list(tensor.shape)}")
        elif rank:
            rows, columns = tensor.shape
            of_rank, size = (columns, rows) if role.endswith("_a") else (rows, columns)
            served = module.out_features if role.endswith("_a") else module.in_features
            if of_rank != rank:
                why = f"has rank {of_rank}, the config says {rank}; {OTHER_TRAINING}"
                findings.add(f"{name}.{role}", why)
            elif size != served:
                side = "outputs" if role.endswith("_a") else "inputs"
                why = f"is for {size} {side}, the base model has {served}"
                findings.mismatch(f"{name}.{role}", why)


_FORMAT = ModuleFormat(
    rules=LYCORIS_RULES,
    roles={f".{role}": role for role in _ROLES},
    check=_check,
    alpha_key="alpha",
    has_patterns=True,
)


def lower(
    checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None, *_: object
) -> Lowered:
    found = read_module_checkpoint(checkpoint, base, _FORMAT, max_rank)
    _check_cost(checkpoint.path, found.ranks, base)
    operators = {
        name: ModuleOperators(hadamard=_fold(roles, found.targets.scaling(name), base.dtype))
        for name, roles in found.modules.items()
    }
    return finish(checkpoint, base, operators, found=found, depends_on_base=False)


def _fold(roles: Roles, scaling: float, dtype: torch.dtype) -> Hadamard:
    """Scales ``w1a`` with one rounding."""
    wide = torch.promote_types(dtype, torch.float32)
    w1a = (roles["hada_w1_a"].to(wide) * scaling).to(dtype)
    w1b, w2a, w2b = (roles[role].to(dtype).contiguous() for role in _ROLES[1:])
    return Hadamard(w1a=w1a.contiguous(), w1b=w1b, w2a=w2a, w2b=w2b)


def _check_cost(path: str, ranks: Mapping[str, int], base: BaseModel) -> None:
    over = [name for name, rank in ranks.items() if not is_rank_served(rank, base.modules[name])]
    if not over:
        return
    rank = max(ranks[name] for name in over)
    shown = ", ".join(over[:4]) + (f" and {len(over) - 4} more" if len(over) > 4 else "")
    raise BudgetExceededError(
        f"adapter {path!r}: LoHa rank {rank} is served only where rank² · (in + out) is less than"
        f" in · out, which does not hold for {shown}; convert the adapter with PEFT's save_as_lora,"
        " or train it with a smaller rank there",
        metadata={"path": path, "rank": str(rank), "modules": str(len(over))},
        violations=[
            (name, f"rank {ranks[name]} is too large for its size") for name in over[:MAX_REPORTED]
        ],
    )


METHOD = Method("loha", {"LOHA"}, LYCORIS_RULES, lower)
