"""The keys of a LoRA's config, which its variants, embeddings and experts share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from turret.server.adapters.peft_format.config_rules import (
    DROPOUT,
    PEFTS_WORK,
    START,
    Check,
    fault_of_bool,
    fault_of_number,
    fault_of_rank,
    fault_of_token_indices,
    invalid,
    optional,
)
from turret.server.adapters.peft_format.linear_format import PATTERNS, SELECTION
from turret.server.adapters.peft_format.targets import MAX_LIST_ITEMS, fault_of_module_selector
from turret.server.words import Text, say

# Initialisations that leave the base weights unchanged and only set the starting point.
PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
# Initialisations that move part of the base weights into the adapter.
MUTATING_INITS = ("pissa", "olora", "corda", "lora_ga")


def fault_of_init(value: Any) -> Text | None:
    """Checks ``init_lora_weights``: rejects the kinds whose adapters only fit a changed base."""
    if isinstance(value, bool) or (isinstance(value, str) and value.lower() in PLAIN_INITS):
        return None
    text = str(value).lower()
    if text.startswith(MUTATING_INITS):
        why = (
            "this initialisation changed the base weights; save the adapter again with PEFT's"
            " path_initial_model_for_weight_conversion, which makes a plain LoRA"
        )
    elif text == "loftq":
        why = "the adapter corrects the error of another quantised base; train it on this base"
    else:
        why = "this version does not know the initialisation"
    return say("UNSUPPORTED_VALUE", value=value, why=why)


# Config key of an activated LoRA.
INVOCATION = "alora_invocation_tokens"
# Config key of a router between LoRAs.
ARROW = "arrow_config"
# Keys that select a variant of LoRA. PEFT allows one of them at a time.
VARIANTS = (
    "use_dora",
    "use_bdlora",
    "use_qalora",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    INVOCATION,
    ARROW,
)
_MONTECLORA_KEYS = (
    *("sample_scaler", "kl_loss_weight", "buffer_size"),
    *("num_samples", "dirichlet_prior", "use_entropy"),
)
_ARROW_KEYS = (
    *("top_k", "router_temperature", "rng_seed"),
    *("task_adapter_names", "use_gks", "gks_adapter_names"),
)
_BD_LORA_LISTS = ("target_modules_bd_a", "target_modules_bd_b")


def _fault_of_names(value: Any) -> Text | None:
    is_list = isinstance(value, list) and len(value) <= MAX_LIST_ITEMS
    if value is None or (is_list and all(isinstance(name, str) and name for name in value)):
        return None
    return invalid(value, "a list of names or null")


def _fault_of_invocation(value: Any) -> Text | None:
    """Rejects an empty invocation, because PEFT searches for at least one token."""
    is_list = isinstance(value, list) and 0 < len(value) <= MAX_LIST_ITEMS
    if value is None or (is_list and all(type(token) is int and token >= 0 for token in value)):
        return None
    return invalid(value, "a list of one or more token ids, or null")


def _fault_of_selector(value: Any) -> Text | None:
    return None if value == [] else fault_of_module_selector(value)


def _fault_of_object(*keys: str) -> Check:
    def check(value: Any) -> Text | None:
        if value is None or (isinstance(value, dict) and value.keys() <= set(keys)):
            return None
        return invalid(value, f"null or an object with only the keys {', '.join(keys)}")

    return check


def _fault_of_bd_lora(value: Any) -> Text | None:
    if value is False:
        return None
    problem = _fault_of_object(*_BD_LORA_LISTS, "nblocks", "match_strict")(value)
    if value is None or problem is not None:
        return problem
    for key in _BD_LORA_LISTS:
        problem = problem or _fault_of_names(value.get(key))
    return problem or fault_of_rank(value.get("nblocks"))


LORA_KEYS: Mapping[str, Check] = {
    **SELECTION,
    **PATTERNS,
    "target_modules": _fault_of_selector,
    "r": fault_of_rank,
    "lora_alpha": fault_of_number,
    "use_rslora": fault_of_bool,
    "use_dora": fault_of_bool,
    "lora_bias": fault_of_bool,
    "init_lora_weights": fault_of_init,
    "trainable_token_indices": fault_of_token_indices,
    "ensure_weight_tying": optional(fault_of_bool),
    "target_parameters": _fault_of_names,
    INVOCATION: _fault_of_invocation,
    "use_qalora": optional(fault_of_bool),
    "use_bdlora": _fault_of_bd_lora,
    "kasa_config": _fault_of_object("beta", "gamma"),
    "velora_config": _fault_of_object("num_groups", "scale", "init_type"),
    "monteclora_config": _fault_of_object(*_MONTECLORA_KEYS),
    ARROW: _fault_of_object(*_ARROW_KEYS),
}
# The keys that determine ranks and alphas, and those that select modules.
SIZES = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
CHOICE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


def well_formed(config: Mapping[str, Any], *keys: str) -> dict[str, Any] | None:
    """Some keys of a config; None if a value is invalid, which the method's rules report."""
    chosen = {key: config[key] for key in keys if key in config}
    return None if any(LORA_KEYS[key](value) for key, value in chosen.items()) else chosen


LORA_IGNORED: Mapping[str, str] = {
    "lora_dropout": DROPOUT,
    "qalora_group_size": "read only with use_qalora",
    "loftq_config": START,
    "eva_config": START,
    "corda_config": START,
    "lora_ga_config": START,
    "megatron_config": PEFTS_WORK,
    "megatron_core": PEFTS_WORK,
    "merge_weights": PEFTS_WORK,
}
LORA_REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "layer_replication": (
        (None, []),
        "it changes the base model's depth; serve the replicated model as its own base",
    ),
    "enable_lora": (
        (None,),
        "it adapts slices of a fused projection; save the adapter with a current PEFT",
    ),
}
