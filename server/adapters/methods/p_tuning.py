"""P-tuning (arXiv 2103.10385): soft tokens made by an encoder; PEFT saves only the tokens."""

from __future__ import annotations

from turret.server.adapters.methods.prompt_kit import SoftTokens

_ENCODER = "the file contains the encoder's output"

METHOD = SoftTokens(
    name="p_tuning",
    peft_types={"P_TUNING"},
    ignored={
        "encoder_reparameterization_type": _ENCODER,
        "encoder_hidden_size": _ENCODER,
        "encoder_num_layers": _ENCODER,
        "encoder_dropout": _ENCODER,
    },
)
