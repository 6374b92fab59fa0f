"""Arrow (arXiv 2405.11157, `arrow_config`): each token is routed to the LoRAs it resembles most.

Every expert ``e`` has a prototype ``p_e`` per module, the direction of inputs to which ``B_e A_e``
responds most, and needs no training::

    α = softmax over top_k of |p_e · x| / T          y += Σ_e α_e s_e B_e A_e x

General knowledge subtraction (GenKnowSub, ACL 2025, short paper 54) first takes the mean ``A`` and
the mean ``B`` of general LoRAs from every expert's. The experts and the general LoRAs are
registered adapters; the config names them by digest, as a learned fusion's does. PEFT's file of a
router holds factors that its forward pass never reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

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
    find_components,
    left_out,
    side_by_side,
    update_of,
)
from turret.server.adapters.lowering.finish import finish
from turret.server.adapters.lowering.lowered import Lowered, Method
from turret.server.adapters.operators.adapter_operators import ModuleOperators
from turret.server.adapters.operators.gate import Gate, PrototypeScore
from turret.server.adapters.operators.updates import LowRank
from turret.server.adapters.peft_format.config.lora_rules import ARROW, LORA_RULES
from turret.server.adapters.peft_format.config.rules import (
    Irrelevant,
    Rejected,
    Rules,
    Used,
    is_bool,
    is_number,
    is_rank,
    is_seed,
)
from turret.server.adapters.peft_format.lora_checkpoint import (
    check_plain_factors,
    lora_format,
    read_lora,
)
from turret.server.adapters.peft_format.module_checkpoint import ModuleFormat, Roles

# Of the power iteration, as in PEFT.
_ITERATIONS, _EPS = 15, 1e-8
_DEFAULTS = {"top_k": 3, "router_temperature": 1.0, "use_gks": False}
_NO_UPDATE = "a router has no update of its own"
_PLAIN = "create_arrow_model makes a router without it"
_NO_SEED = (
    "rng_seed is null: PEFT searches for prototypes from another start at every load; here it is"
    " always that of seed 0"
)


def _is_names(value: Any) -> str | None:
    is_list = isinstance(value, list) and all(isinstance(name, str) for name in value)
    if is_list and len(set(value)) == len(value):
        return None
    return "must be a list of different names of components"


def _is_arrow(value: Any) -> str | None:
    problem = LORA_RULES[ARROW].check(value)  # type: ignore[union-attr]
    if problem is not None or not isinstance(value, Mapping):
        return problem or "must be an object"
    config = {**_DEFAULTS, **value}
    general = config.get("gks_adapter_names") or []
    checks = (
        ("top_k", is_rank(config["top_k"])),
        ("router_temperature", is_number(config["router_temperature"])),
        ("use_gks", is_bool(config["use_gks"])),
        ("rng_seed", None if config.get("rng_seed") is None else is_seed(config["rng_seed"])),
        ("task_adapter_names", _is_names(config.get("task_adapter_names"))),
        ("gks_adapter_names", _is_names(general)),
    )
    for key, why in checks:
        if why is not None:
            return f"{key} {why}"
    if config["router_temperature"] <= 0:
        return f"router_temperature must be above 0, not {config['router_temperature']!r:.60}"
    experts = config["task_adapter_names"]
    if not 0 < config["top_k"] <= len(experts):
        return f"top_k is {config['top_k']!r:.60}, but there are {len(experts)} experts"
    if config["use_gks"] != bool(general):
        return "use_gks must be true if gks_adapter_names has names, and false if it has none"
    if set(experts) & set(general):
        return "names the same component as an expert and as a general one"
    return None


ARROW_RULES: Rules = {
    **LORA_RULES,
    ARROW: Used(_is_arrow),
    COMPONENTS_KEY: Used(is_components),
    **dict.fromkeys(
        ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"), Irrelevant(_NO_UPDATE)
    ),
    "bias": Rejected(("none",), _PLAIN),
    "lora_bias": Rejected((False, None), _PLAIN),
    "modules_to_save": Rejected((None, []), _PLAIN),
    "trainable_token_indices": Rejected((None, [], {}), _PLAIN),
    "target_parameters": Rejected((None, []), _PLAIN),
}


def _check_unread(
    name: str, roles: Roles, module: BaseModule, _rank: int, findings: Findings
) -> None:
    """PEFT's file holds a LoRA on every module, which must fit; a file made by hand need not."""
    if roles.keys() >= {"lora_A", "lora_B"}:
        check_plain_factors(name, roles, module, 0, findings)


def _format(config: Mapping[str, Any]) -> ModuleFormat:
    return replace(
        lora_format(config),
        rules=ARROW_RULES,
        check=_check_unread,
        rank_key=None,
        alpha_key=None,
        root_key=None,
        has_patterns=False,
        bias_only=None,
        also_required=(ARROW, COMPONENTS_KEY),
        needs_tensors=False,
    )


class _Router(NamedTuple):
    """Who takes part, and how."""

    experts: list[Component]
    general: list[Component]
    top_k: int
    temperature: float
    seed: int


def lower(
    checkpoint: AdapterCheckpoint,
    base: BaseModel,
    max_rank: int | None = None,
    find_component: FindComponent = find_no_component,
) -> Lowered:
    found = read_lora(checkpoint, base, max_rank, _format(checkpoint.config))
    findings = Findings(checkpoint.path)
    if not found.modules:
        findings.add("target_modules", "selects no module of the base")
    _check_names(checkpoint.config, findings)
    findings.raise_if_any()
    components = find_components(checkpoint, find_component)
    router = _router(checkpoint.config[ARROW], components)
    updates = _updates(router, tuple(found.modules), checkpoint.path)
    starts = _Starts(router.seed)
    operators = {
        name: ModuleOperators(gate=_gate(own, router, starts, base.dtype))
        for name, own in updates.items()
    }
    return finish(
        checkpoint,
        base,
        operators,
        found=found,
        ranks={rank for component in components for rank in component.ranks},
        components=tuple(component.ref.digest for component in components),
        warnings=(
            *left_out(components, operators),
            *((_NO_SEED,) if checkpoint.config[ARROW].get("rng_seed") is None else ()),
        ),
        depends_on_base=False,
    )


def _check_names(config: Mapping[str, Any], findings: Findings) -> None:
    """The two lists of names against the components."""
    arrow = config[ARROW]
    named = {*arrow["task_adapter_names"], *(arrow.get("gks_adapter_names") or [])}
    known = [item["name"] for item in config[COMPONENTS_KEY]]
    if len(set(known)) < len(known):
        findings.add(COMPONENTS_KEY, "has the same name twice")
    for name in sorted(named - set(known)):
        findings.add(ARROW, f"names {name!r:.130}, which is not among the components")
    for name in sorted(set(known) - named):
        findings.add(COMPONENTS_KEY, f"has {name!r:.130}, which arrow_config does not name")


def _router(arrow: Mapping[str, Any], components: Sequence[Component]) -> _Router:
    by_name = {component.ref.name: component for component in components}
    config = {**_DEFAULTS, **arrow}
    return _Router(
        experts=[by_name[name] for name in config["task_adapter_names"]],
        general=[by_name[name] for name in config.get("gks_adapter_names") or []],
        top_k=config["top_k"],
        temperature=float(config["router_temperature"]),
        seed=config.get("rng_seed") or 0,
    )


# By module: what a component adds, and the scaling in it.
_Read = tuple[Mapping[str, LowRank | None], Mapping[str, float]]


class _Expert(NamedTuple):
    """``B`` unscaled, fp32: the general LoRAs' mean is taken from it, and prototypes are its."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


def _updates(router: _Router, modules: Sequence[str], path: str) -> dict[str, list[_Expert]]:
    """Every expert's factors on every module, after the subtraction.

    Raises:
        AdapterCheckpointError: Some component lacks a module, or the factors cannot be subtracted;
            names all.
    """
    findings = Findings(path)
    read: dict[str, _Read] = {}
    for component in (*router.experts, *router.general):
        who = f"{component.ref.name!r} ({component.method})"
        held = {name: update_of(component, name) for name in modules}
        lacking = [name for name, update in held.items() if update is None]
        if lacking:
            why = f"{who} does not adapt {lacking[0]}, which the router targets"
            findings.add(COMPONENTS_KEY, f"{why}; {len(lacking)} of {len(held)} are missing")
        scalings = {name: component.scalings.get(name, 1.0) for name in modules}
        if 0 in scalings.values():
            findings.add(COMPONENTS_KEY, f"{who} has a scaling of 0, which hides what it learned")
        if router.general and component.method != "lora":
            findings.add(COMPONENTS_KEY, f"{who} is no LoRA; use_gks subtracts factors of LoRAs")
        read[component.ref.name] = held, scalings
    findings.raise_if_any()
    made: dict[str, list[_Expert]] = {}
    for name in modules:
        experts, general = (
            [_unscaled(read[one.ref.name], name) for one in some]
            for some in (router.experts, router.general)
        )
        shapes = {one.a.shape for one in (*experts, *general)}
        if general and len(shapes) > 1:
            ranks = ", ".join(str(shape[0]) for shape in sorted(shapes))
            findings.add(COMPONENTS_KEY, f"have ranks {ranks} in {name}; use_gks needs one rank")
        elif general:
            a = torch.stack([one.a for one in general]).mean(0)
            b = torch.stack([one.b for one in general]).mean(0)
            experts = [_Expert(one.a - a, one.b - b, one.scaling) for one in experts]
        made[name] = experts
    findings.raise_if_any()
    return made


def _unscaled(component: _Read, name: str) -> _Expert:
    held, scalings = component
    update = held[name]
    assert update is not None, "it was there"
    wide = torch.promote_types(update.a.dtype, torch.float32)
    return _Expert(update.a.to(wide), update.b.to(wide) / scalings[name], scalings[name])


class _Starts:
    """Where the search for prototypes begins, as PEFT draws it on a CPU; by number of inputs."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._drawn: dict[int, torch.Tensor] = {}

    def of(self, in_features: int) -> torch.Tensor:
        if in_features not in self._drawn:
            generator = torch.Generator().manual_seed(self._seed)
            start = torch.randn(in_features, generator=generator)
            self._drawn[in_features] = start / (start.norm() + _EPS)
        return self._drawn[in_features]


def _gate(experts: Sequence[_Expert], router: _Router, starts: _Starts, dtype: torch.dtype) -> Gate:
    updates = [LowRank(one.a.to(dtype), (one.b * one.scaling).to(dtype)) for one in experts]
    a, b = side_by_side(updates, GATE_MULTIPLE)
    prototypes = torch.stack([_prototype(one, starts) for one in experts])
    score = PrototypeScore(prototypes, router.top_k, router.temperature)
    return Gate(a, b, score, (0, *accumulate(update.rank for update in updates)))


def _prototype(expert: _Expert, starts: _Starts) -> torch.Tensor:
    """The top right singular vector of ``B A``, ``[in]`` fp32, as far as PEFT's steps lead to it.

    The same products in the same layout: rounding is worth more where singular values are close.
    """
    a, b = expert.a.float(), expert.b.T.float().contiguous()
    squares = b.T @ b
    found = starts.of(a.shape[1])
    for _ in range(_ITERATIONS):
        found = a.T @ (squares @ (a @ found))
        found = found / (found.norm() + _EPS)
    return found


METHOD = Method(
    "arrow",
    {"LORA"},
    ARROW_RULES,
    lower,
    accepts=lambda config: isinstance(config.get(ARROW), Mapping),
)
