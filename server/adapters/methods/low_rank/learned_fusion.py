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
from dataclasses import fields
from itertools import accumulate

import torch
import torch.nn.functional as F

from turret.kernels.adapters.fusion_gate import GATE_MULTIPLE
from turret.server.adapters.base import BaseModel, BaseModule
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.component import (
    COMPONENTS_KEY,
    Component,
    FindComponent,
    component_refs,
    find_no_component,
    is_components,
)
from turret.server.adapters.lowering.finish import finish
from turret.server.adapters.lowering.lowered import Lowered, Method
from turret.server.adapters.operators import Gate, ModuleOperators
from turret.server.adapters.peft_format.config.rules import Rules, Used, is_rank
from turret.server.adapters.peft_format.config.selection_rules import LAYER_RULES, SELECTION_RULES
from turret.server.adapters.peft_format.module_checkpoint import (
    ModuleFormat,
    Roles,
    read_module_checkpoint,
)
from turret.server.adapters.updates import LowRank
from turret.server.errors import AdapterComponentError

FUSION_RULES: Rules = {
    **SELECTION_RULES,
    **LAYER_RULES,
    COMPONENTS_KEY: Used(is_components),
    "d_k": Used(is_rank),
}

# Fields of the operators that a component must not have, in words.
_WORDS = {
    "hadamard": "a Hadamard update",
    "kronecker": "a Kronecker update",
    "sparse": "entries of the weight",
    "gain": "a gain",
    "input_gain": "an input gain",
    "bias": "a bias",
    "soft_prompt": "soft tokens or a prefix",
    "experts": "updates of experts",
    "head": "an embedding or head",
    "tokens": "an embedding or head",
    "invocation": "an invocation before which it does nothing",
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
    components = _find_components(checkpoint, find_component)
    operators = _operators(found.modules, components, base, checkpoint.path)
    return finish(
        checkpoint,
        base,
        operators,
        found=found,
        ranks={rank for component in components for rank in component.ranks},
        components=tuple(component.ref.digest for component in components),
        warnings=_left_out(components, operators),
        depends_on_base=False,
    )


def _find_components(
    checkpoint: AdapterCheckpoint, find_component: FindComponent
) -> list[Component]:
    """All of them, in the config's order, each with low-rank updates only.

    Raises:
        AdapterComponentError: Some are not registered; names all.
        AdapterCheckpointError: Some cannot be fused; names all, and why.
    """
    components: list[Component] = []
    missing: list[tuple[str, str]] = []
    for ref in component_refs(checkpoint.config):
        try:
            components.append(find_component(ref))
        except AdapterComponentError as error:
            missing += error.violations
    if missing:
        why = "; ".join(text for _, text in missing)
        raise AdapterComponentError(
            f"adapter {checkpoint.path!r} cannot be served without its components: {why}",
            metadata={"path": checkpoint.path},
            violations=missing,
        )
    check_fusable(components, checkpoint.path)
    return components


def check_fusable(components: Sequence[Component], path: str) -> None:
    """Whether components have low-rank updates and nothing else.

    Raises:
        AdapterCheckpointError: Some do not; names all, and why. ``path`` is the fusion's.
    """
    findings = Findings(path)
    for component in components:
        others = _other_operators(component)
        if others:
            findings.add(
                COMPONENTS_KEY,
                f"{component.ref.name!r} ({component.method}) has {' and '.join(others)}; only"
                " low-rank updates can be fused, and those without biases",
            )
    findings.raise_if_any()


def _other_operators(component: Component) -> list[str]:
    """What a component does beside low-rank updates, in words; also what this file knows not."""
    operators = component.operators
    used = {
        field.name
        for module in operators.modules.values()
        for field in fields(module)
        if field.name != "low_rank" and getattr(module, field.name) is not None
    }
    used |= {
        field.name
        for field in fields(operators)
        if field.init and field.name != "modules" and getattr(operators, field.name) is not None
    }
    return list(dict.fromkeys(_WORDS.get(name, f"an operator {name}") for name in sorted(used)))


def _operators(
    modules: Mapping[str, Roles], components: Sequence[Component], base: BaseModel, path: str
) -> dict[str, ModuleOperators]:
    findings = Findings(path)
    operators = {}
    for name, roles in modules.items():
        updates = [_update(component, name) for component in components]
        if any(update is not None for update in updates):
            operators[name] = ModuleOperators(gate=_gate(roles, updates, base.dtype))
        else:
            findings.add(f"{name}.fusion_query.weight", "is there, but no component adapts it")
    findings.raise_if_any()
    return operators


def _update(component: Component, name: str) -> LowRank | None:
    ops = component.operators.modules.get(name)
    return ops.low_rank if ops is not None and ops.rank else None


def _gate(roles: Roles, updates: Sequence[LowRank | None], dtype: torch.dtype) -> Gate:
    """Lays the components side by side, zeros up to the sizes that the gate kernel likes."""
    wide = torch.promote_types(dtype, torch.float32)
    held = [update for update in updates if update is not None]
    a = _padded(torch.cat([update.a for update in held]))
    b = _padded(torch.cat([update.b for update in held]))
    query = _padded(roles["query"].to(dtype))
    keys = b.to(wide) @ _padded(roles["key"].to(wide)).T
    ranks = [0 if update is None else update.rank for update in updates]
    return Gate(a, b, query, keys, (0, *accumulate(ranks)))


def _padded(rows: torch.Tensor) -> torch.Tensor:
    return F.pad(rows, (0, 0, 0, -rows.shape[0] % GATE_MULTIPLE)).contiguous()


def _left_out(
    components: Sequence[Component], operators: Mapping[str, ModuleOperators]
) -> list[str]:
    adapted = {name for component in components for name in component.operators.modules}
    count = len(adapted - operators.keys())
    if count == 0:
        return []
    return [f"components adapt {count} modules that the fusion does not target: these stay as is"]


METHOD = Method("learned_fusion", {"TURRET_FUSION"}, FUSION_RULES, lower)
