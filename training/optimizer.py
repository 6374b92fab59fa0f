"""AdamW in its variants, LoRA+'s two rates, and the schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit

from turret.training.settings.config import OptimizerConfig

# PEFT's names of the second factor, whose rate LoRA+ raises.
_B_FACTORS = ("lora_B",)


def make_optimizer(
    parameters: Iterable[tuple[str, torch.nn.Parameter]], config: OptimizerConfig
) -> torch.optim.Optimizer:
    """Make the optimizer.

    Args:
        parameters: (name, parameter) of what is trained.
        config: Resolved: the rate is there, and the kind fits the device.

    Returns:
        Two groups with LoRA+ (arXiv 2402.12354), else one; each holds its rate relative to
        ``learning_rate`` as ``ratio``.
    """
    ratio = config.lora_plus_ratio or 1.0
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameter in parameters:
        is_b = any(f".{factor}." in name for factor in _B_FACTORS)
        groups.setdefault(ratio if is_b else 1.0, []).append(parameter)
    kinds: dict[str, Any] = {
        "adamw": torch.optim.AdamW,
        "adamw8bit": AdamW8bit,
        "paged-adamw8bit": PagedAdamW8bit,
    }
    return kinds[config.name](
        [{"params": members, "ratio": scale} for scale, members in groups.items()],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
    )


def learning_rate(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """The rate of a step, from 0: a linear rise, then half a cosine that would reach 0 at the end.

    A function of the step alone, so a resumed run needs no schedule state.
    """
    assert config.learning_rate is not None  # resolved
    warmup = max(1, round(num_steps * config.warmup_fraction))
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, num_steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of every group, times its ``ratio``."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["ratio"]
