"""The keys of a ``peft_type: LORA`` config: every one has a rule, and a test counts them."""

from __future__ import annotations

from typing import Any

from turret.server.adapters.peft_format.rules import (
    Irrelevant,
    Rejected,
    Rules,
    Used,
    is_bool,
    is_one_of,
    is_optional_bool,
)
from turret.server.adapters.peft_format.selection_rules import (
    ALPHA,
    CONV1D_RULES,
    LAYER_RULES,
    PATTERN_RULES,
    RANK,
    SELECTION_RULES,
)
from turret.server.adapters.peft_format.vocabulary_rules import is_token_indices

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


_VARIANT = "is not served by this version; train the adapter without it"

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
    "target_parameters": Rejected(
        (None, []), "LoRA on bare parameters (experts) is not served; target linear modules"
    ),
    "layer_replication": Rejected(
        (None, []), "changes the base model's depth; serve the replicated model as its own base"
    ),
    "alora_invocation_tokens": Rejected(
        (None,), "an activated LoRA switches on within the prompt, which is not served"
    ),
    "use_qalora": Rejected((False, None), "pools the input of lora_A; " + _VARIANT),
    "use_bdlora": Rejected((None, False), "makes the factors block-diagonal; " + _VARIANT),
    "arrow_config": Rejected((None,), "routes between adapters per token; " + _VARIANT),
    "kasa_config": Rejected((None,), "adds a diagonal between the factors; " + _VARIANT),
    "velora_config": Rejected((None,), _VARIANT),
    "monteclora_config": Rejected((None,), "samples the weights; " + _VARIANT),
    "enable_lora": Rejected(
        (None,), "adapts slices of a fused projection; save the adapter with a current PEFT"
    ),
    "lora_dropout": Irrelevant("dropout is off at inference"),
    "qalora_group_size": Irrelevant("read only with use_qalora, which is refused"),
    "loftq_config": Irrelevant("read only at initialisation, which init_lora_weights names"),
    "eva_config": Irrelevant("read only at initialisation, which init_lora_weights names"),
    "corda_config": Irrelevant("read only at initialisation, which init_lora_weights names"),
    "lora_ga_config": Irrelevant("read only at initialisation, which init_lora_weights names"),
    "megatron_config": Irrelevant("picks the layer class in Megatron training"),
    "megatron_core": Irrelevant("picks the layer class in Megatron training"),
    "merge_weights": Irrelevant("merging behaviour of early PEFT versions in training"),
}
