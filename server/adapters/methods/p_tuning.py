"""P-tuning (arXiv 2103.10385): soft tokens made by an encoder; PEFT saves only the tokens."""

from __future__ import annotations

from turret.server.adapters.methods.kit import *
from turret.server.adapters.methods.prompt_kit import SoftTokens

METHOD = SoftTokens(
    name="p_tuning",
    peft_types={"P_TUNING"},
    ignored={
        "encoder_reparameterization_type": IN_TENSORS,
        "encoder_hidden_size": IN_TENSORS,
        "encoder_num_layers": IN_TENSORS,
        "encoder_dropout": IN_TENSORS,
    },
)
