"""Rules for the keys that methods share: modules to adapt, and with what rank and alpha."""

from __future__ import annotations

from turret.server.adapters.peft_format.config.rules import (
    COMMON_RULES,
    Irrelevant,
    Rules,
    Used,
    is_number,
    is_one_of,
    is_optional_bool,
    is_rank,
)
from turret.server.adapters.peft_format.config.targets import (
    is_alpha_pattern,
    is_layer_indexes,
    is_module_selector,
    is_optional_module_selector,
    is_rank_pattern,
)
from turret.server.adapters.peft_format.config.vocabulary_rules import is_modules_to_save

RANK, ALPHA = Used(is_rank), Used(is_number)

TARGET_RULES: Rules = {
    **COMMON_RULES,
    "target_modules": Used(is_module_selector),
    "modules_to_save": Used(is_modules_to_save),
}

SELECTION_RULES: Rules = {
    **TARGET_RULES,
    "exclude_modules": Used(is_optional_module_selector),
}

LAYER_RULES: Rules = {
    "layers_to_transform": Used(is_layer_indexes),
    "layers_pattern": Used(is_optional_module_selector),
}

PATTERN_RULES: Rules = {
    "rank_pattern": Used(is_rank_pattern),
    "alpha_pattern": Used(is_alpha_pattern),
}

# For Conv1D bases such as GPT-2. On linear modules PEFT sets it to false, and so loads what it
# would without it; ``finish`` warns.
CONV1D_RULES: Rules = {"fan_in_fan_out": Used(is_optional_bool)}

DROPOUT = Irrelevant("dropout is off at inference")
START = Irrelevant("sets the starting point of training")


def bias_rules(only: str) -> Rules:
    """The ``bias`` key; ``only`` is its value for the targeted modules' biases."""
    return {"bias": Used(is_one_of("none", "all", only))}


# Written by PEFT's configs for LyCORIS methods; both methods ignore the last four at inference.
LYCORIS_RULES: Rules = {
    **SELECTION_RULES,
    **LAYER_RULES,
    **PATTERN_RULES,
    "r": RANK,
    "alpha": ALPHA,
    "rank_dropout": DROPOUT,
    "module_dropout": DROPOUT,
    "init_weights": START,
    "use_effective_conv2d": Irrelevant("read for convolutions; the models served have none"),
}
