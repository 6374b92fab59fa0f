"""Rules for the keys that methods share: modules to adapt, and with what rank and alpha."""

from __future__ import annotations

from turret.server.adapters.peft_format.rules import (
    COMMON_RULES,
    Irrelevant,
    Rejected,
    Rules,
    Used,
    is_number,
    is_rank,
)
from turret.server.adapters.peft_format.targets import (
    is_alpha_pattern,
    is_layer_indexes,
    is_module_selector,
    is_optional_module_selector,
    is_rank_pattern,
)
from turret.server.adapters.peft_format.vocabulary_rules import is_modules_to_save

RANK, ALPHA = Used(is_rank), Used(is_number)

SELECTION_RULES: Rules = {
    **COMMON_RULES,
    "target_modules": Used(is_module_selector),
    "exclude_modules": Used(is_optional_module_selector),
    "modules_to_save": Used(is_modules_to_save),
}

LAYER_RULES: Rules = {
    "layers_to_transform": Used(is_layer_indexes),
    "layers_pattern": Used(is_optional_module_selector),
}

PATTERN_RULES: Rules = {
    "rank_pattern": Used(is_rank_pattern),
    "alpha_pattern": Used(is_alpha_pattern),
}

CONV1D_RULES: Rules = {
    "fan_in_fan_out": Rejected(
        (False, None),
        "is for Conv1D bases such as GPT-2; no base model served here stores weights that way",
    ),
}

# Written by PEFT's configs for LyCORIS methods; both methods ignore the last four at inference.
LYCORIS_RULES: Rules = {
    **SELECTION_RULES,
    **LAYER_RULES,
    **PATTERN_RULES,
    "r": RANK,
    "alpha": ALPHA,
    "rank_dropout": Irrelevant("dropout is off at inference"),
    "module_dropout": Irrelevant("dropout is off at inference"),
    "init_weights": Irrelevant("sets the starting point of training"),
    "use_effective_conv2d": Irrelevant("read for convolutions; the models served have none"),
}
