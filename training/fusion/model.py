"""A base model with fusion layers in the place of the modules that its components adapt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from turret.server.adapters.checkpoint.tensor_names import PEFT_PREFIX
from turret.server.adapters.component import Component
from turret.server.adapters.methods.low_rank.learned_fusion import METHOD as LEARNED_FUSION
from turret.training.fusion.components import linear_modules, update_of
from turret.training.fusion.layer import FusionLayer


class FusionModel(nn.Module):
    """Called like the model it wraps; queries and keys are all that has gradients.

    Args:
        model: A transformers model; frozen and changed in place.
        components: Of ``read_components``.
        d_k: Width of queries and keys.
    """

    def __init__(self, model: Any, components: Sequence[Component], d_k: int) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.components = tuple(components)
        self.d_k = d_k
        # By path; the modules themselves are registered in the model.
        self.layers: dict[str, FusionLayer] = {}
        for path, linear in linear_modules(model).items():
            updates = [update_of(component, path) for component in components]
            if any(update is not None for update in updates):
                layer = FusionLayer(
                    linear.module, updates, linear.in_features, linear.out_features, d_k
                )
                model.set_submodule(path, layer)
                self.layers[path] = layer

    def forward(self, *args: Any, **keywords: Any) -> Any:
        return self.model(*args, **keywords)

    def get_base_model(self) -> Any:
        """The wrapped model, as PEFT's models call it."""
        return self.model

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model alone within the block, as with PEFT's models."""
        for layer in self.layers.values():
            layer.is_enabled = False
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.is_enabled = True

    @contextmanager
    def component_alone(self, number: int) -> Iterator[None]:
        """The base with one component, as if it were served, within the block."""
        for layer in self.layers.values():
            layer.alone = number
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.alone = None

    @contextmanager
    def watching_gates(self) -> Iterator[list[torch.Tensor]]:
        """A list that every layer appends ``log α`` to, within the block."""
        log_gates: list[torch.Tensor] = []
        for layer in self.layers.values():
            layer.log_gates = log_gates
        try:
            yield log_gates
        finally:
            for layer in self.layers.values():
                layer.log_gates = None

    def fusion_config(self) -> dict[str, Any]:
        """``adapter_config.json`` of the fusion, without the base's name."""
        return {
            "peft_type": next(iter(LEARNED_FUSION.peft_types)),
            "task_type": "CAUSAL_LM",
            "components": [
                {"name": component.ref.name, "digest": component.ref.digest}
                for component in self.components
            ],
            "d_k": self.d_k,
            "target_modules": sorted({path.rpartition(".")[2] for path in self.layers}),
        }

    def fusion_state(self) -> dict[str, torch.Tensor]:
        """The trained tensors by their names in ``adapter_model.safetensors``."""
        state = {}
        for path, layer in self.layers.items():
            state[f"{PEFT_PREFIX}{path}.fusion_query.weight"] = layer.query.detach()
            state[f"{PEFT_PREFIX}{path}.fusion_key.weight"] = layer.key.detach()
        return state
