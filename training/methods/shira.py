"""SHiRA (arXiv 2406.13175): a few entries of each weight, at places that are drawn, are trained."""

from __future__ import annotations

from functools import partial
from typing import Any

import peft
import torch
from peft.tuners.shira import layer as shira

from turret.training.methods.method import PeftMethod, Settings
from turret.training.models.base_model import TrainingBase
from turret.training.settings.config import MethodConfig


def _shira_config(config: Settings, base: TrainingBase) -> peft.PeftConfig:
    # The run's seed is set before a method is attached.
    seed = int(torch.randint(1 << 31, ()))
    made = peft.ShiraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        random_seed=seed,
        target_modules=list(config.targets),
    )
    made.mask_fn = _MaskDrawer(seed)
    return made


class _MaskDrawer:
    """PEFT's ``random_mask``, on the CPU whatever holds the weight, and once for a shape.

    Modules of one shape have the same places there too; the permutation of a large weight's entries
    takes seconds.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._places: dict[tuple[int, int, int], torch.Tensor] = {}

    def __call__(
        self, base_layer: Any, r: int, random_seed: int | None = None, **kwargs: Any
    ) -> torch.Tensor:
        out, inner = base_layer.out_features, base_layer.in_features
        key = (out, inner, r)
        if key not in self._places:
            drawn = torch.randperm(out * inner, generator=torch.Generator().manual_seed(self._seed))
            # A copy: a view would keep all of them.
            self._places[key] = drawn[: r * (out + inner)].clone()
        mask = torch.zeros(out * inner, dtype=torch.bool)
        mask[self._places[key]] = True
        return mask.view(out, inner)


class _ShiraMethod(PeftMethod):
    def attach(self, model: Any, config: MethodConfig, base: TrainingBase) -> Any:
        attached = super().attach(model, config, base)
        if model.device.type == "meta":
            _use_shapes(attached)
        return attached


def _use_shapes(model: Any) -> None:
    """Let layers without memory work, where neither sparse nor packed weights are there."""
    for layer in model.modules():
        if isinstance(layer, shira.Linear):
            layer.quantization_backend = None
            layer.get_delta_weight = partial(_delta_shape, layer)


def _delta_shape(layer: shira.Linear, adapter: str) -> torch.Tensor:
    """A tensor of the weight's shape and the values' gradient, which takes no more than they do."""
    return layer.shira_weight[adapter].sum().expand(layer.out_features, layer.in_features)


SHIRA = _ShiraMethod(
    name="shira",
    learning_rate=1e-3,
    defaults={"targets": ("all-linear",), "rank": 8},
    peft_config=_shira_config,
    # SHiRA's rank only sets the number of trained entries; serving needs no rank for it.
    rank_served=lambda config, base: 0,
)
