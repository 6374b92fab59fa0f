"""OFT (arXiv 2306.07280): blocks of the input are turned before the base multiplies them."""

from __future__ import annotations

import peft

from turret.server.adapters.methods.transforms.oft import dividing
from turret.training.base_model import TrainingBase
from turret.training.methods.method import PeftMethod, Settings
from turret.training.settings.ranks import module_sizes


def _oft_config(config: Settings, base: TrainingBase) -> peft.PeftConfig:
    # Blocks of b inputs cost what a LoRA of rank b / 2 costs.
    return peft.OFTConfig(
        task_type="CAUSAL_LM",
        oft_block_size=2 * config.rank,
        module_dropout=config.dropout,
        target_modules=list(config.targets),
    )


def _largest_block(config: Settings, base: TrainingBase) -> int:
    sizes = module_sizes(base.arch, config.targets)
    return max(dividing(inner, 2 * config.rank) for _, _, inner in sizes)


OFT = PeftMethod(
    name="oft",
    learning_rate=1e-3,
    defaults={"targets": ("all-linear",), "rank": 16, "dropout": 0.0},
    peft_config=_oft_config,
    rank_served=_largest_block,
)
