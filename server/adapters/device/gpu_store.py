"""The gpu path's store: Triton kernels for operators that have one, ``add`` for the others.

A step's metadata is in tables of fixed address, and the pack never moves. The launches of a step
therefore depend only on the kinds of its operators and the addresses of their tables
(``GpuAdapterStep.signature``), and a captured CUDA graph stays valid as long as these do not
change. A step in which some row has an operator without a kernel is launched without a graph.

One part of the budget is for the pack, which is allocated at startup. The other part is for
everything else, and is allocated when adapters enter.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from turret.kernels.gpu.low_rank import Shrink, segmented_expand
from turret.kernels.gpu.nf4 import Epilogue
from turret.kernels.gpu.tables import SegmentTable
from turret.server.adapters.device import (
    AdapterMemoryError,
    AdapterStore,
    BaseProduct,
    ExpertPairs,
    Members,
    OnMoved,
    ProjectionLayout,
    Resident,
    StepMembers,
    has_kernel,
)
from turret.server.adapters.device.gpu_pack import (
    PACKED,
    GpuGates,
    GpuPack,
    GpuPackedProjection,
    GpuStepGates,
    StepForm,
)
from turret.server.adapters.device.gpu_slot_tables import (
    GpuSlotTables,
    GpuStepSlotTables,
    GpuTables,
)
from turret.server.adapters.device.gpu_uploads import Uploads, beside_steps, empty_cache
from turret.server.adapters.device.reference import Reference, StepReference
from turret.server.adapters.operators.adapter_operators import AdapterOperators
from turret.server.adapters.operators.gate import Gate
from turret.server.adapters.operators.low_rank import LowRank
from turret.server.adapters.operators.vectors import Gain
from turret.server.basics.work import is_out_of_memory

# Runs of rows as (first, end, mix).
Runs = Sequence[tuple[int, int, Members]]

# The share of the budget for everything outside the pack is 1/4. Copies on their way to the device
# may take another 1/8 on top of the budget.
_OTHER_SHARE, _STAGED_SHARE = 4, 8
# How long an adapter is refused without another try after the device had no memory for it.
_REFUSED_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuAdapterStep:
    """The adapters of one step.

    Attributes:
        projections: The pack's matrices.
        table: The step's segments; every row of the step is in it.
        form: The kinds of kernels that the step launches.
        slot_tables: The rows that use slot tables.
        gates: Gates of learned fusions.
        addresses: Addresses of the tables that this step reads, except those that every step with
            adapters reads.
        others: Rows whose adapters have operators without a kernel, or None. A step with such rows
            is never captured.
    """

    projections: Mapping[str, GpuPackedProjection]
    table: SegmentTable
    form: StepForm
    slot_tables: GpuStepSlotTables
    gates: GpuStepGates
    addresses: Hashable
    others: StepReference | None = None

    @property
    def signature(self) -> tuple[StepForm, Hashable]:
        """Identifies a step's launches and their addresses; see the module docstring."""
        return self.form, self.addresses

    def changes(self, layer: int, projection: str) -> bool:
        """Whether the step's adapters change the base's product of this projection."""
        if self.others is not None or projection in self.slot_tables.by_projection:
            return True
        return any((kind, projection) in self.form for kind in PACKED)

    def attend(self, layer: int, q: torch.Tensor, attended: torch.Tensor) -> None:
        if self.others is not None:
            self.others.attend(layer, q, attended)

    def apply_experts(self, pairs: ExpertPairs) -> None:
        self.slot_tables.apply_experts(pairs)

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
        """See ``AdapterStep``. With an epilogue, returns the epilogue's result."""
        packed, has_ranks = self.projections[projection], (LowRank, projection) in self.form
        has_vectors = (Gain, projection) in self.form
        (a, b), ranks = packed.layers[layer], packed.slice_ranks[layer]
        if has_ranks:
            y, v = base.with_shrink(x, Shrink(a, ranks, self.table))
        else:
            # No adapter of the step has ranks here, so v is never read.
            shape = (1, self.table.rank_capacity * len(b))
            y, v = base(x), torch.empty(shape, dtype=torch.float32, device=x.device)
        gates = self.gates.of(layer, projection, x, v, self.table)
        if has_ranks or has_vectors:
            segmented_expand(
                y,
                v,
                b,
                ranks,
                self.table,
                gain_delta=packed.gain_delta[layer] if has_vectors else None,
                bias=packed.bias[layer] if has_vectors else None,
                base_bias=bias,
                gates=gates,
            )
        elif bias is not None:
            y += bias
        self.slot_tables.apply(layer, projection, x, y)
        if self.others is not None:
            self.others.apply(layer, projection, x, y, base)
        return y if epilogue is None else epilogue(y)


class GpuStore(AdapterStore):
    """A store whose steps run as kernels; see ``AdapterStore``.

    Args:
        layout: Shape of the base.
        dtype: Serving dtype.
        device: Where the kernels run.
        max_bytes: Budget for the adapters on the device.
        on_moved: Called with every adapter that enters or leaves.

    Attributes:
        later_bytes: Bytes that will be allocated when adapters enter.
        version: Changes whenever an adapter enters or leaves, because places in tables that were
            loaded before may then be wrong.
    """

    def __init__(
        self,
        layout: ProjectionLayout,
        dtype: torch.dtype,
        device: torch.device,
        max_bytes: int,
        on_moved: OnMoved = lambda _: None,
    ) -> None:
        self._pack = GpuPack(layout, dtype, device, max_bytes - max_bytes // _OTHER_SHARE)
        self._slot_tables = GpuSlotTables(layout, self._pack, dtype, device)
        self._gates = GpuGates(layout, self._pack, device)
        self._uploads = Uploads(device, max_bytes // _STAGED_SHARE)
        self._others = Reference(layout, device, lambda one: not has_kernel(one, "gpu"))
        parts = (self._pack, self._slot_tables, self._gates, self._others)
        super().__init__(parts, device, max_bytes, on_moved)
        self.budgets = (self._pack.budget, max(max_bytes - self._pack.num_bytes, 0))
        self.later_bytes = self.budgets[1] + max_bytes // _STAGED_SHARE
        self.version = 0
        # The time at which the device had no memory for an adapter, in seconds.
        self._refused: dict[str, float] = {}

    def _operators(self, adapter: Resident) -> AdapterOperators:
        return self._uploads.take(adapter.key, super()._operators(adapter))

    def needs(self, operators: AdapterOperators) -> tuple[int, ...]:
        packed = self._pack.bytes_of(operators)
        return packed, self.stored_bytes(operators) - packed

    def admit(self, operators: AdapterOperators) -> None:
        """See ``AdapterStore``; compiles the kernels that only some adapters need."""
        super().admit(operators)
        with torch.inference_mode(), beside_steps(self._device):
            self._slot_tables.compile(operators)

    def is_near(self, adapter: Resident) -> bool:
        if adapter.key in self._entries:
            return True
        return self._uploads.is_near(adapter.key, super()._operators(adapter))

    def is_refused(self, key: str) -> bool:
        return time.monotonic() - self._refused.get(key, -_REFUSED_SECONDS) < _REFUSED_SECONDS

    def drop(self, key: str) -> None:
        super().drop(key)
        self.version += 1
        self._uploads.drop(key)
        self._refused.pop(key, None)

    def _insert(self, adapter: Resident) -> None:
        if self.is_refused(adapter.key):
            raise AdapterMemoryError(adapter.key)
        # Even a failed insert changes the version: other adapters may have moved or left.
        self.version += 1
        if not self._try_insert(adapter):
            # Captured steps do not depend on single adapters, so keep them.
            self.drop_idle()
            empty_cache(self._device)
            if not self._try_insert(adapter):
                self._refused[adapter.key] = time.monotonic()
                raise AdapterMemoryError(adapter.key)
        self._refused.pop(adapter.key, None)

    def _try_insert(self, adapter: Resident) -> bool:
        """Try to insert an adapter; returns whether the device had enough memory.

        This is a separate method because an except clause in the caller would keep the tensors of
        the failed attempt alive.
        """
        try:
            super()._insert(adapter)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            self._uploads.taken()
        return True

    def form(self, mixes: Iterable[Members]) -> StepForm:
        """The kinds of operators for which a step with these mixes launches kernels."""
        parts = set[tuple[Hashable, Hashable]]()
        for mix in {tuple(mix) for mix in mixes}:
            parts.update(*(self._pack.form(key) for key, _ in mix), self._slot_tables.form(mix))
        # The ranks of gates' components need the low-rank kernels, too.
        return frozenset(parts | {(LowRank, name) for kind, name in parts if kind is Gate})

    def bind(
        self,
        runs: Runs,
        tables: GpuTables,
        scalings: Mapping[str, torch.Tensor] = MappingProxyType({}),
        num_decode: int | None = None,
        form: StepForm | None = None,
    ) -> GpuAdapterStep:
        """Load a step's tables.

        Args:
            runs: All rows of the step: first row, end row, mix (empty for the base model's). Each
                begins where the one before ends.
            tables: The tables for the metadata.
            scalings: See ``StepMembers``.
            num_decode: The number of leading rows that decode; None for all. The base multiplies
                them differently (``server/models/weights/nf4_gpu.py``).
            form: The kernels to launch, at least those that the rows need; None for exactly those.
        """
        form = self.form(mix for _, _, mix in runs) if form is None else form
        segments, gates = self._gates.bind(runs, form)
        table, slot_tables = (
            tables.load_segments(segments),
            self._slot_tables.bind(runs, tables, form),
        )
        count = max((end for _, end, _ in runs), default=0) if num_decode is None else num_decode
        known = [
            (table.buffer.data_ptr(), table.rank_capacity, table.max_components),
            slot_tables.addresses(),
            gates.addresses(),
        ]
        return GpuAdapterStep(
            projections=self._pack.projections,
            table=table,
            form=form,
            slot_tables=slot_tables,
            gates=gates,
            addresses=repr(known),
            others=self._others.bind(StepMembers((), runs, scalings), count),
        )
