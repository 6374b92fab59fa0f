"""The experts' part of a LoRA checkpoint, in both forms that PEFT has written.

If experts are modules (transformers before 5), each has its own factors::

    model.layers.0.mlp.experts.7.gate_proj.lora_A.weight     [r, in]     target_modules

If they are parameters of three dimensions, ``target_parameters`` names them, and the factors of all
experts are in one matrix. PEFT wraps the module that contains them once per parameter. If there are
two, the factors of the first are below ``base_layer``::

    model.layers.0.mlp.experts.base_layer.lora_A.weight      [experts·r, in]   gate_up_proj
    model.layers.0.mlp.experts.lora_B.weight                 [out, r·experts]  down_proj

Both forms become the same operator. Modules that the base fuses are side by side in the operator,
with consecutive ranks and separate outputs (as in PEFT's own conversion).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from turret.lazy_torch import torch
from turret.server.adapters.base import BaseExperts, BaseModel, BaseSizes
from turret.server.adapters.checkpoint import AdapterCheckpoint, Findings
from turret.server.adapters.checkpoint.reader import all_finite
from turret.server.adapters.operators.low_rank import ExpertLowRank
from turret.server.adapters.peft_format.linear_format import PATTERNS
from turret.server.adapters.peft_format.lora_rules import CHOICE, SIZES, VARIANTS, well_formed
from turret.server.adapters.peft_format.refusals import check_rank
from turret.server.adapters.peft_format.targets import ALL_LINEAR, Targets, resolve_targets
from turret.server.words import say

_KEY = "target_parameters"
# Keys that PEFT ignores for parameters, or rejects in combination with them.
_ALONE = (
    *("exclude_modules", "layers_to_transform", "layers_pattern", "lora_bias", "use_dora"),
    *("use_bdlora", "use_qalora", "kasa_config", "velora_config", "monteclora_config"),
    "alora_invocation_tokens",
)


def name_modules(
    checkpoint: AdapterCheckpoint, base: BaseModel | BaseSizes, findings: Findings
) -> AdapterCheckpoint:
    """The checkpoint with the modules of the targeted weights added to ``target_modules``.

    Reports parameters that are not weights of linear modules, and keys that conflict with
    ``target_parameters``. The rules report a malformed list. Parameters of experts have already
    been removed.
    """
    config = checkpoint.config
    targets, modules = config.get(_KEY), config.get("target_modules")
    if not targets or not isinstance(targets, list):
        if modules == [] and not checkpoint.is_partial:
            findings.add("target_modules", say("SELECTS_NOTHING"))
        return checkpoint
    for key in _ALONE:
        if config.get(key):
            findings.add(key, say("CONFLICTS_WITH", other=_KEY))
    if config.get("bias", "none") != "none":
        findings.add("bias", say("CONFLICTS_WITH", other=_KEY))
    chosen: dict[str, None] = {}
    for target in targets:
        ending = f".{target}"
        hits = [name for name in base.modules if f".{name}.weight".endswith(ending)]
        if not hits:
            findings.add(_KEY, say("NO_SUCH_MODULE", module=target))
        chosen |= dict.fromkeys(hits)
    if modules:
        selected = {"target_modules": modules}
        for name in resolve_targets(selected, list(chosen), (), findings).targeted:
            findings.add("target_modules", say("SELECTED_TWICE", module=name, other=_KEY))
    selected = {"target_modules": _both(modules, list(chosen))}
    changed = {**config, **selected, **_patterns(config, list(chosen), findings)}
    return replace(checkpoint, config=changed)


def _patterns(
    config: Mapping[str, Any], chosen: list[str], findings: Findings
) -> dict[str, dict[str, Any]]:
    """The config's patterns, preceded by one for each chosen module.

    PEFT matches the patterns against a parameter's name, which ends in ``.weight``.
    """
    present = [key for key in PATTERNS if config.get(key)]
    selection = well_formed(config, *SIZES)
    if not present or selection is None:
        return {}
    names = [f"{name}.weight" for name in chosen]
    targets = resolve_targets({**selection, "target_modules": names}, names, (), findings)
    tables = {"rank_pattern": targets.ranks, "alpha_pattern": targets.alphas}
    return {
        key: {name: tables[key][f"{name}.weight"] for name in chosen} | config[key]
        for key in present
    }


def _both(modules: object, chosen: list[str]) -> object:
    """A value of ``target_modules`` that selects the ``chosen`` paths as well as ``modules``."""
    if not modules:
        return chosen
    if isinstance(modules, str) and modules.lower() != ALL_LINEAR:
        return "|".join((f"(?:{modules})", *map(re.escape, chosen)))
    return [*modules, *chosen] if isinstance(modules, list) else modules


_A, _B = ".lora_A.weight", ".lora_B.weight"
_INNER = ".base_layer"
_NOT_SERVED = (*VARIANTS, "lora_bias")


def take_experts(
    checkpoint: AdapterCheckpoint,
    base: BaseModel,
    findings: Findings,
    max_rank: int | None = None,
    *,
    is_lora: bool,
) -> tuple[AdapterCheckpoint, Mapping[str, ExpertLowRank] | None, tuple[int, ...]]:
    """Splits a checkpoint. Problems are added to the findings.

    ``is_lora`` means that the checkpoint's method may adapt experts.

    Returns:
        The rest, for the method; the updates by path of the parameter, or None; and their
        configured ranks.

    Raises:
        BudgetExceededError: A rank is over ``max_rank``.
    """
    if not base.experts:
        return checkpoint, None, ()
    tensors, rest = _split(checkpoint, base, findings)
    config, chosen = _chosen(checkpoint.config, base)
    if not tensors and not chosen:
        return replace(checkpoint, tensors=rest, config=config), None, ()
    _check_method(config, tensors, findings, is_lora=is_lora)
    selection = well_formed(checkpoint.config, *SIZES, "use_rslora", *CHOICE, _KEY)
    updates: dict[str, ExpertLowRank] = {}
    ranks: tuple[int, ...] = ()
    if selection and not findings.fields and {"r", "lora_alpha"} <= selection.keys():
        reader = _FactorReader(checkpoint.path, tensors, base, findings, max_rank)
        if chosen:
            updates, ranks = reader.read_parameters(chosen, selection)
        else:
            updates, ranks = reader.read_modules(selection)
        for name in tensors.keys() - reader.used:
            findings.add(name, say("UNEXPECTED_TENSOR", by="the config"))
    for name, update in updates.items():
        if not all(map(all_finite, update.tensors())):
            findings.add(name, say("NOT_FINITE", dtype=base.dtype))
    left = replace(checkpoint, tensors=rest, config=config, is_partial=True)
    return left, updates, ranks


def _split(
    checkpoint: AdapterCheckpoint, base: BaseModel, findings: Findings
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The experts' tensors, and all others, by their names in this base."""
    parameters = {experts.folder for experts in base.experts.values()}
    modules = {
        f"{module.partition('.experts.')[0]}.experts"
        for experts in base.experts.values()
        for module in experts.modules
    }
    ours: dict[str, torch.Tensor] = {}
    rest: dict[str, torch.Tensor] = {}
    for name, tensor in checkpoint.tensors.items():
        folder, found, _ = name.partition(".experts.")
        if found and f"{folder}.experts" in parameters | modules:
            ours[name] = tensor
            continue
        renamed = name
        for old, new in base.renamed.items():
            renamed = renamed.replace(old, new)
        if renamed in rest:
            findings.add(name, say("DUPLICATE_TENSOR", other=renamed))
        rest[renamed] = tensor
    return ours, rest


def _chosen(config: Mapping[str, Any], base: BaseModel) -> tuple[dict[str, Any], list[BaseExperts]]:
    """The config without its selection of experts' parameters, and the selected parameters.

    In ``target_modules``, modules get their names in this base. ``target_parameters`` loses the
    selected parameters, and the tables of patterns lose those that PEFT adds for them.
    """
    rest, targets = dict(config), config.get(_KEY)
    modules = rest.get("target_modules")
    if isinstance(modules, list):
        for old, new in base.renamed.items():
            rest["target_modules"] = [
                name.replace(old[1:], new[1:]) if isinstance(name, str) else name
                for name in rest["target_modules"]
            ]
    if not isinstance(targets, list):
        return rest, []
    endings = {target: f".{target}" for target in targets if isinstance(target, str)}
    hits = {
        target: [e for e in base.experts.values() if f".{e.name}".endswith(ending)]
        for target, ending in endings.items()
    }
    found = {experts.name: experts for some in hits.values() for experts in some}
    if not found:
        return rest, []
    rest[_KEY] = [target for target in targets if not hits.get(target)]
    if modules is None:
        rest["target_modules"] = []
    # PEFT adds these patterns when it turns fused modules into parameters.
    leaves = {f".*\\.{name.rpartition('.')[2]}" for name in base.experts}
    for key in PATTERNS:
        table = config.get(key)
        if isinstance(table, Mapping):
            rest[key] = {pattern: v for pattern, v in table.items() if pattern not in leaves}
    return rest, [experts for name, experts in base.experts.items() if name in found]


def _check_method(
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    findings: Findings,
    *,
    is_lora: bool,
) -> None:
    if not is_lora:
        for name in tensors:
            findings.add(name, say("ADAPTS_EXPERT"))
    for key in _NOT_SERVED:
        if config.get(key):
            findings.add(key, say("CONFLICTS_WITH", other="LoRA on experts"))


@dataclass
class _FactorReader:
    """Reads factors, and keeps track of the tensors that it has used."""

    path: str
    tensors: Mapping[str, torch.Tensor]
    base: BaseModel
    findings: Findings
    max_rank: int | None
    used: set[str] = field(default_factory=set)

    def read_parameters(
        self, chosen: list[BaseExperts], selection: Mapping[str, Any]
    ) -> tuple[dict[str, ExpertLowRank], tuple[int, ...]]:
        """Reads checkpoints in which one matrix holds the factors of all experts."""
        names = [experts.name for experts in chosen]
        # In PEFT, the keys that select modules do not apply to parameters.
        of_parameters = {key: value for key, value in selection.items() if key not in CHOICE}
        targets = self._resolve({**of_parameters, "target_modules": names}, names)
        folders = [experts.folder for experts in chosen]
        updates = {}
        for experts in chosen:
            is_inner = experts.is_first and folders.count(experts.folder) > 1
            stem = experts.folder + (_INNER if is_inner else "")
            rank, count = targets.ranks[experts.name], experts.count
            a = self._take(stem + _A, (count * rank, experts.in_features))
            b = self._take(stem + _B, (experts.out_features, rank * count))
            if a is not None and b is not None:
                # B's columns are in (rank, expert) order, A's rows in (expert, rank) order.
                b = b.view(experts.out_features, rank, count).permute(2, 1, 0)
                a = a.view(count, rank, experts.in_features)
                updates[experts.name] = self._update(a, b.float(), targets.scaling(experts.name))
        return updates, tuple(sorted(set(targets.ranks.values())))

    def read_modules(
        self, selection: Mapping[str, Any]
    ) -> tuple[dict[str, ExpertLowRank], tuple[int, ...]]:
        """Reads checkpoints in which every expert has factors of its own."""
        names = [
            module.format(expert)
            for experts in self.base.experts.values()
            for module in experts.modules
            for expert in range(experts.count)
        ]
        if not selection.get("target_modules"):
            self.findings.add("target_modules", say("SELECTS_NOTHING"))
            return {}, ()
        targets = self._resolve(selection, names)
        factors = self._factors(targets)
        if self.findings.fields or self.findings.mismatched:
            # Stop before the updates are allocated, because they may be a hundred times as large as
            # the file.
            return {}, ()
        updates = {}
        for experts in self.base.experts.values():
            update = self._of_modules(experts, targets, factors)
            if update is not None:
                updates[experts.name] = update
        return updates, tuple(sorted(set(targets.ranks.values())))

    def _resolve(self, selection: Mapping[str, Any], names: list[str]) -> Targets:
        targets = resolve_targets(selection, names, (), self.findings)
        # Check the rank before any tensor of that size is allocated.
        check_rank(self.path, max(targets.ranks.values(), default=0), self.max_rank)
        return targets

    def _factors(self, targets: Targets) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """The factors of each targeted module, if their shapes are right."""
        found = {}
        for experts in self.base.experts.values():
            width = experts.out_features // len(experts.modules)
            for module in experts.modules:
                for name in (module.format(e) for e in range(experts.count)):
                    if name in targets.targeted:
                        rank = targets.ranks[name]
                        down = self._take(name + _A, (rank, experts.in_features))
                        up = self._take(name + _B, (width, rank))
                        if down is not None and up is not None:
                            found[name] = down, up
        return found

    def _of_modules(
        self,
        experts: BaseExperts,
        targets: Targets,
        factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    ) -> ExpertLowRank | None:
        width = experts.out_features // len(experts.modules)
        ranks = [
            max((targets.ranks.get(m.format(e), 0) for e in range(experts.count)), default=0)
            for m in experts.modules
        ]
        if not any(ranks):
            return None
        a = torch.zeros(experts.count, sum(ranks), experts.in_features)
        b = torch.zeros(experts.count, sum(ranks), experts.out_features)
        for s, module in enumerate(experts.modules):
            first, columns = sum(ranks[:s]), slice(s * width, (s + 1) * width)
            for e in range(experts.count):
                name = module.format(e)
                if name in factors:
                    down, up = factors[name]
                    own = slice(first, first + targets.ranks[name])
                    a[e, own] = down
                    b[e, own, columns] = up.T.float() * targets.scaling(name)
        return self._update(a, b, 1.0)

    def _take(self, name: str, shape: tuple[int, int]) -> torch.Tensor | None:
        tensor = self.tensors.get(name)
        if tensor is None:
            self.findings.add(name, say("MISSING_TENSOR", by="the config"))
            return None
        self.used.add(name)
        return tensor if self.findings.check_shape(name, tensor, shape) else None

    def _update(self, a: torch.Tensor, b: torch.Tensor, scaling: float) -> ExpertLowRank:
        dtype = self.base.dtype
        scaled = b if scaling == 1.0 else b * scaling
        return ExpertLowRank(a.to(dtype).contiguous(), scaled.to(dtype).contiguous())
