"""A PEFT checkpoint that adapts linear modules, with config, tensors and base in agreement.

A method states its keys and tensors as a ``ModuleFormat``, and one reader reads them all. The
tensors say what exists, the config says how it is scaled; where the two disagree, nobody knows
which function was trained, so the checkpoint is refused. The reader also keeps the server's limit
on ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from turret.server.adapters.base import BaseModel, BaseModule
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.no_adapter import LEFT_OUT, NO_TENSORS, WHOLE_WEIGHT
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.peft_format.config.rules import Rules, check_config
from turret.server.adapters.peft_format.config.targets import Targets, resolve_targets
from turret.server.adapters.peft_format.refusals.base_mismatch import cause_of_mismatch
from turret.server.adapters.peft_format.refusals.limits import check_rank
from turret.server.adapters.source import TENSORS_FILE

BIAS = "bias"
# PEFT keeps a targeted module's own bias under base_layer, another module's in its place.
_BIAS_SUFFIXES = (".base_layer.bias", ".bias")
# LyCORIS flattens the module's path into one word behind a prefix, and stores alpha as a tensor.
_LYCORIS_PREFIXES = ("lycoris_", "lora_unet_", "lora_te_")
_LYCORIS_SUFFIXES = (".alpha", ".dora_scale", ".scalar", ".on_input")

Roles = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleFormat:
    """How a method writes its checkpoint.

    Attributes:
        rules: A rule for every key of the config.
        roles: Suffix of a tensor's name → its role; none ends with another.
        check: Called per adapted module with its full name, tensors by role, the base's module, the
            configured rank and the findings to add to. Must reject incomplete sets and wrong
            shapes.
        rank_key: Config key of the rank, or None (no rank).
        rank_name: What messages call the rank.
        rank_of: Called per adapted module with its tensors by role and the configured rank; gives
            the rank that is served, which is not the configured one where the tensors decide.
        alpha_key: Config key of alpha, or None (not scaled by it).
        root_key: Config key that is true where alpha is divided by the root of the rank, or None.
        has_patterns: Whether ``rank_pattern`` and ``alpha_pattern`` are regular expressions for
            ranks and alphas, as in LoRA.
        bias_only: Value of ``bias`` that means the targeted modules, or None (no such key).
        shared: Tensors that belong to no module, by canonical name.
        also_required: Config keys that must be there beside those of rank, alpha and targets.
        needs_tensors: Whether an adapted module has tensors of its own. Where it has none, all its
            values follow from shared ones.
    """

    rules: Rules
    roles: Mapping[str, str]
    check: Callable[[str, Roles, BaseModule, int, Findings], None]
    rank_key: str | None = "r"
    rank_name: str = "rank"
    rank_of: Callable[[Roles, int], int] = lambda _roles, rank: rank
    alpha_key: str | None = None
    root_key: str | None = None
    has_patterns: bool = False
    bias_only: str | None = None
    shared: frozenset[str] = frozenset()
    also_required: tuple[str, ...] = ()
    needs_tensors: bool = True

    @property
    def required(self) -> tuple[str, ...]:
        keys = (self.rank_key, self.alpha_key, "target_modules", *self.also_required)
        return tuple(key for key in keys if key is not None)


@dataclass(frozen=True, slots=True)
class ModuleCheckpoint:
    """The checkpoint, checked.

    Attributes:
        modules: ``{module path: {role: tensor}}`` of the adapted modules, in the base's order.
        biases: Whole biases that replace the base's, by module path.
        shared: The format's shared tensors that are there.
        targets: Configured rank and alpha of every adapted module.
        ranks: Rank that is served, by module path; empty for a method without ranks.
    """

    modules: Mapping[str, Roles]
    biases: Mapping[str, torch.Tensor]
    shared: Mapping[str, torch.Tensor]
    targets: Targets
    ranks: Mapping[str, int]


def read_module_checkpoint(
    checkpoint: AdapterCheckpoint, base: BaseModel, form: ModuleFormat, max_rank: int | None
) -> ModuleCheckpoint:
    """Checks a checkpoint against itself, the base and the server's limit.

    Raises:
        AdapterCheckpointError: Unsupported or inconsistent; lists every key and tensor at fault.
        AdapterMismatchError: Sound, but for another base; lists every module that does not fit.
        BudgetExceededError: A rank over ``max_rank``.
    """
    config, findings = checkpoint.config, Findings(checkpoint.path, base.name)
    check_config(config, form.rules, findings)
    for key in form.required:
        if key not in config:
            findings.add(key, "is required")
    tensors, shared = _sort(checkpoint.tensors, base, form, findings)
    adapted = {name: roles for name, roles in tensors.items() if roles.keys() - {BIAS}}
    if form.needs_tensors and not (adapted or findings.mismatched or checkpoint.is_partial):
        findings.add(TENSORS_FILE, NO_TENSORS)
    targets = _resolve(config, form, base, findings)
    if targets is not None and not form.needs_tensors:
        adapted = {name: {} for name in base.modules if name in targets.targeted} | adapted
    if targets is not None:
        _check_targets(targets, adapted, base, form, findings)
        for name, roles in adapted.items():
            form.check(name, roles, base.modules[name], targets.ranks.get(name, 0), findings)
        if form.bias_only is not None:
            _check_biases(config, form.bias_only, targets, tensors, base, findings)
    if findings.mismatched:
        findings.cause = cause_of_mismatch(config, checkpoint.tensors, base)
    findings.raise_if_any()
    assert targets is not None  # its keys had no fault
    modules = {name: adapted[name] for name in base.modules if name in adapted}
    ranks: dict[str, int] = {}
    if form.rank_key is not None:
        ranks = {n: form.rank_of(roles, targets.ranks[n]) for n, roles in modules.items()}
    check_rank(checkpoint.path, max(ranks.values(), default=0), max_rank, name=form.rank_name)
    return ModuleCheckpoint(
        modules=modules,
        biases={name: roles[BIAS] for name, roles in tensors.items() if BIAS in roles},
        shared=shared,
        targets=targets,
        ranks=ranks,
    )


def _sort(
    tensors: Roles, base: BaseModel, form: ModuleFormat, findings: Findings
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Gives every tensor a module and a role, or a fault, or a mismatch."""
    modules: dict[str, dict[str, torch.Tensor]] = {}
    shared: dict[str, torch.Tensor] = {}
    for full_name, tensor in tensors.items():
        if full_name in form.shared:
            shared[full_name] = tensor
            continue
        name, role = _split(full_name, form)
        if role is None or full_name.startswith(_LYCORIS_PREFIXES):
            findings.add(full_name, _advice(full_name))
        elif name in base.other_modules:
            findings.add(full_name, f"{name!r} cannot be adapted by this version")
        elif name not in base.modules:
            findings.mismatch(full_name, f"the base model has no module {name!r}")
        elif role in modules.setdefault(name, {}):
            findings.add(full_name, f"is a second {role} of {name!r}")
        else:
            modules[name][role] = tensor
    return modules, shared


def _split(name: str, form: ModuleFormat) -> tuple[str, str | None]:
    suffixes = dict(form.roles)
    if form.bias_only is not None:
        suffixes |= dict.fromkeys(_BIAS_SUFFIXES, BIAS)
    for suffix, role in suffixes.items():
        if name.endswith(suffix) and len(name) > len(suffix):
            return name.removesuffix(suffix), role
    return name, None


def _advice(name: str) -> str:
    if name.startswith(_LYCORIS_PREFIXES) or name.endswith(_LYCORIS_SUFFIXES):
        return (
            "is named as LyCORIS names its tensors; save the adapter in PEFT's layout"
            " (docs/adapters.md says how)"
        )
    if name.endswith((".hada_t1", ".hada_t2", ".lokr_t2")):
        return "belongs to a convolution; the models served have none"
    if name.endswith(".weight") and ".lora_" not in name:
        return WHOLE_WEIGHT
    return "is not a tensor this method knows; every tensor must be used"


def _resolve(
    config: Mapping[str, Any], form: ModuleFormat, base: BaseModel, findings: Findings
) -> Targets | None:
    """The modules that the config selects, or None if a key it takes is at fault."""
    keys = {
        *form.required,
        *("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
        *(("rank_pattern", "alpha_pattern") if form.has_patterns else ()),
    }
    if findings.fields & keys:
        return None
    selection = {key: config[key] for key in keys if key in config}
    selection["r"] = 1 if form.rank_key is None else config[form.rank_key]
    selection["lora_alpha"] = 1 if form.alpha_key is None else config[form.alpha_key]
    selection["use_rslora"] = form.root_key is not None and config.get(form.root_key)
    linear, other = list(base.modules), sorted(base.other_modules)
    targets = resolve_targets(selection, linear, other, findings, base.text_prefix)
    return None if findings.fields & keys else targets


def _check_targets(
    targets: Targets,
    adapted: Mapping[str, Roles],
    base: BaseModel,
    form: ModuleFormat,
    findings: Findings,
) -> None:
    for name in sorted(targets.targeted & base.other_modules):
        findings.add("target_modules", f"{name!r} cannot be adapted by this version")
    first = next(iter(form.roles))
    # A module that does not fit the base was reported as that; it is not missing as well.
    misfits = bool(findings.mismatched)
    for name in base.modules:
        if name in adapted and name not in targets.targeted:
            role = next(suffix for suffix, role in form.roles.items() if role in adapted[name])
            findings.add(f"{name}{role}", LEFT_OUT)
        elif name in targets.targeted and name not in adapted and not misfits:
            findings.add(f"{name}{first}", "is missing; the config targets the module")


def _check_biases(
    config: Mapping[str, Any],
    only: str,
    targets: Targets,
    tensors: Mapping[str, Roles],
    base: BaseModel,
    findings: Findings,
) -> None:
    """The ``bias`` key against the biases it promises or rules out."""
    bias = config.get("bias", "none")
    for name, module in base.modules.items():
        found = tensors.get(name, {}).get(BIAS)
        is_promised = bias == "all" or (bias == only and name in targets.targeted)
        if found is None:
            if is_promised and module.bias is not None and not findings.mismatched:
                findings.add(f"{name}.bias", f"is missing; bias is {bias!r:.20}")
        elif not is_promised:
            findings.add(f"{name}.bias", f"is there, but bias is {bias!r:.20}")
        elif module.bias is None:
            findings.mismatch(f"{name}.bias", "the base model has no bias there")
        else:
            findings.check_shape(f"{name}.bias", found, (module.out_features,))
