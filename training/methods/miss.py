"""MiSS (arXiv 2409.15371): one matrix per module, which every piece of the input meets."""

from __future__ import annotations

import peft

from turret.training.methods.method import PeftMethod, Settings
from turret.training.models.base_model import TrainingBase


def _miss_config(config: Settings, base: TrainingBase) -> peft.PeftConfig:
    return peft.MissConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        miss_dropout=config.dropout,
        target_modules=list(config.targets),
    )


MISS = PeftMethod(
    name="miss",
    learning_rate=1e-3,
    defaults={"targets": ("all-linear",), "rank": 16, "dropout": 0.0},
    peft_config=_miss_config,
)
