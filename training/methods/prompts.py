"""Prefix tuning (arXiv 2101.00190), prompt tuning (2104.08691) and p-tuning (2103.10385).

Prefix tuning's network and p-tuning's are folded away when saved: what is served is the prefix, or
the prompt, that they make.
"""

from __future__ import annotations

import peft

from turret.training.methods.method import PeftMethod, Settings
from turret.training.models.base_model import TrainingBase


def _hidden_size(config: Settings, base: TrainingBase) -> int:
    return base.arch.hidden_size


def _prefix_width(config: Settings, base: TrainingBase) -> int | None:
    return base.arch.num_kv_heads * base.arch.head_dim if config.prefix_projection else None


def _prefix_config(config: Settings, base: TrainingBase) -> peft.PeftConfig:
    arch = base.arch
    return peft.PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=config.num_virtual_tokens,
        prefix_projection=config.prefix_projection,
        encoder_hidden_size=config.encoder_hidden_size,
        # Given, because PEFT derives them from hidden_size, wrongly where head_dim is its own.
        num_layers=arch.num_layers,
        num_attention_heads=arch.num_kv_heads,
        token_dim=arch.num_kv_heads * arch.head_dim,
    )


def _prompt_config(config: Settings, base: TrainingBase) -> peft.PeftConfig:
    is_text = config.init_text is not None
    return peft.PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=config.num_virtual_tokens,
        prompt_tuning_init="TEXT" if is_text else "RANDOM",
        prompt_tuning_init_text=config.init_text,
        tokenizer_name_or_path=str(base.source.files) if is_text else None,
    )


def _p_tuning_config(config: Settings, base: TrainingBase) -> peft.PeftConfig:
    return peft.PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=config.num_virtual_tokens,
        encoder_hidden_size=config.encoder_hidden_size,
        encoder_dropout=config.dropout,
    )


PREFIX_TUNING = PeftMethod(
    name="prefix_tuning",
    learning_rate=1e-3,
    defaults={
        "num_virtual_tokens": 16,
        "prefix_projection": True,
        "encoder_hidden_size": _prefix_width,
    },
    peft_config=_prefix_config,
)
PROMPT_TUNING = PeftMethod(
    name="prompt_tuning",
    learning_rate=3e-2,
    defaults={"num_virtual_tokens": 16, "init_text": lambda config, base: None},
    peft_config=_prompt_config,
)
P_TUNING = PeftMethod(
    name="p_tuning",
    learning_rate=1e-3,
    defaults={"num_virtual_tokens": 16, "encoder_hidden_size": _hidden_size, "dropout": 0.0},
    peft_config=_p_tuning_config,
)
