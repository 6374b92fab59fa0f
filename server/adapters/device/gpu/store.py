"""The gpu path's store: adapters packed as on the torch path, applied by Triton kernels.

A step's metadata is in tables of fixed address, so what a step launches depends only on which kinds
of operators it has and on where the tables of those kinds are (``GpuAdapterStep.signature``), and
on where the pack is, which never moves but where more adapters come together than it has slots for
(``GpuStore.epoch``): as long as both stay the same, a captured CUDA graph stays valid. The first
adapter of a kind voids no graph that does without that kind.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch

from turret.kernels.expert_routing import Routing
from turret.kernels.gpu.adapters.expand_on import Expand
from turret.kernels.gpu.adapters.hadamard_shrink import MAX_RANK as MAX_HADAMARD_RANK
from turret.kernels.gpu.adapters.kronecker import MAX_IN_M, MAX_RANK
from turret.kernels.gpu.adapters.segmented_shrink import Shrink, rank_activations
from turret.kernels.gpu.epilogues import Epilogue
from turret.kernels.gpu.tables.segment_table import SegmentTable
from turret.server.adapters.device.gpu.base_products import (
    ChangedInputs,
    ChangedRows,
    add_modulated,
    blocks_of,
    modulated_of,
)
from turret.server.adapters.device.gpu.by_address.constants import GpuConstants, GpuStepConstants
from turret.server.adapters.device.gpu.by_address.dense_shelf import GpuDenseShelves
from turret.server.adapters.device.gpu.by_address.experts import GpuExpertShelves
from turret.server.adapters.device.gpu.by_address.vocabulary import (
    GpuVocabulary,
    Runs,
    StepVocabulary,
)
from turret.server.adapters.device.gpu.gated.gates import GpuGates, GpuStepGates
from turret.server.adapters.device.gpu.pack import GpuPack, GpuPackedProjection
from turret.server.adapters.device.gpu.pairs import GpuPairs, GpuStepPairs
from turret.server.adapters.device.gpu.placed_shelves import PlacedShelves, StepPlaced
from turret.server.adapters.device.gpu.shelves import (
    GpuCirculantShelves,
    GpuHadamardShelves,
    GpuKroneckerShelves,
    GpuShelves,
    GpuStepShelves,
)
from turret.server.adapters.device.gpu.sparse_shelf import GpuSparseShelves
from turret.server.adapters.device.gpu.tables import GpuTables
from turret.server.adapters.device.gpu.uploads import Uploads
from turret.server.adapters.device.layout import ProjectionLayout
from turret.server.adapters.device.members import Members
from turret.server.adapters.device.packed.pack import PackedKinds
from turret.server.adapters.device.store import AdapterStore, BaseProduct, OnMoved, Resident
from turret.server.adapters.operators.adapter_operators import AdapterOperators

# Of the budget, what may be on its way to the device besides.
_STAGED_SHARE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuAdapterStep:
    """The adapters of one step, as kernels apply them.

    Attributes:
        projections: The pack's matrices.
        table: The step's segments; every row of the step is in it.
        kinds: Which packed operators the step's adapters have.
        low_rank: Projections with a low-rank update, gated or not.
        shelves: Rows of the shelves.
        inputs: What changes before the base multiplies it.
        modulated: Shelves of modulated updates.
        pairs: Projections with pairs.
        gates: Gates of learned fusions and routers.
        constants: Rows that attend to constants, or None.
        vocabulary: What changes of embedding and head, or None.
        addresses: Where tables lie that the step reads and not every step with adapters does.
    """

    projections: Mapping[str, GpuPackedProjection]
    table: SegmentTable
    kinds: PackedKinds
    low_rank: frozenset[str]
    shelves: GpuStepShelves
    inputs: ChangedInputs
    modulated: StepPlaced
    pairs: GpuStepPairs
    gates: GpuStepGates
    addresses: Hashable
    constants: GpuStepConstants | None = None
    vocabulary: StepVocabulary | None = None

    @property
    def signature(self) -> Hashable:
        """What the step launches, and where what it reads lies; see the module."""
        packed = self.kinds
        kinds = (self.low_rank, packed.gains, packed.biases)
        parts = (self.shelves, self.inputs, self.modulated, self.pairs, self.gates)
        others = [
            None if part is None else part.signature for part in (self.vocabulary, self.constants)
        ]
        return (kinds, *(part.signature for part in parts), *others, self.addresses)

    def changes(self, layer: int, projection: str) -> bool:
        """Whether anything of the step is added to what the base multiplies."""
        kinds = self.kinds
        packed = self.low_rank | kinds.gains | kinds.biases
        changed = projection in packed or self.inputs.changes(projection)
        return changed or self._adds(projection)

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
        self.shelves.apply_experts(layer, projection, x, y, routing, rows)

    def project(
        self,
        layer: int,
        projection: str,
        x: torch.Tensor,
        *,
        bias: torch.Tensor | None,
        base: BaseProduct,
        epilogue: Epilogue | None = None,
    ) -> torch.Tensor:
        """See ``AdapterStep``; with an epilogue, what that makes of the projection."""
        packed, kinds = self.projections[projection], self.kinds
        gain = packed.gain_delta if projection in kinds.gains else None
        delta = packed.bias if projection in kinds.biases else None
        (a, b), ranks = packed.layers[layer], packed.slice_ranks[layer]
        has_ranks = projection in self.low_rank
        expands = has_ranks or gain is not None or delta is not None
        more = self.inputs.leaves_products(projection, base) or self._adds(projection)
        end = None if more else epilogue
        multiplied = self.inputs.multiplied(layer, projection, x, base)
        if end is not None and not expands:
            result = base.ended(multiplied, end, bias)
            if result is not None:
                return result
        if has_ranks and multiplied is x:
            y, v = base.with_shrink(x, Shrink(a, ranks, self.table))
        else:
            y = self._product(projection, multiplied, base)
            if has_ranks:
                v = Shrink(a, ranks, self.table)(x)
            else:
                # Nothing of it is read: no adapter of the step has ranks here.
                v = rank_activations(self.table, len(b), x.device)
        gates = self.gates.of(layer, projection, x, v, self.table)
        # Copied by a kernel: early launches are behind no other copy.
        before = y * 1 if self.pairs.changes(projection) else y
        if bias is not None or expands:
            expand = Expand(
                y=y,
                v=v,
                b=b,
                slice_ranks=ranks,
                table=self.table,
                gain_delta=None if gain is None else gain[layer],
                bias=None if delta is None else delta[layer],
                base_bias=bias,
            )
            if end is not None:
                result = end.of_expand(expand)
                if result is not None:
                    return result
            expand.run(gates)
        self.inputs.add_products(layer, projection, x, y, base)
        self._add_modulated(layer, projection, x, y, base)
        self.pairs.apply(layer, projection, before, y, self.table)
        self.shelves.apply(layer, projection, x, y)
        return y if epilogue is None else epilogue(y)

    def _adds(self, projection: str) -> bool:
        """Whether the step has more than what an expand with an epilogue finishes."""
        others = (self.modulated, self.pairs, self.gates)
        return projection in self.shelves.by_projection or any(
            part.changes(projection) for part in others
        )

    def _product(
        self, projection: str, multiplied: torch.Tensor, base: BaseProduct
    ) -> torch.Tensor:
        """The base's, of one input or of one for each slice."""
        if multiplied.dim() == 2:
            return base(multiplied)
        return base.by_slices(multiplied, self.inputs.rows.free.get(projection, ()))

    def _add_modulated(
        self, layer: int, projection: str, x: torch.Tensor, y: torch.Tensor, base: BaseProduct
    ) -> None:
        """Add the modulated updates to ``y``, in place, slice by slice."""
        if self.modulated.changes(projection):
            for s, columns in enumerate(self.projections[projection].columns):
                own = {"base": base.part(s), "table": self.table}
                add_modulated(self.modulated, (layer, projection, s), x, y[:, columns], **own)


class GpuStore(AdapterStore):
    """A store whose steps run as kernels; see ``AdapterStore``.

    Args:
        layout: Shape of the base.
        dtype: Serving dtype.
        device: Where the kernels run.
        max_bytes: Budget of the copies.
        on_moved: Told of every adapter that was packed or forgotten.

    Attributes:
        epoch: Moves whenever the pack does, so that what was captured must be forgotten.
        version: Moves whenever an adapter enters or leaves: tables that were loaded before may say
            wrong places.
    """

    def __init__(
        self,
        layout: ProjectionLayout,
        dtype: torch.dtype,
        device: torch.device,
        max_bytes: int,
        on_moved: OnMoved = lambda _: None,
    ) -> None:
        like = (dtype, device)
        self._pack = GpuPack(
            layout,
            {name: GpuPackedProjection(layout, name, *like) for name in layout.projections},
            max_bytes,
        )
        self._shelves = GpuShelves(
            (
                GpuHadamardShelves(layout, *like),
                GpuKroneckerShelves(layout, *like),
                GpuCirculantShelves(layout, *like),
                GpuSparseShelves(layout, *like),
                GpuDenseShelves(layout, *like),
                GpuExpertShelves(layout, *like),
            )
        )
        self._gates = GpuGates(layout, self._pack, device)
        self._uploads = Uploads(device, max_bytes // _STAGED_SHARE)
        self._blocks = PlacedShelves(layout, self._pack, blocks_of, *like)
        self._modulated = PlacedShelves(layout, self._pack, modulated_of, *like)
        self._pairs = GpuPairs(layout, self._pack, device)
        self._constants = GpuConstants(layout.num_layers, *like)
        self._vocabulary = GpuVocabulary(device)
        placed = (self._blocks, self._modulated, self._pairs, self._constants)
        parts = (self._pack, self._shelves, self._gates, *placed)
        super().__init__(parts, device, max_bytes, on_moved)
        self.epoch = self.version = 0
        self._known = self._addresses()

    def _operators(self, adapter: Resident) -> AdapterOperators:
        return self._uploads.take(adapter.key, super()._operators(adapter))

    def is_near(self, adapter: Resident) -> bool:
        if adapter.key in self._entries:
            return True
        return self._uploads.is_near(adapter.key, super()._operators(adapter))

    def drop(self, key: str) -> None:
        super().drop(key)
        self._vocabulary.remove(key)
        self.version += 1
        self._uploads.drop(key)

    def unserved(self, operators: AdapterOperators) -> str | None:
        for path, ops in operators.modules.items():
            if ops.hadamard is not None and ops.hadamard.rank > MAX_HADAMARD_RANK:
                return f"{path}: Hadamard rank {ops.hadamard.rank} is over {MAX_HADAMARD_RANK}"
            if ops.kronecker is not None:
                in_m, rank = ops.kronecker.w1.shape[1], ops.kronecker.rank
                if in_m > MAX_IN_M or rank > MAX_RANK:
                    return (
                        f"{path}: a Kronecker product of {in_m} columns and rank {rank} is over "
                        f"{MAX_IN_M} and {MAX_RANK}"
                    )
        return None

    def _insert(self, adapter: Resident) -> None:
        # Even if it fails: others may have moved or left.
        self.version += 1
        super()._insert(adapter)
        change = self.vocabulary(adapter.key)
        if change is not None:
            try:
                self._vocabulary.put(adapter.key, change)
            except torch.OutOfMemoryError:
                self.drop(adapter.key)
                raise
        self._uploads.taken()
        known = self._addresses()
        if known != self._known:
            self.epoch += 1
            self._known = known

    def _addresses(self) -> list[object]:
        """What every captured step with adapters knows of the store."""
        return [projection.addresses() for projection in self._pack.projections.values()]

    def bind(
        self,
        runs: Runs,
        tables: GpuTables,
        given: Mapping[str, torch.Tensor] = MappingProxyType({}),
        sampled: Runs = (),
    ) -> GpuAdapterStep:
        """Load a step's tables.

        Args:
            runs: All rows of the step: first row, end row, mix (empty for the base model's). Each
                begins where the one before ends.
            tables: Where the metadata goes.
            given: What first passes have told; see ``StepMembers``.
            sampled: Likewise, of the rows that logits are wanted of.
        """
        kinds = self._pack.kinds({key for _, _, mix in runs for key, _ in mix})
        mixes = [mix for _, _, mix in runs]
        blocks = self._blocks.bind(mixes)
        rows = ChangedRows.of(runs, self._pack, self._pairs, blocks, kinds.input_gains)
        segments, gates = self._gates.bind(runs, rows.as_is, given)
        table, shelves = tables.load_segments(segments), self._shelves.bind(runs, tables)
        step = self._bound(table, kinds, shelves, gates, mixes)
        inputs = replace(step.inputs, blocks=blocks, rows=rows)
        constants = self._constants.bind(runs, tables)
        vocabulary = self._vocabulary.bind(runs, sampled, tables)
        return replace(step, inputs=inputs, constants=constants, vocabulary=vocabulary)

    def has_head_kernels(self, mix: Members) -> bool:
        """Whether kernels change what a mix changes of the head: all of it, or torch does."""
        return self._vocabulary.has_kernels(mix)

    def bind_form(self, low_rank: frozenset[str], tables: GpuTables) -> GpuAdapterStep:
        """What steps launch whose adapters have low-rank updates in some projections, and no more.

        Args:
            low_rank: Those projections.
            tables: Where the metadata goes: of no rows.
        """
        of_slices = frozenset((name, 0) for name in low_rank)
        none: frozenset[str] = frozenset()
        kinds = PackedKinds(of_slices, none, none, none)
        shelves = self._shelves.bind((), tables)
        return self._bound(tables.load_segments(()), kinds, shelves, GpuStepGates({}), ())

    def _bound(
        self,
        table: SegmentTable,
        kinds: PackedKinds,
        shelves: GpuStepShelves,
        gates: GpuStepGates,
        mixes: Sequence[Members],
    ) -> GpuAdapterStep:
        projections = self._pack.projections
        known = [
            (table.buffer.data_ptr(), table.rank_capacity, table.max_components),
            [projection.optional_addresses(kinds) for projection in projections.values()],
            self._shelves.addresses() if shelves.signature else None,
        ]
        return GpuAdapterStep(
            projections=projections,
            table=table,
            kinds=kinds,
            low_rank=frozenset(projection for projection, _ in kinds.low_rank).union(gates.tables),
            shelves=shelves,
            inputs=ChangedInputs(
                projections=projections,
                table=table,
                gained=kinds.input_gains,
                blocks=self._blocks.bind(()),
                rows=ChangedRows(()),
            ),
            modulated=self._modulated.bind(mixes),
            pairs=self._pairs.bind(mixes),
            gates=gates,
            addresses=repr(known),
        )
