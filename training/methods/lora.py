"""LoRA (arXiv 2106.09685), rsLoRA (2312.03732) and DoRA (2402.09353)."""

from __future__ import annotations

from functools import partial
from typing import Any

import peft

from turret.training.methods.method import PeftMethod, Settings
from turret.training.models.base_model import TrainingBase

_COMMON = {"targets": ("all-linear",), "rank": 8, "dropout": 0.0}


def _twice_rank(config: Settings, base: TrainingBase) -> float:
    return 2.0 * config.rank


def _lora_config(config: Settings, base: TrainingBase, **flags: Any) -> peft.PeftConfig:
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.targets),
        **flags,
    )


LORA = PeftMethod(
    name="lora",
    learning_rate=1e-3,
    defaults={**_COMMON, "alpha": _twice_rank},
    peft_config=_lora_config,
)
RSLORA = PeftMethod(
    name="rslora",
    learning_rate=1e-3,
    # The scale falls with the square root of the rank; at rank 16 it is LoRA's default.
    defaults={**_COMMON, "alpha": 8.0},
    peft_config=partial(_lora_config, use_rslora=True),
)
DORA = PeftMethod(
    name="dora",
    learning_rate=1e-3,
    defaults={**_COMMON, "alpha": _twice_rank},
    peft_config=partial(_lora_config, use_dora=True),
)
