"""P-tuning (arXiv 2103.10385): soft tokens that an encoder makes; PEFT saves what it made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from turret.server.adapters.base import BaseModel
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.lowering.lowered import Lowered
from turret.server.adapters.lowering.soft_tokens import lower_soft_tokens
from turret.server.adapters.peft_format.prompt_checkpoint import PROMPT_RULES
from turret.server.adapters.peft_format.rules import Irrelevant, Rules

_ENCODER = Irrelevant("the file holds the encoder's output")

P_TUNING_RULES: Rules = {
    **PROMPT_RULES,
    "encoder_reparameterization_type": _ENCODER,
    "encoder_hidden_size": _ENCODER,
    "encoder_num_layers": _ENCODER,
    "encoder_dropout": _ENCODER,
}


class PTuningMethod:
    name = "p_tuning"
    peft_types = frozenset({"P_TUNING"})
    rules = P_TUNING_RULES

    def accepts(self, config: Mapping[str, Any]) -> bool:
        return True

    def lower(
        self, checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None
    ) -> Lowered:
        return lower_soft_tokens(checkpoint, base, self.rules)


METHOD = PTuningMethod()
