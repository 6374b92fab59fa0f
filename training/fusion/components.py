"""The frozen adapters of a fusion, read from disk as the server reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from torch import nn

from turret.server.adapters.base import BaseModel, BaseModule, BaseVocabulary
from turret.server.adapters.checkpoint.adapter_checkpoint import AdapterCheckpoint
from turret.server.adapters.checkpoint.adapter_root import AdapterRoot
from turret.server.adapters.checkpoint.reader import read_checkpoint
from turret.server.adapters.component import Component, ComponentRef
from turret.server.adapters.lowering.components import check_fusable
from turret.server.adapters.methods.lower import lower_checkpoint
from turret.training.fusion.layer import Update
from turret.training.settings.inputs import component_directories

_MAX_ELEMENTS = 1 << 32


@dataclass(frozen=True, slots=True)
class LinearModule:
    """A linear module of the decoder layers: the module and its sizes."""

    module: nn.Module
    in_features: int
    out_features: int


def linear_modules(model: nn.Module) -> dict[str, LinearModule]:
    """The linear modules of a transformers model's decoder layers, by full path, in its order."""
    return {
        name: LinearModule(module, module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    }


def component_digests(entries: Sequence[str]) -> dict[str, str]:
    """Component names → digests of what is in their directories now."""
    directories = component_directories(entries)
    return {name: _read(directory).digest for name, directory in directories.items()}


def read_components(directories: Mapping[str, Path], model: nn.Module) -> list[Component]:
    """Reads adapter directories for a transformers model.

    Args:
        directories: The components' names → where they are, in the fusion's order.
        model: The base, whose module names and sizes the adapters must fit.

    Raises:
        TurretError: A directory is no adapter that fits the model, or one that cannot be fused;
            says why.
    """
    base = _describe(model)
    components = []
    for name, directory in directories.items():
        checkpoint = _read(directory)
        method, lowered = lower_checkpoint(checkpoint, base)
        ref = ComponentRef(name, checkpoint.digest)
        components.append(Component(ref, method, lowered.operators, lowered.ranks))
    check_fusable(components, ", ".join(directories))
    return components


def update_of(component: Component, path: str) -> Update:
    """What a component adds to one module, as the fusion layer takes it."""
    operators = component.operators.modules.get(path)
    if operators is None or operators.low_rank is None:
        return None
    return operators.low_rank.a, operators.low_rank.b.T


def _read(directory: Path) -> AdapterCheckpoint:
    resolved = directory.resolve()
    return read_checkpoint(AdapterRoot(resolved.parent), resolved.name, max_elements=_MAX_ELEMENTS)


def _describe(model: Any) -> BaseModel:
    """The base as far as reading low-rank adapters needs it."""
    linears = linear_modules(model)
    leaves = {name for name, module in model.named_modules() if name and not [*module.children()]}
    config = model.config
    return BaseModel(
        name="",
        model_type=config.model_type,
        digest="",
        dtype=torch.float32,
        modules={
            name: BaseModule(
                name,
                linear.in_features,
                linear.out_features,
                bias=getattr(linear.module, "bias", None),
                dequantize=_weight_of(linear.module),
            )
            for name, linear in linears.items()
        },
        other_modules=frozenset(leaves - linears.keys()),
        vocabulary=BaseVocabulary(
            model.get_input_embeddings().weight.detach(),
            model.get_output_embeddings().weight.detach(),
            is_tied=bool(config.tie_word_embeddings),
        ),
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads,
    )


def _weight_of(module: Any) -> Callable[[], torch.Tensor]:
    state = getattr(module.weight, "quant_state", None)
    if state is None:
        return lambda: module.weight.detach().float()
    return lambda: dequantize_4bit(module.weight.data, state).float()
