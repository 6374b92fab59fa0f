"""HRA (arXiv 2405.17484): ``y = W R x``, ``R = Π (I − 2 u_i u_iᵀ)``; ``apply_GS``: ``I − 2 U Uᵀ``.

``R − I`` has rank ``r``: with ``V`` the unit reflection vectors it is ``P Vᵀ`` (the compact WY
form), so ``ΔW = W P Vᵀ``. Training starts from pairs of equal reflections, in which ``P Vᵀ`` is a
small difference of large factors; with ``V = Q T`` (QR) the factors are ``Qᵀ`` and ``W (P Tᵀ)``,
which are of the update's own size and lose nothing when they are rounded.
"""

from __future__ import annotations

import torch

from turret.server.adapters.base import BaseModel, BaseModule
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.lowering.finish import finish
from turret.server.adapters.lowering.low_rank import fold
from turret.server.adapters.lowering.lowered import Lowered, Method
from turret.server.adapters.lowering.weight_products import weight_times
from turret.server.adapters.operators.adapter_operators import ModuleOperators
from turret.server.adapters.peft_format.config.rules import Rules, Used, is_bool
from turret.server.adapters.peft_format.config.selection_rules import (
    LAYER_RULES,
    RANK,
    SELECTION_RULES,
    START,
    bias_rules,
)
from turret.server.adapters.peft_format.module_checkpoint import (
    ModuleFormat,
    Roles,
    read_module_checkpoint,
)
from turret.server.adapters.peft_format.role_shapes import Served, check_roles

_U = "hra_u"

HRA_RULES: Rules = {
    **SELECTION_RULES,
    **LAYER_RULES,
    **bias_rules("hra_only"),
    "r": RANK,
    "apply_GS": Used(is_bool),
    "init_weights": START,
}


def _check(name: str, roles: Roles, module: BaseModule, rank: int, findings: Findings) -> None:
    if not check_roles(name, roles, {_U: (Served(module.in_features), rank)}, findings):
        return
    if rank > module.in_features:
        findings.mismatch(name, f"has {module.in_features} inputs, fewer than the rank {rank}")
    elif not bool(roles[_U].any(dim=0).all()):
        findings.add(f"{name}.{_U}", "has a column of zeros, which is no direction")


_FORMAT = ModuleFormat(
    rules=HRA_RULES,
    roles={f".{_U}": _U},
    check=_check,
    bias_only="hra_only",
    also_required=("apply_GS",),
)


def lower(
    checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None, *_: object
) -> Lowered:
    found = read_module_checkpoint(checkpoint, base, _FORMAT, max_rank)
    factors = _orthonormal if checkpoint.config["apply_GS"] else _reflections
    operators = {}
    with base.beside():
        for name, roles in found.modules.items():
            a, change = factors(roles[_U].to(torch.float64))
            b = weight_times(base.modules[name].rows(), change)
            operators[name] = ModuleOperators(fold(a, b, 1.0, base.dtype))
    return finish(checkpoint, base, operators, found=found)


def _reflections(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``R − I`` of reflections one after another as ``change @ a``.

    Args:
        u: ``[in_features, r]`` fp64, a direction in each column.

    Returns:
        ``a``, ``[r, in_features]``, orthonormal rows, and ``change``, ``[in_features, r]``.
    """
    v = u / u.norm(dim=0)
    overlaps = v.T @ v
    columns: list[torch.Tensor] = []
    for i in range(v.shape[1]):
        column = v[:, i]
        if columns:
            column = column + torch.stack(columns, dim=1) @ overlaps[:i, i]
        columns.append(-2.0 * column)
    q, triangle = torch.linalg.qr(v)
    return q.T, torch.stack(columns, dim=1) @ triangle.T


def _orthonormal(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of ``I − 2 U Uᵀ``, ``U`` orthonormalised by Gram and Schmidt."""
    done: list[torch.Tensor] = []
    for column in u.unbind(dim=1):
        for other in done:
            column = column - (other @ column) * other
        done.append(column / column.norm())
    v = torch.stack(done, dim=1)
    return v.T, -2.0 * v


METHOD = Method("hra", {"HRA"}, HRA_RULES, lower)
