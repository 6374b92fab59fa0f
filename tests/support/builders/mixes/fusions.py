"""Learned fusions: random checkpoints, and the paper's formula on dense float64 matrices."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from builders.adapters import linear_modules, read_adapter
from builders.methods import load_adapter
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn

from turret.server.adapters.adapter import CONFIG_FILE, TENSORS_FILE

PREFIX = "base_model.model."


def fusion_config(
    root: Path, components: Sequence[str], target_modules: Any, d_k: int
) -> dict[str, Any]:
    """The config of a fusion of the adapter directories ``root/<component>``."""
    return {
        "peft_type": "TURRET_FUSION",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "",
        "components": [
            {"name": name, "digest": read_adapter(root, name).digest} for name in components
        ],
        "d_k": d_k,
        "target_modules": target_modules,
    }


def save_fusion(
    model: nn.Module,
    root: Path,
    name: str,
    components: Sequence[str],
    target_modules: Sequence[str],
    *,
    d_k: int = 8,
    seed: int = 0,
    strength: float = 3.0,
) -> Path:
    """Write ``root/name``, a fusion of ``root/<component>`` on the named modules.

    Queries and keys are random, with a size that makes gates neither flat nor saturated.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, linear in linear_modules(model).items():
        if path.rpartition(".")[2] in target_modules:
            for role, features in (("query", linear.in_features), ("key", linear.out_features)):
                noise = torch.randn(d_k, features, generator=generator)
                value = noise * (strength / d_k**0.5 / features) ** 0.5
                tensors[f"{PREFIX}{path}.fusion_{role}.weight"] = value
    directory = root / name
    directory.mkdir(parents=True)
    config = fusion_config(root, components, list(target_modules), d_k)
    (directory / CONFIG_FILE).write_text(json.dumps(config))
    save_file(tensors, directory / TENSORS_FILE)
    return directory


class DenseFusion(nn.Module):
    """``W x + b + weight · Σ_k α_k Δ_k x``, ``α = softmax_k((Wq x) · (Wk Δ_k x))``.

    Args:
        base: The linear module.
        deltas: ``[components, out, in]``, dense.
        query: ``[d_k, in]``.
        key: ``[d_k, out]``.
        weight: The weight of the fusion in the mix.
    """

    def __init__(
        self,
        base: nn.Module,
        deltas: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        self._base, self._weight = base, weight
        self._deltas, self._query, self._key = deltas, query, key
        self.gates: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        updates = torch.einsum("koi,...i->...ko", self._deltas, x)
        scores = torch.einsum("...d,...kd->...k", x @ self._query.T, updates @ self._key.T)
        gates = scores.softmax(-1)
        self.gates.append(gates.flatten(0, -2).detach())
        return self._base(x) + self._weight * (gates[..., None] * updates).sum(-2)


def fusion_oracle(
    model: nn.Module, root: Path, fusion: str, weight: float = 1.0, dtype: Any = torch.float64
) -> tuple[nn.Module, Mapping[str, DenseFusion]]:
    """A copy of ``model`` in ``dtype`` with the fusion ``root/fusion``, and its fused modules.

    A component's ``ΔW`` is PEFT's own; it is zero for modules that the component does not adapt.
    """
    config = json.loads((root / fusion / CONFIG_FILE).read_text())
    tensors = load_file(root / fusion / TENSORS_FILE)
    oracle = copy.deepcopy(model).to(dtype)
    loaded = [load_adapter(model, root / item["name"]) for item in config["components"]]
    modules = {}
    for path, linear in linear_modules(oracle).items():
        query = tensors.get(f"{PREFIX}{path}.fusion_query.weight")
        if query is None:
            continue
        key = tensors[f"{PREFIX}{path}.fusion_key.weight"]
        deltas = torch.stack([delta_weight(peft.get_submodule(PREFIX + path)) for peft in loaded])
        fused = DenseFusion(linear, deltas.to(dtype), query.to(dtype), key.to(dtype), weight)
        modules[path] = fused
        parent, _, leaf = path.rpartition(".")
        setattr(oracle.get_submodule(parent), leaf, fused)
    return oracle.eval(), modules


@torch.no_grad()
def delta_weight(module: nn.Module) -> torch.Tensor:
    """A module's ``ΔW``, float64; zero if PEFT does not adapt the module."""
    if isinstance(module, BaseTunerLayer):
        return module.double().get_delta_weight("default")  # type: ignore[operator]
    assert isinstance(module, nn.Linear)
    return torch.zeros(module.weight.shape, dtype=torch.float64)
