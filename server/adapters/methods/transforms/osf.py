"""OSF (arXiv 2504.07097): the tail of the weight's singular value decomposition is another one.

``ΔW = U diag(S) V − (U diag(S) V)₀``: the file holds the trained tail, and the weight served has
the one that it takes the place of.
"""

from __future__ import annotations

import torch

from turret.server.adapters.base import BaseModel, BaseModule
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.lowering.dense import dense
from turret.server.adapters.lowering.finish import finish
from turret.server.adapters.lowering.lowered import Lowered, Method
from turret.server.adapters.peft_format.config.rules import Irrelevant, Rules
from turret.server.adapters.peft_format.config.selection_rules import START, TARGET_RULES
from turret.server.adapters.peft_format.module_checkpoint import (
    ModuleFormat,
    Roles,
    read_module_checkpoint,
)
from turret.server.adapters.peft_format.role_shapes import Served, check_roles

_U, _S, _V = (f"osf_svd_params.{name}" for name in ("U_low", "S_low", "V_low"))
_COUNTED = Irrelevant("the tensors show how many singular values are trained")
_SERVED = (
    "what its trained singular values take the place of is not in the file; it was computed from"
    " the weights served, which differ from those it was trained on by the error of 4 bits"
)

OSF_RULES: Rules = {
    **TARGET_RULES,
    "effective_rank": _COUNTED,
    "rank_pattern": _COUNTED,
    "target_svd_config": Irrelevant("PEFT ignores it"),
    "init_weights": START,
}


def _check(name: str, roles: Roles, module: BaseModule, _rank: int, findings: Findings) -> None:
    values = roles.get(_S)
    # PEFT leaves at least one singular value as it is, and may leave them all.
    count = values.shape[0] if values is not None and values.ndim == 1 else 0
    shapes = {
        _U: (Served(module.out_features), count),
        _S: (count,),
        _V: (count, Served(module.in_features)),
    }
    least = min(module.in_features, module.out_features)
    if check_roles(name, roles, shapes, findings) and count >= least:
        findings.mismatch(f"{name}.{_S}", f"has {count} values; the weight has {least} in all")


_FORMAT = ModuleFormat(
    rules=OSF_RULES,
    roles={f".{role}": role for role in (_U, _S, _V)},
    check=_check,
    rank_key=None,
)


def lower(
    checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None, *_: object
) -> Lowered:
    found = read_module_checkpoint(checkpoint, base, _FORMAT, max_rank)
    operators = {}
    for name, roles in found.modules.items():
        operators[name] = dense(_update(roles, base.modules[name].dequantize()), base.dtype)
    return finish(checkpoint, base, operators, found=found, warnings=(_SERVED,))


def _update(roles: Roles, weight: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(roles[_U].dtype, torch.float32)
    # Taken apart as PEFT does, in fp32; products of singular vectors have no sign of their own.
    u, s, v = torch.linalg.svd(weight.to(torch.float32), full_matrices=False)
    kept = len(s) - len(roles[_S])
    tail = (u[:, kept:] * s[kept:]).to(wide) @ v[kept:].to(wide)
    return (roles[_U].to(wide) * roles[_S].to(wide)) @ roles[_V].to(wide) - tail


METHOD = Method("osf", {"OSF"}, OSF_RULES, lower, is_dense=lambda _config: True)
