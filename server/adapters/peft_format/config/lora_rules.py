"""The keys of a ``peft_type: LORA`` config: every one has a rule, and a test counts them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from turret.server.adapters.peft_format.config.rules import (
    Irrelevant,
    Rejected,
    Rules,
    Used,
    is_bool,
    is_one_of,
    is_optional_bool,
    is_rank,
)
from turret.server.adapters.peft_format.config.selection_rules import (
    ALPHA,
    CONV1D_RULES,
    DROPOUT,
    LAYER_RULES,
    PATTERN_RULES,
    RANK,
    SELECTION_RULES,
)
from turret.server.adapters.peft_format.config.targets import MAX_LIST_ITEMS, is_module_selector
from turret.server.adapters.peft_format.config.vocabulary_rules import is_token_indices

# Initialisations that leave the base weights as they were; they only set the starting point.
PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
# Initialisations that move part of the base weights into the adapter.
MUTATING_INITS = ("pissa", "olora", "corda", "lora_ga")


def is_served_init(value: Any) -> str | None:
    """``init_lora_weights``: refuses the kinds whose adapter only fits a changed base."""
    if isinstance(value, bool) or (isinstance(value, str) and value.lower() in PLAIN_INITS):
        return None
    text = str(value).lower()
    if text.startswith(MUTATING_INITS):
        return (
            f"is {text!r:.40}: the adapter was trained on base weights this initialisation changed;"
            " save it again with PEFT's path_initial_model_for_weight_conversion to make it a"
            " plain LoRA"
        )
    if text == "loftq":
        return (
            "is 'loftq': the adapter compensates the error of another quantised base; train it on"
            " the base served here or convert it to a plain LoRA"
        )
    return f"is {value!r:.40}, an initialisation this version does not know"


# Key of an activated LoRA.
INVOCATION = "alora_invocation_tokens"
# Key of a router between LoRAs.
ARROW = "arrow_config"
# Keys that each make LoRA another method; PEFT allows one of them at a time.
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


def _is_names(value: Any) -> str | None:
    is_list = isinstance(value, list) and len(value) <= MAX_LIST_ITEMS
    if value is None or (is_list and all(isinstance(name, str) and name for name in value)):
        return None
    return "must be a list of names or null"


def _is_invocation(value: Any) -> str | None:
    """At least one token, as in PEFT's search."""
    is_list = isinstance(value, list) and 0 < len(value) <= MAX_LIST_ITEMS
    if value is None or (is_list and all(type(token) is int and token >= 0 for token in value)):
        return None
    return "must be a list of one or more token ids, or null"


def _is_selector(value: Any) -> str | None:
    return None if value == [] else is_module_selector(value)


def _is_object_of(*keys: str) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        if value is None or (isinstance(value, dict) and value.keys() <= set(keys)):
            return None
        return f"must be null or an object with no other keys than {', '.join(keys)}"

    return check


def _is_bd_lora(value: Any) -> str | None:
    if value is False:
        return None
    problem = _is_object_of(*_BD_LORA_LISTS, "nblocks", "match_strict")(value)
    if value is None or problem is not None:
        return problem
    for key in _BD_LORA_LISTS:
        problem = problem or _is_names(value.get(key))
    return problem or is_rank(value.get("nblocks"))


LORA_RULES: Rules = {
    **SELECTION_RULES,
    **LAYER_RULES,
    **PATTERN_RULES,
    **CONV1D_RULES,
    "r": RANK,
    "lora_alpha": ALPHA,
    "use_rslora": Used(is_bool),
    "use_dora": Used(is_bool),
    "lora_bias": Used(is_bool),
    "bias": Used(is_one_of("none", "all", "lora_only")),
    "init_lora_weights": Used(is_served_init),
    "trainable_token_indices": Used(is_token_indices),
    "ensure_weight_tying": Used(is_optional_bool),
    "target_modules": Used(_is_selector),
    "target_parameters": Used(_is_names),
    "layer_replication": Rejected(
        (None, []), "changes the base model's depth; serve the replicated model as its own base"
    ),
    INVOCATION: Used(_is_invocation),
    "use_qalora": Used(is_optional_bool),
    "use_bdlora": Used(_is_bd_lora),
    "kasa_config": Used(_is_object_of("beta", "gamma")),
    "velora_config": Used(_is_object_of("num_groups", "scale", "init_type")),
    "monteclora_config": Used(_is_object_of(*_MONTECLORA_KEYS)),
    ARROW: Used(_is_object_of(*_ARROW_KEYS)),
    "enable_lora": Rejected(
        (None,), "adapts slices of a fused projection; save the adapter with a current PEFT"
    ),
    "lora_dropout": DROPOUT,
    "qalora_group_size": Irrelevant("read only with use_qalora"),
    "loftq_config": Irrelevant("read only at initialisation, which init_lora_weights names"),
    "eva_config": Irrelevant("read only at initialisation, which init_lora_weights names"),
    "corda_config": Irrelevant("read only at initialisation, which init_lora_weights names"),
    "lora_ga_config": Irrelevant("read only at initialisation, which init_lora_weights names"),
    "megatron_config": Irrelevant("picks the layer class in Megatron training"),
    "megatron_core": Irrelevant("picks the layer class in Megatron training"),
    "merge_weights": Irrelevant("merging behaviour of early PEFT versions in training"),
}
