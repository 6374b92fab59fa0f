"""Learned fusion (AdapterFusion, arXiv 2005.00247): trains a gate over existing adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from turret.server.errors import TurretError
from turret.training.adapter_folder import write_adapter
from turret.training.base_model import TrainingBase
from turret.training.errors import ConfigError
from turret.training.fusion import FusionLoss, FusionModel, read_components
from turret.training.loss import LossFunction
from turret.training.methods.method import MethodSettings, TrainingMethod
from turret.training.settings.checks import component_directories
from turret.training.words import say


class LearnedFusionMethod(TrainingMethod):
    def attach(self, model: Any, config: MethodSettings, base: TrainingBase) -> Any:
        try:
            components = read_components(component_directories(config.components), model)
        except TurretError as error:
            why = say("INVALID", why=error.message)
            raise ConfigError.of("method.components", why) from error
        return FusionModel(model, components, config.d_k)

    def loss(self, model: Any, config: MethodSettings, device: str) -> LossFunction:
        head = model.get_base_model().get_output_embeddings()
        return FusionLoss(model, head, device, config.guidance)

    def save(self, model: Any, folder: Path, dtype: torch.dtype) -> None:
        name = model.get_base_model().config._name_or_path
        config = {**model.fusion_config(), "base_model_name_or_path": name}
        write_adapter(folder, config, model.fusion_state(), dtype)


LEARNED_FUSION = LearnedFusionMethod(
    name="learned_fusion", served_rank=lambda config, base: config.d_k
)
