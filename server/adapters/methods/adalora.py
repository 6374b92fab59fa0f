"""AdaLoRA (arXiv 2303.10512): ``Δ(x) = s·B (E ⊙ (A x))``; training prunes the ranks.

``s`` is PEFT's ``lora_alpha / (init_r + 1e-5)``. All modules have the same ``s``, even those that
were pruned to a lower rank or to 0.
"""

from __future__ import annotations

from turret.server.adapters.methods.kit import *
from turret.server.adapters.peft_format.lora_rules import (
    LORA_IGNORED,
    LORA_KEYS,
    LORA_REFUSED,
    VARIANTS,
)

# Number of ranks that are left after pruning.
_N = extent("lora_E", 0)
# PEFT adds this to the rank that it divides by.
_EPSILON = 1e-5
_UNREAD = "AdaLoRA does not read it"
_TOGETHER = "it cannot be combined with AdaLoRA"


def _fault_of_mask(value: Any) -> Text | None:
    is_mask = isinstance(value, list) and all(isinstance(kept, bool) for kept in value)
    return None if is_mask else invalid(value, "a list of true and false")


def _check_masks(adapter: Reading) -> None:
    """Check the ranks in the file against ``init_r`` and the masks of ``rank_pattern``."""
    start = adapter.config["init_r"]
    ranks = dict.fromkeys(adapter.modules, start)
    for key, mask in (adapter.config.get("rank_pattern") or {}).items():
        name = key.removesuffix(".default").removesuffix(".lora_E")
        if name not in ranks:
            adapter.fault("rank_pattern", say("NO_SUCH_MODULE", module=name))
        elif len(mask) != start:
            why = say("WRONG_COUNT", found=len(mask), what="rank components", expected=start)
            adapter.fault("rank_pattern", say("INVALID_ENTRY", entry=key, why=why))
        else:
            ranks[name] = sum(mask)
    for name, rank in ranks.items():
        found = _N.of(adapter.modules[name])
        if found != rank:
            why = say("WRONG_RANK", rank=found, by="the config", expected=rank)
            adapter.fault(f"{name}.lora_E", why)


def _operators(m: Module) -> Pieces:
    a, b, e = m.wide("lora_A", "lora_B", "lora_E")
    scaling = m.config["lora_alpha"] / (m.config["init_r"] + _EPSILON)
    # Fold E into the same factor as the scaling, so that each factor is rounded only once.
    return low_rank(a, b * e.reshape(1, -1) * scaling) if len(a) else ()


METHOD = LinearMethod(
    name="adalora",
    peft_types={"ADALORA"},
    # AdaLoRA's config extends LoRA's.
    keys={
        **without(LORA_KEYS, "target_modules"),
        # PEFT would replace an alpha of 0 by a rank, and that rank changes during training.
        "lora_alpha": fault_of_positive,
        "rank_pattern": fault_of_patterns(_fault_of_mask),
    },
    ignored={
        **LORA_IGNORED,
        "r": _UNREAD,
        "use_rslora": _UNREAD,
        "alpha_pattern": _UNREAD,
        "target_r": IN_TENSORS,
        "tinit": TRAINING,
        "tfinal": TRAINING,
        "deltaT": TRAINING,
        "total_step": TRAINING,
        "beta1": TRAINING,
        "beta2": TRAINING,
        "orth_reg_weight": TRAINING,
    },
    refused={
        **LORA_REFUSED,
        **dict.fromkeys(VARIANTS, ((False, None), _TOGETHER)),
        "lora_bias": ((False, None), "it has no effect on AdaLoRA; train without it"),
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
