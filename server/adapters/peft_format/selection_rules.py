"""Rules for the keys that say which modules an adapter touches, as all methods share them."""

from __future__ import annotations

from turret.server.adapters.peft_format.lora_rules import LORA_RULES
from turret.server.adapters.peft_format.rules import COMMON_RULES, Irrelevant, Rules, Used
from turret.server.adapters.peft_format.targets import (
    is_layer_indexes,
    is_module_selector,
    is_optional_module_selector,
)

SELECTION_RULES: Rules = {
    **COMMON_RULES,
    "target_modules": Used(is_module_selector),
    "exclude_modules": Used(is_optional_module_selector),
    "modules_to_save": LORA_RULES["modules_to_save"],
}

LAYER_RULES: Rules = {
    "layers_to_transform": Used(is_layer_indexes),
    "layers_pattern": Used(is_optional_module_selector),
}

# Written by PEFT's configs for LyCORIS methods; both methods ignore them at inference.
LYCORIS_RULES: Rules = {
    **SELECTION_RULES,
    **LAYER_RULES,
    "r": LORA_RULES["r"],
    "alpha": LORA_RULES["lora_alpha"],
    "rank_pattern": LORA_RULES["rank_pattern"],
    "alpha_pattern": LORA_RULES["alpha_pattern"],
    "rank_dropout": Irrelevant("dropout is off at inference"),
    "module_dropout": Irrelevant("dropout is off at inference"),
    "init_weights": Irrelevant("sets the starting point of training"),
    "use_effective_conv2d": Irrelevant("read for convolutions; the models served have none"),
}
