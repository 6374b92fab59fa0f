"""IA3 (arXiv 2205.05638): one learned factor per output, or per input of the feed-forward."""

from __future__ import annotations

from typing import Any

import peft
import torch
from peft.tuners.ia3 import IA3Layer

from turret.training.methods.method import PeftMethod, Settings
from turret.training.models.base_model import TrainingBase


def _ia3_config(config: Settings, base: TrainingBase) -> peft.PeftConfig:
    targets: list[str] = list(config.targets)
    return peft.IA3Config(
        task_type="CAUSAL_LM",
        target_modules=targets,
        # The paper scales the feed-forward's inner activations: the input of the last product.
        feedforward_modules=[name for name in targets if name == "down_proj"],
    )


class _Ia3Method(PeftMethod):
    def attach(self, model: Any, config: Settings, base: TrainingBase) -> Any:
        dtype = model.dtype
        attached = super().attach(model, config, base)
        for module in attached.modules():
            if isinstance(module, IA3Layer) and isinstance(module, torch.nn.Module):
                # PEFT's 4-bit layer answers in float32, which attention then refuses to mix.
                module.register_forward_hook(lambda module, inputs, out: out.to(dtype))
        return attached


IA3 = _Ia3Method(
    name="ia3",
    learning_rate=1e-2,
    # The paper's choice: keys, values and the feed-forward.
    defaults={"targets": ("k_proj", "v_proj", "down_proj")},
    peft_config=_ia3_config,
)
