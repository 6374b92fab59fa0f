"""aLoRA (arXiv 2504.12397): a LoRA that acts from its invocation in the prompt on.

What comes before is the base's, so that its keys and values are those of every other request.
"""

from __future__ import annotations

import peft

from turret.training.data.invocation import invocation_before_answers, invocation_of
from turret.training.methods.lora import LORA
from turret.training.methods.method import PeftMethod, Settings
from turret.training.models.base_model import TrainingBase


def _written_by_the_template(config: Settings, base: TrainingBase) -> str:
    return invocation_before_answers(base.tokenizer)


def _alora_config(config: Settings, base: TrainingBase) -> peft.PeftConfig:
    made = LORA.peft_config(config, base)
    assert isinstance(made, peft.LoraConfig)
    tokens = invocation_of(base.tokenizer, config.invocation).tokens
    made.alora_invocation_tokens = list(tokens)
    return made


ALORA = PeftMethod(
    name="alora",
    learning_rate=1e-3,
    # aLoRA acts on fewer tokens than LoRA; a higher rank compensates.
    defaults={**LORA.defaults, "rank": 32, "invocation": _written_by_the_template},
    peft_config=_alora_config,
)
