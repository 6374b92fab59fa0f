"""The torch path's store: the adapters of the running batch, side by side in wide matrices.

Per fused projection and layer, the A matrices of all packed adapters are stacked along the rank
axis, and so are the B matrices: sixteen different adapters are one product of sixteen times the
rank, masked per row. Gains and biases are tables with a slot per adapter. Hadamard, Kronecker
and sparse updates, which do not stack, are on shelves; gates stand alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from turret.kernels.adapters.segmented_expand import segmented_expand_reference
from turret.kernels.adapters.segmented_shrink import segmented_shrink_reference
from turret.kernels.adapters.segments import SegmentPlan
from turret.kernels.expert_routing import Routing
from turret.kernels.rows.gain import row_bias_, row_combine, row_gain_
from turret.server.adapters.device.constants import ConstantsOfAdapters, StepConstants
from turret.server.adapters.device.expert_updates import ExpertUpdates, StepExpertUpdates
from turret.server.adapters.device.gates import Gates
from turret.server.adapters.device.hadamard_shelf import HadamardShelves
from turret.server.adapters.device.kronecker_shelf import KroneckerShelves
from turret.server.adapters.device.layout import ProjectionLayout
from turret.server.adapters.device.members import StepMembers
from turret.server.adapters.device.own_updates import OwnUpdates, StepOwnUpdates
from turret.server.adapters.device.packed.pack import Pack, PackedKinds
from turret.server.adapters.device.packed.projection import PackedProjection
from turret.server.adapters.device.packed.segments import plan_segments
from turret.server.adapters.device.part import StepPart
from turret.server.adapters.device.shelves import TorchShelves
from turret.server.adapters.device.sparse_shelf import SparseShelves
from turret.server.adapters.device.store import BaseProduct, OnMoved, StepStore

_OWN_UPDATES = frozenset({"circulant", "dense", "modulated", "input_blocks", "pairs"})


class PackedStore(StepStore):
    """Owns the packed copies of the adapters that the running batch uses; see ``AdapterStore``.

    Args:
        layout: Shape of the base.
        dtype: Serving dtype.
        device: Where the copies live.
        max_bytes: Budget of the copies.
        on_moved: Told of every adapter that was packed or forgotten.
    """

    def __init__(
        self,
        layout: ProjectionLayout,
        dtype: torch.dtype,
        device: torch.device,
        max_bytes: int,
        on_moved: OnMoved = lambda _: None,
    ) -> None:
        self._pack = Pack(
            layout,
            {name: PackedProjection(layout, name, dtype, device) for name in layout.projections},
        )
        shelved = (HadamardShelves, KroneckerShelves, SparseShelves)
        self._shelves = TorchShelves([kind(layout, device) for kind in shelved], device)
        self._gates = Gates(layout, device)
        self._own_updates = OwnUpdates(layout, _OWN_UPDATES, device)
        self._experts = ExpertUpdates(layout, device)
        self._constants = ConstantsOfAdapters(device)
        computed = (self._gates, self._own_updates, self._experts, self._constants)
        parts = (self._pack, self._shelves, *computed)
        super().__init__(parts, device, max_bytes, on_moved)

    def step(self, members: StepMembers) -> PackedStep:
        mixes = [*members.short, *(mix for _, _, mix in members.long)]
        kinds = self._pack.kinds({key for mix in mixes for key, _ in mix})
        bound = self._shelves.bind(members), self._gates.bind(members)
        return PackedStep(
            projections=self._pack.projections,
            plan=plan_segments(members, self._pack.places, self._device),
            kinds=kinds,
            present={
                name: tuple((name, s) in kinds.low_rank for s in range(len(packed.slices)))
                for name, packed in self._pack.projections.items()
            },
            others=tuple(part for part in bound if part is not None),
            own_updates=self._own_updates.bind(members),
            experts=self._experts.bind(members),
            constants=self._constants.bind(members.runs),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedStep:
    """See ``AdapterStep``.

    Attributes:
        projections: The packed matrices.
        plan: The step's segments.
        kinds: Which packed operators its adapters have.
        present: Per projection, which slices have a low-rank update.
        others: Rows of the operators that are not packed.
        own_updates: Rows of those that each adapter computes by itself.
        experts: Rows whose adapters change experts, or None.
        constants: Rows that attend to constants, or None.
    """

    projections: Mapping[str, PackedProjection]
    plan: SegmentPlan
    kinds: PackedKinds
    present: Mapping[str, tuple[bool, ...]]
    others: tuple[StepPart, ...]
    own_updates: StepOwnUpdates | None
    experts: StepExpertUpdates | None = None
    constants: StepConstants | None = None

    def attend(self, layer: int, q: torch.Tensor, attended: torch.Tensor) -> None:
        if self.constants is not None:
            self.constants.attend(layer, q, attended)

    def apply_experts(
        self,
        layer: int,
        projection: str,
        x: torch.Tensor,
        y: torch.Tensor,
        routing: Routing,
        rows: torch.Tensor | None,
    ) -> None:
        if self.experts is not None:
            self.experts.apply(layer, projection, x, y, routing, rows)

    def project(
        self,
        layer: int,
        projection: str,
        x: torch.Tensor,
        *,
        bias: torch.Tensor | None,
        base: BaseProduct,
    ) -> torch.Tensor:
        y = base(x)
        before = y if self.own_updates is None else y.clone()
        self._scale(layer, projection, x, y, base)
        if bias is not None:
            y += bias
        self._add(layer, projection, x, y)
        if self.own_updates is not None:
            self.own_updates.apply(layer, projection, x, y, before=before, base=base)
        return y

    def _scale(
        self, layer: int, projection: str, x: torch.Tensor, y: torch.Tensor, base: BaseProduct
    ) -> None:
        """Apply the gains to bias-free base results ``y``, in place."""
        packed = self.projections[projection]
        if projection in self.kinds.gains:
            assert packed.gain_delta is not None
            row_gain_(y, packed.gain_delta[layer], self.plan)
        if projection in self.kinds.input_gains:
            # W (l ⊙ x) = W x + W ((l − 1) ⊙ x): exact beside any other operator of the mix.
            assert packed.input_gain_delta is not None
            for s, columns in enumerate(packed.columns):
                table = packed.input_gain_delta[layer, :, s]
                delta = row_combine(table, self.plan, x.shape[0])
                rows = delta.count_nonzero(dim=1).nonzero().squeeze(1)
                if rows.numel():
                    chosen = x.index_select(0, rows).float() * delta.index_select(0, rows)
                    change = base.part(s)(chosen.to(x.dtype))
                    y[:, columns].index_add_(0, rows, change)

    def _add(self, layer: int, projection: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add bias differences and updates to ``y``, in place."""
        packed = self.projections[projection]
        if projection in self.kinds.biases:
            assert packed.bias is not None
            row_bias_(y, packed.bias[layer], self.plan)
        present = self.present[projection]
        if any(present):
            a, b = packed.layers[layer]
            v = segmented_shrink_reference(x, a, self.plan)
            segmented_expand_reference(y, v, b, self.plan, present)
        for part in self.others:
            part.apply(layer, projection, x, y)
