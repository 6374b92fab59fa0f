"""VB-LoRA (arXiv 2405.15179): both factors are cut from one bank of vectors that modules share."""

from __future__ import annotations

import math

import peft

from turret.training.methods.method import PeftMethod, Settings
from turret.training.models.base_model import TrainingBase
from turret.training.settings.ranks import module_sizes

# PEFT's default; smaller if the base's dimensions are not divisible by it.
_VECTOR_LENGTH = 256


def _vblora_config(config: Settings, base: TrainingBase) -> peft.PeftConfig:
    sizes = [
        size for _, *both in module_sizes(base.arch.projections, config.targets) for size in both
    ]
    return peft.VBLoRAConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        vector_length=math.gcd(_VECTOR_LENGTH, *sizes),
        vblora_dropout=config.dropout,
        target_modules=list(config.targets),
    )


VBLORA = PeftMethod(
    name="vblora",
    # A single rate; PEFT's example uses 1e-3 for the vector bank and 1e-2 for the logits.
    learning_rate=1e-2,
    defaults={"targets": ("all-linear",), "rank": 4, "dropout": 0.0},
    peft_config=_vblora_config,
)
