"""P-tuning (arXiv 2103.10385): soft tokens that an encoder makes; PEFT saves what it made."""

from __future__ import annotations

from turret.server.adapters.lowering.soft_tokens import soft_tokens_method
from turret.server.adapters.peft_format.config.rules import Irrelevant, Rules
from turret.server.adapters.peft_format.prompt_checkpoint import PROMPT_RULES

_ENCODER = Irrelevant("the file holds the encoder's output")

P_TUNING_RULES: Rules = {
    **PROMPT_RULES,
    "encoder_reparameterization_type": _ENCODER,
    "encoder_hidden_size": _ENCODER,
    "encoder_num_layers": _ENCODER,
    "encoder_dropout": _ENCODER,
}

METHOD = soft_tokens_method("p_tuning", "P_TUNING", P_TUNING_RULES)
