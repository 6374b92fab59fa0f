"""Settings of an adapter's config that no method takes, told without torch.

A LoRA's rules are read as its methods read them. Those of other types lie beside their method's
mathematics, which needs torch; what a start knows of them is here: settings that are one number or
one switch, and patterns of such. A test compares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.peft_format.config.lora_rules import ARROW, LORA_RULES
from turret.server.adapters.peft_format.config.rules import (
    Rules,
    Used,
    check_config,
    is_bool,
    is_count,
    is_number,
    is_rank,
    is_seed,
)
from turret.server.adapters.peft_format.config.targets import is_alpha_pattern, is_rank_pattern
from turret.server.adapters.peft_format.refusals.unserved import peft_type_of

_PROMPTS = (
    *("CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "PROMPT_TUNING"),
    "P_TUNING",
)
# What is checked → key → the types whose config has it.
_CHECKED: Mapping[Callable[[Any], str | None], Mapping[str, tuple[str, ...]]] = {
    is_rank: {
        "r": (
            *("BONE", "DEFT", "DELORA", "GLORA", "GRALORA", "HIRA", "HRA", "LOHA", "LOKR", "MISS"),
            *("PEANUT", "POLY", "PVERA", "RANDLORA", "SHIRA", "TINYLORA", "UNILORA", "VBLORA"),
            "VERA",
        ),
        **dict.fromkeys(("adapter_layers", "adapter_len"), ("ADAPTION_PROMPT",)),
        "block_size": ("C3A",),
        "boft_n_butterfly_factor": ("BOFT",),
        "d_k": ("TURRET_FUSION",),
        "gralora_k": ("GRALORA",),
        **dict.fromkeys(("hidden_size", "xlora_size"), ("XLORA",)),
        "init_r": ("ADALORA",),
        "mini_r": ("BONE", "MISS"),
        **dict.fromkeys(("n_skills", "n_splits", "n_tasks"), ("POLY",)),
        "num_cayley_neumann_terms": ("OFT",),
        **dict.fromkeys(("num_ranks", "num_tasks"), ("MULTITASK_PROMPT_TUNING",)),
        **dict.fromkeys(("num_vectors", "topk", "vector_length"), ("VBLORA",)),
        **dict.fromkeys(("num_virtual_tokens", "token_dim"), _PROMPTS),
        "theta_d_length": ("UNILORA",),
        "u": ("TINYLORA",),
    },
    is_count: {
        **dict.fromkeys(("boft_block_num", "boft_block_size"), ("BOFT",)),
        "hybrid_r": ("GRALORA",),
        **dict.fromkeys(("oft_block_size", "r"), ("OFT",)),
    },
    is_number: {
        "alpha": ("GRALORA", "LOHA", "LOKR"),
        "eps": ("OFT",),
        "lora_alpha": ("ADALORA",),
        "randlora_alpha": ("RANDLORA",),
        "scaling": ("FOURIERFT", "PEANUT", "WAVEFT"),
        "softmax_temperature": ("XLORA",),
        **dict.fromkeys(
            ("global_scaling_weight", "scaling_pass_value", "xlora_dropout_p"), ("XLORA",)
        ),
    },
    is_bool: {
        "apply_GS": ("HRA",),
        **dict.fromkeys(("block_share", "coft", "use_cayley_neumann"), ("OFT",)),
        **dict.fromkeys(
            ("enable_softmax", "enable_softmax_topk", "layerwise_scalings"), ("XLORA",)
        ),
        "para": ("DEFT",),
        "save_indices": ("UNILORA",),
        "save_only_topk_weights": ("VBLORA",),
        "save_projection": ("PVERA", "RANDLORA", "TINYLORA", "VERA"),
        "use_idwt": ("WAVEFT",),
    },
    is_seed: {
        "proj_seed": ("UNILORA",),
        "projection_prng_key": ("PVERA", "RANDLORA", "VERA"),
        "projection_seed": ("TINYLORA",),
        "random_loc_seed": ("FOURIERFT", "WAVEFT"),
    },
    is_rank_pattern: {
        "block_size_pattern": ("C3A",),
        "rank_pattern": ("DELORA", "HIRA", "LOHA", "LOKR"),
    },
    is_alpha_pattern: {"alpha_pattern": ("LOHA", "LOKR")},
}
_CLASSIFIER = "SEQ_CLS"


def check_settings(config: Mapping[str, Any], findings: Findings) -> None:
    """Note what the methods would note of a config's settings, in their words."""
    rules = early_rules(config)
    # Of other types, and of a LoRA's classifier, more keys are known than are checked here.
    is_plain = peft_type_of(config) == "LORA" and config.get("task_type") != _CLASSIFIER
    unknown = config.keys() - LORA_RULES.keys() if rules and is_plain else set()
    known = {key: value for key, value in config.items() if key in rules or key in unknown}
    check_config(known, rules, findings)


def early_rules(config: Mapping[str, Any]) -> Rules:
    """Rules for some of a config's keys, or for all that a LoRA may have."""
    kind = peft_type_of(config)
    if kind != "LORA":
        return {
            key: Used(check)
            for check, keys in _CHECKED.items()
            for key, types in keys.items()
            if kind in types
        }
    if config.get(ARROW) is not None:
        # A router has no update of its own, which most of these would be about.
        return {}
    left: set[str] = set()
    if config.get("target_parameters"):
        # They add to it.
        left.add("target_modules")
    if config.get("task_type") == _CLASSIFIER:
        left |= {"task_type", "modules_to_save"}
    return {key: rule for key, rule in LORA_RULES.items() if key not in left}
