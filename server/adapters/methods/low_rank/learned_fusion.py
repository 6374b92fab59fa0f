"""Learned fusion (AdapterFusion, arXiv 2005.00247, section 3.2) of adapters with low-rank updates.

``K`` frozen components and, per target module, a trained query ``Wq`` and key ``Wk``::

    α = softmax_k((Wq x) · (Wk Δ_k(x)))          y += Σ_k α_k Δ_k(x)

``Δ_k(x) = B_k A_k x`` is the component's own update, its scale included, and 0 where it does not
adapt the module. The paper's value matrix is the identity here. ``Wk B_k`` is folded at load, so
the score is taken in rank space (``kernels/adapters/fusion_gate.py``).

The checkpoint holds ``…fusion_query.weight`` ``[d_k, in]`` and ``…fusion_key.weight``
``[d_k, out]`` per module; the components are registered adapters that the config names by digest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch

from turret.kernels.adapters.fusion_gate import GATE_MULTIPLE
from turret.server.adapters.base import BaseModel, BaseModule
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.component import (
    COMPONENTS_KEY,
    Component,
    FindComponent,
    find_no_component,
    is_components,
)
from turret.server.adapters.lowering.components import (
    filled_up,
    find_components,
    left_out,
    side_by_side,
    update_of,
)
from turret.server.adapters.lowering.finish import finish
from turret.server.adapters.lowering.lowered import Lowered, Method
from turret.server.adapters.operators.adapter_operators import ModuleOperators
from turret.server.adapters.operators.gate import Gate, QueryScore
from turret.server.adapters.operators.updates import LowRank
from turret.server.adapters.peft_format.config.rules import Rules, Used, is_rank
from turret.server.adapters.peft_format.config.selection_rules import LAYER_RULES, SELECTION_RULES
from turret.server.adapters.peft_format.module_checkpoint import (
    ModuleFormat,
    Roles,
    read_module_checkpoint,
)

FUSION_RULES: Rules = {
    **SELECTION_RULES,
    **LAYER_RULES,
    COMPONENTS_KEY: Used(is_components),
    "d_k": Used(is_rank),
}


def _check(name: str, roles: Roles, module: BaseModule, d_k: int, findings: Findings) -> None:
    for role, features in (("query", module.in_features), ("key", module.out_features)):
        tensor, label = roles.get(role), f"{name}.fusion_{role}.weight"
        if tensor is None:
            findings.add(label, "is missing; the other one is there")
        elif tensor.ndim != 2 or (d_k and tensor.shape[0] != d_k):
            why = f"has shape {list(tensor.shape)}, expected [{d_k}, {features}]"
            findings.add(label, why)
        elif d_k:
            findings.check_shape(label, tensor, (d_k, features))


_FORMAT = ModuleFormat(
    rules=FUSION_RULES,
    roles={".fusion_query.weight": "query", ".fusion_key.weight": "key"},
    check=_check,
    # A query costs what a factor A of rank d_k does.
    rank_key="d_k",
    rank_name="d_k",
    also_required=(COMPONENTS_KEY,),
)


def lower(
    checkpoint: AdapterCheckpoint,
    base: BaseModel,
    max_rank: int | None = None,
    find_component: FindComponent = find_no_component,
) -> Lowered:
    found = read_module_checkpoint(checkpoint, base, _FORMAT, max_rank)
    components = find_components(checkpoint, find_component)
    operators = _operators(found.modules, components, base, checkpoint.path)
    return finish(
        checkpoint,
        base,
        operators,
        found=found,
        ranks={rank for component in components for rank in component.ranks},
        components=tuple(component.ref.digest for component in components),
        warnings=left_out(components, operators),
        depends_on_base=False,
    )


def _operators(
    modules: Mapping[str, Roles], components: Sequence[Component], base: BaseModel, path: str
) -> dict[str, ModuleOperators]:
    findings = Findings(path)
    operators = {}
    for name, roles in modules.items():
        updates = [update_of(component, name) for component in components]
        if any(update is not None for update in updates):
            operators[name] = ModuleOperators(gate=_gate(roles, updates, base.dtype))
        else:
            findings.add(f"{name}.fusion_query.weight", "is there, but no component adapts it")
    findings.raise_if_any()
    return operators


def _gate(roles: Roles, updates: Sequence[LowRank | None], dtype: torch.dtype) -> Gate:
    wide = torch.promote_types(dtype, torch.float32)
    a, b = side_by_side([one for one in updates if one is not None], GATE_MULTIPLE)
    query = filled_up(roles["query"].to(dtype), GATE_MULTIPLE)
    keys = b.to(wide) @ filled_up(roles["key"].to(wide), GATE_MULTIPLE).T
    ranks = [0 if update is None else update.rank for update in updates]
    return Gate(a, b, QueryScore(query, keys), (0, *accumulate(ranks)))


METHOD = Method("learned_fusion", {"TURRET_FUSION"}, FUSION_RULES, lower)
