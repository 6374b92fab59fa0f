"""The base's fused projections, as stores of adapters see them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from turret.server.adapters.operators import AdapterOperators, ModuleOperators


@dataclass(frozen=True, slots=True)
class SliceShape:
    """One module of a fused projection: its path inside the layer and its sizes."""

    path: str
    out_features: int
    in_features: int


@dataclass(frozen=True, slots=True)
class ProjectionLayout:
    """Shape of the base as the pack sees it: per group the slices; ``num_layers`` deep."""

    num_layers: int
    groups: Mapping[str, tuple[SliceShape, ...]]
    layer_prefix: str = "model.layers"

    def module(self, layer: int, path: str) -> str:
        return f"{self.layer_prefix}.{layer}.{path}"

    def of(self, operators: AdapterOperators, group: str) -> list[tuple[int, int, ModuleOperators]]:
        """An adapter's operators in one group, as (layer, slice, operators)."""
        found = []
        for layer in range(self.num_layers):
            for s, shape in enumerate(self.groups[group]):
                ops = operators.modules.get(self.module(layer, shape.path))
                if ops is not None:
                    found.append((layer, s, ops))
        return found
