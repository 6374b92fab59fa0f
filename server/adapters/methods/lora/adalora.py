"""AdaLoRA (arXiv 2303.10512): ``Δ(x) = s·B (E ⊙ (A x))``, ranks pruned during training.

``s`` is PEFT's ``lora_alpha / (init_r + 1e-5)``: it divides by the initial rank in every module,
also in those that were pruned, down to rank 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from turret.server.adapters.methods.kit import *
from turret.server.adapters.peft_format.config.lora_rules import (
    LORA_IGNORED,
    LORA_KEYS,
    LORA_REFUSED,
    VARIANTS,
)
from turret.server.basics.counted import counted

# Number of ranks that are left after pruning.
_N = extent("lora_E", 0)
# PEFT adds this to the rank that it divides by.
_EPSILON = 1e-5
_UNREAD = "AdaLoRA's layers do not read it"
_SCHEDULE = "schedule of the pruning"
_TOGETHER = "cannot be combined with AdaLoRA"


def _is_alpha(value: Any) -> str | None:
    problem = is_number(value)
    if problem is None and value <= 0:
        # PEFT would replace 0 by a rank, and that rank changes during training.
        return "must be greater than 0"
    return problem


def _is_masks(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or len(value) > MAX_LIST_ITEMS:
        return f"must be an object with at most {MAX_LIST_ITEMS} keys"
    for key, mask in value.items():
        if not isinstance(mask, list) or not all(isinstance(kept, bool) for kept in mask):
            return f"{key!r} must be a list of true and false"
    return None


def _check_masks(adapter: Reading) -> None:
    """The ranks in the file against ``init_r`` and the masks of ``rank_pattern``."""
    start = adapter.config["init_r"]
    ranks = dict.fromkeys(adapter.modules, start)
    for key, mask in (adapter.config.get("rank_pattern") or {}).items():
        name = key.removesuffix(".default").removesuffix(".lora_E")
        if name not in ranks:
            adapter.fault("rank_pattern", f"{key!r:.120} is no adapted module's lora_E")
        elif len(mask) != start:
            why = f"{key!r:.120} masks {counted(len(mask), 'rank')}, init_r is {start}"
            adapter.fault("rank_pattern", why)
        else:
            ranks[name] = sum(mask)
    for name, rank in ranks.items():
        there = _N.of(adapter.modules[name])
        if there != rank:
            why = f"has rank {there}, the config says {rank}; {OTHER_TRAINING}"
            adapter.fault(f"{name}.lora_E", why)


def _operators(m: Module) -> Pieces:
    a, b, e = m.wide("lora_A", "lora_B", "lora_E")
    scaling = m.config["lora_alpha"] / (m.config["init_r"] + _EPSILON)
    # E is folded in where the scaling is, so that both factors are rounded only once.
    return low_rank(a, b * e.reshape(1, -1) * scaling) if len(a) else ()


METHOD = LinearMethod(
    name="adalora",
    peft_types={"ADALORA"},
    # AdaLoRA's config extends LoRA's.
    keys={
        **LORA_KEYS,
        **EXCLUDE,
        "init_r": is_rank,
        "lora_alpha": _is_alpha,
        "rank_pattern": _is_masks,
    },
    ignored={
        **LORA_IGNORED,
        "r": "AdaLoRA starts from init_r",
        "use_rslora": _UNREAD,
        "alpha_pattern": _UNREAD,
        "target_r": "aim of the pruning; the tensors show the result",
        "tinit": _SCHEDULE,
        "tfinal": _SCHEDULE,
        "deltaT": _SCHEDULE,
        "total_step": _SCHEDULE,
        "beta1": "smoothing of the pruning",
        "beta2": "smoothing of the pruning",
        "orth_reg_weight": "weight of a training loss",
    },
    refused={
        **LORA_REFUSED,
        **dict.fromkeys(VARIANTS, ((False, None), _TOGETHER)),
        "lora_bias": ((False, None), "has no effect on AdaLoRA; train without it"),
        "target_parameters": ((None, []), _TOGETHER),
    },
    bias=("lora_only",),
    rank="init_r",
    rank_of=_N.of,
    alpha="lora_alpha",
    tensors={"lora_E": (_N, 1), "lora_A": (_N, IN), "lora_B": (OUT, _N)},
    check_all=_check_masks,
    operators=_operators,
)
