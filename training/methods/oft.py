"""OFT (arXiv 2306.07280): blocks of the input are turned before the base multiplies them."""

from __future__ import annotations

import peft

from turret.training.base_model import TrainingBase
from turret.training.methods.method import PeftMethod, Settings


def _oft_config(config: Settings, base: TrainingBase) -> peft.PeftConfig:
    # Blocks of b inputs cost what a LoRA of rank b / 2 costs.
    return peft.OFTConfig(
        task_type="CAUSAL_LM",
        oft_block_size=2 * config.rank,
        module_dropout=config.dropout,
        target_modules=list(config.targets),
    )


OFT = PeftMethod(
    name="oft",
    learning_rate=1e-3,
    defaults={"targets": ("all-linear",), "rank": 16, "dropout": 0.0},
    peft_config=_oft_config,
)
