"""Prompt tuning (arXiv 2104.08691): learned embeddings before the prompt, computed like tokens."""

from __future__ import annotations

from turret.server.adapters.lowering.soft_tokens import soft_tokens_method
from turret.server.adapters.peft_format.config.rules import Irrelevant, Rules
from turret.server.adapters.peft_format.prompt_checkpoint import PROMPT_RULES

PROMPT_TUNING_RULES: Rules = {
    **PROMPT_RULES,
    "prompt_tuning_init": Irrelevant("sets the starting point of training"),
    "prompt_tuning_init_text": Irrelevant("sets the starting point of training"),
    "tokenizer_name_or_path": Irrelevant("read with prompt_tuning_init_text"),
    "tokenizer_kwargs": Irrelevant("read with prompt_tuning_init_text"),
}

METHOD = soft_tokens_method("prompt_tuning", "PROMPT_TUNING", PROMPT_TUNING_RULES)
