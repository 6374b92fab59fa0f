"""Learned fusion (AdapterFusion, arXiv 2005.00247): trains a gate over existing adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from turret.server.errors import TurretError
from turret.training.adapter_folder import write_adapter
from turret.training.base_model import TrainingBase
from turret.training.errors import ConfigError
from turret.training.fusion import FusionLoss, FusionModel, read_components
from turret.training.loss import LossFunction
from turret.training.methods.method import fill_in
from turret.training.settings.checks import check_components, component_directories
from turret.training.settings.config import MethodConfig
from turret.training.settings.declared import DECLARED
from turret.training.words import say

_KEY = "method.components"


class LearnedFusionMethod:
    name = "learned_fusion"
    learning_rate = DECLARED[name].learning_rate

    def resolve(self, config: MethodConfig, base: TrainingBase) -> MethodConfig:
        config = fill_in(config, base, {})
        if base.arch.experts is not None:
            raise ConfigError.of("method.name", say("FUSION_OF_EXPERTS"))
        check_components(config.components or (), Path())
        return config

    def served_rank(self, config: MethodConfig, base: TrainingBase) -> int:
        assert config.d_k is not None
        return config.d_k

    def notes(self, config: MethodConfig, base: TrainingBase) -> Sequence[str]:
        return ()

    def attach(self, model: Any, config: MethodConfig, base: TrainingBase) -> Any:
        assert config.components is not None
        assert config.d_k is not None
        try:
            components = read_components(component_directories(config.components), model)
        except TurretError as error:
            raise ConfigError.of(_KEY, say("INVALID", why=error.message)) from error
        return FusionModel(model, components, config.d_k)

    def loss(self, model: Any, config: MethodConfig, device: str) -> LossFunction:
        assert config.guidance is not None
        head = model.get_base_model().get_output_embeddings()
        return FusionLoss(model, head, device, config.guidance)

    def save(self, model: Any, folder: Path, dtype: torch.dtype) -> None:
        name = model.get_base_model().config._name_or_path
        config = {**model.fusion_config(), "base_model_name_or_path": name}
        write_adapter(folder, config, model.fusion_state(), dtype)


LEARNED_FUSION = LearnedFusionMethod()
