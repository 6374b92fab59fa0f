"""C3A (arXiv 2407.19342): ``Δ(x)`` of circulant blocks, ``y_m = Σ_n w_mn ⋆ x_n / in``.

Each block of ``b × b`` entries is one kernel of ``b`` values, moved by one from row to row. PEFT
divides by the number of inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from turret.server.adapters.base import BaseModel, BaseModule
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.lowering.finish import finish
from turret.server.adapters.lowering.lowered import Lowered, Method
from turret.server.adapters.operators.adapter_operators import ModuleOperators
from turret.server.adapters.operators.updates import Circulant
from turret.server.adapters.peft_format.config.rules import Rules, Used, is_rank
from turret.server.adapters.peft_format.config.selection_rules import (
    LAYER_RULES,
    START,
    TARGET_RULES,
    bias_rules,
)
from turret.server.adapters.peft_format.config.targets import is_rank_pattern
from turret.server.adapters.peft_format.module_checkpoint import (
    ModuleFormat,
    Roles,
    read_module_checkpoint,
)
from turret.server.adapters.peft_format.role_shapes import Served, check_divides, check_roles

_KERNEL = "c3a_kernel"
# The transforms of larger blocks would take longer than the blocks written out.
MAX_BLOCK_SIZE = 2048

C3A_RULES: Rules = {
    **TARGET_RULES,
    **LAYER_RULES,
    **bias_rules("c3a_only"),
    "block_size": Used(is_rank),
    "block_size_pattern": Used(is_rank_pattern),
    "init_weights": START,
}


def _check(
    name: str,
    roles: Roles,
    module: BaseModule,
    _rank: int,
    findings: Findings,
    *,
    config: Mapping[str, Any],
) -> None:
    keys = {"block_size", "block_size_pattern"}
    if findings.fields & keys or not keys & config.keys():
        return
    # The tensor tells which of the config's sizes the module has.
    sizes = {config.get("block_size"), *(config.get("block_size_pattern") or {}).values()}
    size = roles[_KERNEL].shape[-1] if roles[_KERNEL].ndim == 3 else 0
    if size not in sizes:
        known = ", ".join(map(str, sorted(s for s in sizes if s is not None)))
        findings.add(f"{name}.{_KERNEL}", f"has blocks of {size}, the config {known}")
    elif size > MAX_BLOCK_SIZE:
        findings.add(f"{name}.{_KERNEL}", f"has blocks of {size}; at most {MAX_BLOCK_SIZE} serve")
    else:
        sides = ((module.out_features, "outputs"), (module.in_features, "inputs"))
        if all(check_divides(name, side, size, what, findings) for side, what in sides):
            rows, columns = (Served(side // size) for side, _ in sides)
            check_roles(name, roles, {_KERNEL: (rows, columns, size)}, findings)


def lower(
    checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None, *_: object
) -> Lowered:
    form = ModuleFormat(
        rules=C3A_RULES,
        roles={f".{_KERNEL}": _KERNEL},
        check=functools.partial(_check, config=checkpoint.config),
        rank_key=None,
        bias_only="c3a_only",
        also_required=("block_size",),
    )
    found = read_module_checkpoint(checkpoint, base, form, max_rank)
    operators = {}
    for name, roles in found.modules.items():
        kernel = roles[_KERNEL].to(torch.float64) / base.modules[name].in_features
        operators[name] = ModuleOperators(circulant=Circulant(kernel.to(base.dtype).contiguous()))
    return finish(checkpoint, base, operators, found=found, depends_on_base=False)


METHOD = Method("c3a", {"C3A"}, C3A_RULES, lower)
