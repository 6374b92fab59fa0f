"""The adapter pack on the Triton path: the same placement, applied by kernels.

A step's metadata is in tables of fixed address, so what a step launches depends only on which kinds
of operators it has (``GpuAdapterStep.signature``) and on where the pack's tensors are
(``GpuStore.epoch``): as long as both stay the same, a captured CUDA graph stays valid.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch

from turret.kernels.gpu.hadamard_shrink import MAX_RANK as MAX_HADAMARD_RANK
from turret.kernels.gpu.input_gain import input_gain
from turret.kernels.gpu.kronecker import MAX_IN_M, MAX_RANK
from turret.kernels.gpu.segment_table import SegmentTable
from turret.kernels.gpu.segmented_expand import segmented_expand
from turret.kernels.gpu.segmented_shrink import rank_activations, segmented_shrink
from turret.kernels.segments import LongSegment
from turret.server.adapters.device.gpu_extras import GpuExtras, GpuStepShelves, GpuTables
from turret.server.adapters.device.gpu_gates import GpuStepGates
from turret.server.adapters.device.gpu_upload import on_device
from turret.server.adapters.device.layout import ProjectionLayout
from turret.server.adapters.device.members import Members
from turret.server.adapters.device.packed_projection import PackedProjection
from turret.server.adapters.device.packed_store import PackedStore
from turret.server.adapters.device.segments import components_of
from turret.server.adapters.device.store import OnMoved, Resident
from turret.server.adapters.operators import AdapterOperators


class GpuPackedProjection(PackedProjection):
    """A packed group that also knows how many ranks every adapter has in every module.

    Attributes:
        slice_ranks: ``[layers, slots, slices]`` int32.
    """

    def __init__(
        self, layout: ProjectionLayout, name: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(layout, name, dtype, device)
        self.slice_ranks = self._ranks(1)

    def _ranks(self, num_slots: int) -> torch.Tensor:
        shape = (self._layout.num_layers, num_slots, len(self.slices))
        return torch.zeros(shape, dtype=torch.int32, device=self._device)

    def put_tables(self, operators: AdapterOperators, slot: int, num_slots: int) -> None:
        """Copy an adapter's gains, biases and ranks into its slot; clears what the slot held."""
        super().put_tables(operators, slot, num_slots)
        if self.slice_ranks.shape[1] < num_slots:
            grown = self._ranks(num_slots)
            grown[:, : self.slice_ranks.shape[1]] = self.slice_ranks
            self.slice_ranks = grown
        self.slice_ranks[:, slot] = 0
        for layer, s, ops in self._layout.of(operators, self.name):
            self.slice_ranks[layer, slot, s].fill_(ops.rank)

    def addresses(self) -> list[object]:
        """Where its tensors are, and how large; None for a table that does not exist."""
        tables = (self.gain_delta, self.input_gain_delta, self.bias)
        return [
            None if t is None else (t.data_ptr(), t.shape)
            for t in (self.a, *self.b, self.slice_ranks, *tables)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuAdapterStep:
    """The adapters of one step, as kernels apply them.

    Attributes:
        groups: The pack's groups.
        table: The step's segments; every row of the step is in it.
        present: Groups with a low-rank update.
        gains: Groups with a gain; ``input_gains`` and ``biases`` likewise.
        banks: Rows of the shelves.
        fusions: Rows of learned fusions.
    """

    groups: Mapping[str, GpuPackedProjection]
    table: SegmentTable
    present: frozenset[str]
    gains: frozenset[str]
    input_gains: frozenset[str]
    biases: frozenset[str]
    banks: GpuStepShelves
    fusions: GpuStepGates

    @property
    def signature(self) -> Hashable:
        """What the step launches; see the module."""
        kinds = (self.present, self.gains, self.input_gains, self.biases)
        return (kinds, self.banks.signature, self.fusions.signature)

    def apply(
        self,
        layer: int,
        group: str,
        x: torch.Tensor,
        y: torch.Tensor,
        bias: torch.Tensor | None,
        base: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Make the bias-free base results ``y`` of ``x`` the adapted projection, in place.

        Args:
            layer: Layer number.
            group: Fused projection.
            x: ``[rows, in]``.
            y: ``[rows, out]``.
            bias: The base's bias, ``[out]``, or None.
            base: The base product, for input gains.
        """
        packed, table = self.groups[group], self.table
        gain = packed.gain_delta if group in self.gains else None
        delta = packed.bias if group in self.biases else None
        if bias is not None or gain is not None or delta is not None or group in self.present:
            a, b = packed.layers[layer]
            ranks = packed.slice_ranks[layer]
            if group in self.present:
                v = segmented_shrink(x, a, ranks, table)
            else:
                # Nothing of it is read: no adapter of the step has ranks here.
                v = rank_activations(table, len(b), x.device)
            segmented_expand(
                y,
                v,
                b,
                ranks,
                table,
                gain_delta=None if gain is None else gain[layer],
                bias=None if delta is None else delta[layer],
                base_bias=bias,
            )
        if group in self.input_gains:
            assert packed.input_gain_delta is not None
            for s, columns in enumerate(packed.columns):
                scaled = input_gain(x, packed.input_gain_delta[layer, :, s], table)
                y[:, columns] += base(scaled)[:, columns]
        self.banks.apply(layer, group, x, y)
        self.fusions.apply(layer, group, x, y)


class GpuStore(PackedStore):
    """An adapter pack whose steps run as kernels.

    Attributes:
        epoch: Moves whenever tensors of the pack do, so that what was captured must be forgotten.
    """

    def __init__(
        self,
        layout: ProjectionLayout,
        dtype: torch.dtype,
        device: torch.device,
        max_bytes: int,
        on_moved: OnMoved = lambda _: None,
    ) -> None:
        super().__init__(layout, dtype, device, max_bytes, on_moved)
        self.epoch = 0
        self._rebuild(0)
        self._known = self._addresses()

    def _make_group(self, name: str) -> GpuPackedProjection:
        return GpuPackedProjection(self._layout, name, self._dtype, self._device)

    def _make_unstacked(self) -> GpuExtras:
        return GpuExtras(self._layout, self._dtype, self._device)

    def _operators(self, adapter: Resident) -> AdapterOperators:
        return on_device(super()._operators(adapter), self._device)

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
        super()._insert(adapter)
        known = self._addresses()
        if known != self._known:
            self.epoch += 1
            self._known = known

    def _addresses(self) -> list[list[object]]:
        """Everything a captured graph knows of the pack."""
        assert isinstance(self._unstacked, GpuExtras)
        groups = [group.addresses() for group in self._gpu_groups().values()]
        return [*groups, self._unstacked.addresses()]

    def _gpu_groups(self) -> dict[str, GpuPackedProjection]:
        return {name: g for name, g in self._groups.items() if isinstance(g, GpuPackedProjection)}

    def bind(self, runs: Sequence[tuple[int, int, Members]], tables: GpuTables) -> GpuAdapterStep:
        """Load a step's tables.

        Args:
            runs: All rows of the step: first row, end row, mix (empty for the base model's).
            tables: Where the metadata goes.
        """
        assert isinstance(self._unstacked, GpuExtras)
        entries = [self._entries[key] for key in {key for _, _, mix in runs for key, _ in mix}]
        segments = [
            LongSegment(start, end, tuple(components_of(mix, self._entries)))
            for start, end, mix in runs
        ]
        banks, fusions = self._unstacked.bind_tables(runs, tables)
        return GpuAdapterStep(
            groups=self._gpu_groups(),
            table=tables.load_segments(segments),
            present=frozenset(group for e in entries for group, _ in e.present),
            gains=frozenset().union(*(e.gains for e in entries)),
            input_gains=frozenset().union(*(e.input_gains for e in entries)),
            biases=frozenset().union(*(e.biases for e in entries)),
            banks=banks,
            fusions=fusions,
        )
