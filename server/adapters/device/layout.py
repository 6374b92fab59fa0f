"""The base's fused projections, as stores of adapters see them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from turret.server.adapters.operators.adapter_operators import AdapterOperators, ModuleOperators
from turret.server.adapters.operators.low_rank import ExpertLowRank


@dataclass(frozen=True, slots=True)
class SliceShape:
    """One module of a fused projection: its path inside the layer and its sizes."""

    path: str
    out_features: int
    in_features: int


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """A fused projection of all experts: its path inside the layer and the sizes of each expert."""

    path: str
    count: int
    out_features: int
    in_features: int


@dataclass(frozen=True, slots=True)
class ProjectionLayout:
    """Shape of the base as stores see it: the slices of each fused projection, in every layer.

    ``experts`` are those of mixtures of experts. A layer may lack any of both.
    """

    num_layers: int
    projections: Mapping[str, tuple[SliceShape, ...]]
    experts: Mapping[str, ExpertShape] = field(default_factory=dict)
    layer_prefix: str = "model.layers"
    _columns: Mapping[str, tuple[slice, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        columns = {}
        for name, slices in self.projections.items():
            ends = accumulate((shape.out_features for shape in slices), initial=0)
            columns[name] = tuple(slice(*pair) for pair in pairwise(ends))
        object.__setattr__(self, "_columns", columns)

    def module(self, layer: int, path: str) -> str:
        return f"{self.layer_prefix}.{layer}.{path}"

    def columns(self, projection: str) -> tuple[slice, ...]:
        """The columns of each slice in the projection's result."""
        return self._columns[projection]

    def width(self, projection: str) -> int:
        """Columns of the projection's result."""
        return self._columns[projection][-1].stop

    def of(
        self, operators: AdapterOperators, projection: str
    ) -> list[tuple[int, int, ModuleOperators]]:
        """An adapter's operators in one projection, as (layer, slice, operators)."""
        found = []
        for layer in range(self.num_layers):
            for s, shape in enumerate(self.projections[projection]):
                ops = operators.modules.get(self.module(layer, shape.path))
                if ops is not None:
                    found.append((layer, s, ops))
        return found

    def of_experts(
        self, operators: AdapterOperators, projection: str
    ) -> list[tuple[int, ExpertLowRank]]:
        """An adapter's updates of one projection of the experts, as (layer, update)."""
        path = self.experts[projection].path
        experts = operators.experts or {}
        names = ((layer, self.module(layer, path)) for layer in range(self.num_layers))
        return [(layer, experts[name]) for layer, name in names if name in experts]
