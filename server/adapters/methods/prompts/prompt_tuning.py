"""Prompt tuning (arXiv 2104.08691): learned embeddings before the prompt, computed like tokens."""

from __future__ import annotations

from turret.server.adapters.methods.kit import *
from turret.server.adapters.methods.prompt_kit import WITH_TEXT, SoftTokens

METHOD = SoftTokens(
    name="prompt_tuning",
    peft_types={"PROMPT_TUNING"},
    ignored={"prompt_tuning_init": START, "prompt_tuning_init_text": START, **WITH_TEXT},
)
