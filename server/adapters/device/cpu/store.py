"""The cpu path's store, which uses the running adapters in place in host memory.

Nothing is packed: each row of a step reads the factors of its own adapters, through the tables of
``cpu/tables.py``. Operators without a compiled kernel are computed by their own ``add``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from turret.kernels.cpu.native import num_threads
from turret.kernels.cpu.row_adapters import RowAdapters, RowSegment
from turret.server.adapters.device.cpu.inputs import StepInputs
from turret.server.adapters.device.cpu.tables import (
    AdapterTable,
    AdapterTables,
    CpuExpertUpdates,
    CpuStepExperts,
    ModuleNumbers,
)
from turret.server.adapters.device.reference import Reference, StepReference
from turret.server.adapters.device.store import (
    BaseProduct,
    ExpertPairs,
    Members,
    OnMoved,
    ProjectionLayout,
    StepMembers,
    StepStore,
    has_kernel,
)


class CpuStore(StepStore):
    """See ``AdapterStore``.

    Args:
        layout: Shape of the base.
        dtype: Serving dtype, bf16.
        device: The CPU.
        max_bytes: Budget for the adapters in the store.
        on_moved: Called with every adapter that enters or leaves.
    """

    def __init__(
        self,
        layout: ProjectionLayout,
        dtype: torch.dtype,
        device: torch.device,
        max_bytes: int,
        on_moved: OnMoved = lambda _: None,
    ) -> None:
        self._layout = layout
        self._numbers = ModuleNumbers(layout)
        self._tables = AdapterTables(layout, self._numbers)
        self._experts = CpuExpertUpdates(layout)
        self._others = Reference(layout, device, lambda one: not has_kernel(one, "cpu"))
        self._last: _Last | None = None
        parts = (self._tables, self._experts, self._others)
        super().__init__(parts, device, max_bytes, on_moved)

    def step(self, members: StepMembers) -> CpuStep:
        segments = self._segments(members)
        tables = {key: self._tables[key] for _, _, mix in segments for key, _ in mix}
        # Decoding requests keep their adapters from step to step, so try to reuse the last step.
        last = self._last
        if last is not None and last.serves(members, tables):
            last.step.rows.restart()
            return last.step
        rows = RowAdapters(
            [
                RowSegment(start, end, [(tables[key].modules, weight) for key, weight in mix])
                for start, end, mix in segments
            ],
            self._numbers.max_slices,
            self._numbers.sizes,
        )
        long = members.long
        step = CpuStep(
            rows=rows,
            layout=self._layout,
            numbers=self._numbers,
            updates=frozenset().union(*(table.updates for table in tables.values())),
            inputs=StepInputs.of(segments, tables, self._layout, self._numbers),
            base_rows=slice(len(members.short), long[0][0] if long else None),
            experts=self._experts.bind(members),
            others=self._others.bind(members),
        )
        self._last = _Last(members, tables, step) if step.is_reusable else None
        return step

    def drop(self, key: str) -> None:
        if self._last is not None and key in self._last.tables:
            self._last = None
        super().drop(key)

    @staticmethod
    def _segments(members: StepMembers) -> list[tuple[int, int, Members]]:
        """Runs of adapted rows, one per mix."""
        segments: list[tuple[int, int, Members]] = []
        for row, mix in enumerate(members.short):
            if segments and segments[-1][2] == mix:
                segments[-1] = (segments[-1][0], row + 1, mix)
            else:
                segments.append((row, row + 1, mix))
        return [*segments, *members.long]


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuStep:
    """See ``AdapterStep``.

    Attributes:
        rows: The segments.
        layout: Shape of the base.
        numbers: The numbers of its modules.
        updates: Projections in which some adapter of the step has an update, gain or bias.
        inputs: Rows whose input changes.
        base_rows: Rows of the base model alone.
        experts: Rows whose adapters change experts, or None.
        others: Rows of operators that have no compiled kernel, or None.
    """

    rows: RowAdapters
    layout: ProjectionLayout
    numbers: ModuleNumbers
    updates: frozenset[str]
    inputs: StepInputs
    base_rows: slice
    experts: CpuStepExperts | None
    others: StepReference | None

    @property
    def is_reusable(self) -> bool:
        """Whether this step can be used again for the same rows and adapters."""
        return self.others is None and self.experts is None

    @property
    def is_native(self) -> bool:
        """Whether a layer is changed only by ``rows`` and by inputs that the base multiplies."""
        return self.others is None and not self.inputs.added

    def attend(self, layer: int, q: torch.Tensor, attended: torch.Tensor) -> None:
        if self.others is not None:
            self.others.attend(layer, q, attended)

    def apply_experts(self, pairs: ExpertPairs) -> None:
        if self.experts is not None:
            self.experts.apply(pairs)

    def project(
        self,
        layer: int,
        projection: str,
        x: torch.Tensor,
        *,
        bias: torch.Tensor | None,
        base: BaseProduct,
    ) -> torch.Tensor:
        y = self.inputs.multiply(self.rows, layer, projection, x, base)
        if projection in self.updates:
            self.rows.adapt(self.numbers.shape(layer, projection), x, y, bias)
            if bias is not None:
                y[self.base_rows] += bias
        elif bias is not None:
            y += bias
        self.inputs.add(self.rows, layer, projection, x, y, base)
        if self.others is not None:
            self.others.apply(layer, projection, x, y, base)
        return y


@dataclass(frozen=True, slots=True)
class _Last:
    """The last step and the values from which it was made."""

    members: StepMembers
    tables: dict[str, AdapterTable]
    step: CpuStep

    def serves(self, members: StepMembers, tables: dict[str, AdapterTable]) -> bool:
        # members.scalings are not compared: no step that reads them is reused, and tensors do not
        # compare as one bool.
        return (
            (members.short, members.long) == (self.members.short, self.members.long)
            and tables.keys() == self.tables.keys()
            and all(self.tables[key] is table for key, table in tables.items())
            and self.step.rows.num_threads == num_threads()
        )
