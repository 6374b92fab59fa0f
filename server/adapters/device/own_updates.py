"""Updates that each adapter computes for its own rows, by torch, many with the base's own product.

Nothing is packed: each adapter of a step multiplies its own rows, position by position in the
mixes, so that a row's sum is in its own order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from turret.kernels.adapters.circulant import circulant_reference, spectrum
from turret.kernels.adapters.dense import dense_reference
from turret.kernels.adapters.input_blocks import input_blocks_reference
from turret.kernels.adapters.modulated_base import modulated_reference
from turret.kernels.adapters.pair_rotation import pair_rotation_reference
from turret.kernels.rows.linear import prepare_linear
from turret.server.adapters.device.layout import ProjectionLayout
from turret.server.adapters.device.members import StepMembers, passes
from turret.server.adapters.device.part import Part
from turret.server.adapters.device.store import BaseProduct
from turret.server.adapters.operators.adapter_operators import AdapterOperators, ModuleOperators

# (Layer, projection) → slices with the operators they have.
_Held = Mapping[tuple[int, str], Sequence[tuple[int, ModuleOperators]]]


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows that have an adapter at the same position of their mixes.

    Attributes:
        modules: The adapter's.
        rows: Row numbers, ``[n]`` int64, rising.
        weights: Mix weights, ``[n, 1]`` fp32.
    """

    modules: _Held
    rows: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True, slots=True)
class StepOwnUpdates:
    """A step's rows of these operators; see ``OwnUpdates``."""

    kinds: frozenset[str]
    projections: frozenset[str]
    columns: Mapping[str, Sequence[slice]]
    bound: Sequence[_Rows]

    def apply(
        self,
        layer: int,
        projection: str,
        x: torch.Tensor,
        y: torch.Tensor,
        *,
        before: torch.Tensor,
        base: BaseProduct,
    ) -> None:
        """Add the updates of one layer's fused projection to ``y``, in place.

        Args:
            layer: Layer number.
            projection: Fused projection.
            x: Its input, ``[rows, in]``.
            y: What has been added up so far, ``[rows, sum(out)]``.
            before: What the base gave for ``x``, ``[rows, sum(out)]``; read for pairs alone.
            base: The bias-free base projection.
        """
        for held in self.bound if projection in self.projections else ():
            inputs = None
            for s, ops in held.modules.get((layer, projection), ()):
                columns = self.columns[projection][s]
                inputs = x.index_select(0, held.rows) if inputs is None else inputs
                change = self._change(ops, inputs, held.weights, base.part(s))
                if ops.pairs is not None and "pairs" in self.kinds:
                    own = before[:, columns].index_select(0, held.rows)
                    turned = pair_rotation_reference(own, ops.pairs.sine, ops.pairs.group)
                    change = change + held.weights * turned
                total = y[:, columns].index_select(0, held.rows).float() + change
                y[:, columns].index_copy_(0, held.rows, total.to(y.dtype))

    def _change(
        self, ops: ModuleOperators, x: torch.Tensor, weights: torch.Tensor, base: BaseProduct
    ) -> torch.Tensor:
        """``[n, out]`` fp32, of all but the pairs."""
        total = x.new_zeros(1, 1, dtype=torch.float32)
        if ops.circulant is not None and "circulant" in self.kinds:
            kernel = ops.circulant.kernel
            change = circulant_reference(x, spectrum(kernel), kernel.shape[2])
            total = total + weights * change
        if ops.dense is not None and "dense" in self.kinds:
            total = total + weights * dense_reference(x, ops.dense.weight)
        if ops.input_blocks is not None and "input_blocks" in self.kinds:
            turned = weights * input_blocks_reference(x, ops.input_blocks.blocks)
            change = base(turned.to(x.dtype)).float()
            total = total + (change if ops.gain is None else change * ops.gain)
        if ops.modulated is not None and "modulated" in self.kinds:
            change = modulated_reference(x, ops.modulated.a, ops.modulated.b, base)
            total = total + weights * change
        return total


class OwnUpdates(Part):
    """Holds the adapters that have such operators, by key.

    Args:
        layout: Shape of the base.
        kinds: Which operators, by the names of the fields of ``ModuleOperators``; others are
            somebody else's.
        device: Of the steps.
    """

    def __init__(
        self, layout: ProjectionLayout, kinds: frozenset[str], device: torch.device
    ) -> None:
        self._layout = layout
        self._kinds = kinds
        self._device = device
        self._held: dict[str, _Held] = {}

    def insert(self, key: str, operators: AdapterOperators) -> None:
        found: dict[tuple[int, str], list[tuple[int, ModuleOperators]]] = {}
        for name in self._layout.projections:
            for layer, s, ops in self._layout.of(operators, name):
                if ops.dense is not None and "dense" in self._kinds:
                    prepare_linear(ops.dense.weight)
                if any(getattr(ops, kind) is not None for kind in self._kinds):
                    found.setdefault((layer, name), []).append((s, ops))
        if found:
            self._held[key] = found

    def remove(self, key: str) -> None:
        self._held.pop(key, None)

    def bind(self, members: StepMembers) -> StepOwnUpdates | None:
        """The step's rows, or None if no row has such an operator."""
        bound = self._passes(members)
        if not bound:
            return None
        return StepOwnUpdates(
            kinds=self._kinds,
            projections=frozenset(name for held in bound for _, name in held.modules),
            columns={name: self._layout.columns(name) for name in self._layout.projections},
            bound=bound,
        )

    def _passes(self, members: StepMembers) -> list[_Rows]:
        found = []
        for key, rows, weights in passes(members.runs, self._held.keys()):
            places = torch.tensor(rows, device=self._device)
            values = torch.tensor(weights, device=self._device).unsqueeze(1)
            found.append(_Rows(self._held[key], places, values))
        return found
