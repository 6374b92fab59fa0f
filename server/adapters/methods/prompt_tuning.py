"""Prompt tuning (arXiv 2104.08691): learned embeddings before the prompt, computed like tokens."""

from __future__ import annotations

from turret.server.adapters.checkpoint import PROMPT_EMBEDDINGS
from turret.server.adapters.methods.kit import *
from turret.server.adapters.methods.prompt_kit import WITH_TEXT, SoftTokens


def _start(m: NewModule) -> dict[str, torch.Tensor]:
    # The rank is the number of soft tokens. PEFT draws them from a normal distribution, too.
    return {PROMPT_EMBEDDINGS: m.normal(m.rank, m.inputs)}


METHOD = SoftTokens(
    name="prompt_tuning",
    peft_types={"PROMPT_TUNING"},
    ignored={"prompt_tuning_init": START, "prompt_tuning_init_text": START, **WITH_TEXT},
    start=Start(_start, lambda rank, targets: {"num_virtual_tokens": rank}),
)
