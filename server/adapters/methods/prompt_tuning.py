"""Prompt tuning (arXiv 2104.08691): learned embeddings before the prompt, computed like tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from turret.server.adapters.base import BaseModel
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.lowering.lowered import Lowered
from turret.server.adapters.lowering.soft_tokens import lower_soft_tokens
from turret.server.adapters.peft_format.prompt_checkpoint import PROMPT_RULES
from turret.server.adapters.peft_format.rules import Irrelevant, Rules

PROMPT_TUNING_RULES: Rules = {
    **PROMPT_RULES,
    "prompt_tuning_init": Irrelevant("sets the starting point of training"),
    "prompt_tuning_init_text": Irrelevant("sets the starting point of training"),
    "tokenizer_name_or_path": Irrelevant("read with prompt_tuning_init_text"),
    "tokenizer_kwargs": Irrelevant("read with prompt_tuning_init_text"),
}


class PromptTuningMethod:
    name = "prompt_tuning"
    peft_types = frozenset({"PROMPT_TUNING"})
    rules = PROMPT_TUNING_RULES

    def accepts(self, config: Mapping[str, Any]) -> bool:
        return True

    def lower(
        self, checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None
    ) -> Lowered:
        return lower_soft_tokens(checkpoint, base, self.rules)


METHOD = PromptTuningMethod()
