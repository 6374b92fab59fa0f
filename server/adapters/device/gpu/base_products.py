"""What adapters add by products with the base on the gpu path: changed inputs, modulated weights.

The base is linear in its input, so it multiplies changed inputs in place of a row's own, each slice
of a fused projection an input of its own. Where something else of a row's mix needs the base's own
result, changes add up before the base multiplies them too, slice by slice. A member with a gain has
a product of its own, under its gain.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from turret.kernels.gpu.adapters.input_blocks import gained_add, input_blocks
from turret.kernels.gpu.adapters.input_gain import ANY_ROWS, BOUND_ROWS, FREE_ROWS, input_gain
from turret.kernels.gpu.adapters.modulated_base import modulate, modulated_add
from turret.kernels.gpu.tables.segment_table import SegmentTable
from turret.server.adapters.device.gpu.pack import GpuPack, GpuPackedProjection
from turret.server.adapters.device.gpu.pairs import GpuPairs
from turret.server.adapters.device.gpu.placed_shelves import PlacedShelf, StepPlaced
from turret.server.adapters.device.members import Members
from turret.server.adapters.device.store import BaseProduct
from turret.server.adapters.operators.adapter_operators import ModuleOperators

# Rows that the base multiplies at once for modulated updates.
_MODULATED_ROWS = 256


def blocks_of(ops: ModuleOperators) -> tuple[torch.Tensor, ...] | None:
    """What goes on the shelves of input blocks."""
    return None if ops.input_blocks is None else ops.input_blocks.tensors()


def modulated_of(ops: ModuleOperators) -> tuple[torch.Tensor, ...] | None:
    """What goes on the shelves of modulated updates."""
    return None if ops.modulated is None else ops.modulated.tensors()


@dataclass(frozen=True, slots=True)
class ChangedRows:
    """Where the mixes of a step change inputs.

    Attributes:
        as_is: Of each run, ``LongSegment.as_is``.
        bound: Projections in which a row's input changes and something else of its mix needs what
            the base makes of the row's own.
        free: By projection, the runs of rows whose inputs change and of whose mixes nothing else
            does: those for which the base multiplies other inputs in place of their own.
    """

    as_is: Sequence[int]
    bound: frozenset[str] = frozenset()
    free: Mapping[str, Sequence[tuple[int, int]]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        runs: Sequence[tuple[int, int, Members]],
        pack: GpuPack,
        pairs: GpuPairs,
        blocks: StepPlaced,
        gained: frozenset[str],
    ) -> ChangedRows:
        """Find them.

        Args:
            runs: All rows of the step: first row, end row, mix.
            pack: Knows which operators each adapter has.
            pairs: Knows who has pairs.
            blocks: The step's input blocks.
            gained: Projections with input gains.
        """
        if not (gained or blocks.shelves):
            return cls([0] * len(runs))
        as_is: list[int] = []
        bound: set[str] = set()
        free: dict[str, list[tuple[int, int]]] = {}
        for start, end, mix in runs:
            own = pack.kinds(key for key, _ in mix)
            needed = own.gains.union(*(pairs.of(key) for key, _ in mix))
            changed = own.input_gains.union(*(blocks.without_gain(key) for key, _ in mix))
            as_is.append(sum(1 << i for i, name in enumerate(pack.projections) if name in needed))
            bound |= needed & changed
            for name in changed - needed:
                free.setdefault(name, []).append((start, end))
        return cls(as_is, frozenset(bound), free)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangedInputs:
    """The inputs that a step's adapters change.

    Attributes:
        projections: The pack's tables.
        table: The step's segments.
        gained: Projections with input gains.
        blocks: Shelves of input blocks.
        rows: Whose inputs change.
    """

    projections: Mapping[str, GpuPackedProjection]
    table: SegmentTable
    gained: frozenset[str]
    blocks: StepPlaced
    rows: ChangedRows

    @property
    def signature(self) -> Hashable:
        """What of it decides a decode step's launches."""
        return self.gained, self.blocks.signature, self.rows.bound

    def changes(self, projection: str) -> bool:
        return projection in self.gained or self.blocks.changes(projection)

    def leaves_products(self, projection: str, base: BaseProduct) -> bool:
        """Whether ``add_products`` has something to add."""
        apart = self._apart(projection, base) is not None and self._changes_freely(projection)
        return apart or self.blocks.changes(projection, has_gain=True)

    def multiplied(
        self, layer: int, projection: str, x: torch.Tensor, base: BaseProduct
    ) -> torch.Tensor:
        """What the base multiplies.

        Returns:
            ``x``, ``[rows, in]``; or where inputs change and nothing else needs what it gives, a
            tensor in its place, with slices of their own ``[slices, rows, in]``.
        """
        if not (self._changes_freely(projection) and self._takes_changed(projection, base)):
            return x
        slices = range(len(self.projections[projection].columns))
        taken = FREE_ROWS, self._bit(projection)
        shelves = [self._shelves(layer, projection, s, has_gain=False) for s in slices]
        if projection in self.gained:
            changed = self._gained(layer, projection, x, taken, whole=True)
        elif any(shelves):
            changed = x.expand(len(slices), *x.shape).clone(memory_format=torch.contiguous_format)
        else:
            return x if len(slices) == 1 else x.expand(len(slices), *x.shape)
        for own, found in zip(changed, shelves, strict=True):
            self._add_blocks(layer, x, own, found, taken)
        return changed if len(slices) > 1 else changed[0]

    def add_products(
        self, layer: int, projection: str, x: torch.Tensor, y: torch.Tensor, base: BaseProduct
    ) -> None:
        """Add what the base makes of other inputs than it has multiplied to ``y``, in place."""
        if not self.leaves_products(projection, base):
            return
        packed, taken = self.projections[projection], self._apart(projection, base)
        changes: Sequence[torch.Tensor | None] = [None] * len(packed.columns)
        if taken is not None and projection in self.gained:
            changes = list(self._gained(layer, projection, x, taken, whole=False))
        for s, columns in enumerate(packed.columns):
            part, own, u = y[:, columns], base.part(s), changes[s]
            shelves = self._shelves(layer, projection, s, has_gain=False)
            if taken is not None and shelves:
                u = torch.zeros_like(x, memory_format=torch.contiguous_format) if u is None else u
                self._add_blocks(layer, x, u, shelves, taken)
            if u is not None:
                part += own(u)
            self._add_gained_blocks(layer, projection, s, x, part, own)

    def _bit(self, projection: str) -> int:
        """The projection's, of ``LongSegment.as_is``."""
        return list(self.projections).index(projection)

    def _changes_freely(self, projection: str) -> bool:
        """Whether inputs change by something else than blocks under a gain, in any layer.

        Of the layer it would depend on who else is on a shelf, and with it how rows of longer
        prompts are multiplied.
        """
        return projection in self.gained or self.blocks.changes(projection, has_gain=False)

    def _takes_changed(self, projection: str, base: BaseProduct) -> bool:
        """Whether the base can multiply changed inputs: slices may each have one of their own."""
        return len(self.projections[projection].columns) == 1 or base.takes_own_inputs

    def _apart(self, projection: str, base: BaseProduct) -> tuple[int, int] | None:
        """Rows whose changes the base multiplies apart, and the projection's bit."""
        if not self._takes_changed(projection, base):
            return ANY_ROWS, self._bit(projection)
        return (BOUND_ROWS, self._bit(projection)) if projection in self.rows.bound else None

    def _gained(
        self, layer: int, projection: str, x: torch.Tensor, taken: tuple[int, int], *, whole: bool
    ) -> torch.Tensor:
        gain = self.projections[projection].input_gain_delta
        assert gain is not None
        return input_gain(x, gain[layer], self.table, taken=taken[0], bit=taken[1], whole=whole)

    def _shelves(
        self, layer: int, projection: str, s: int, *, has_gain: bool
    ) -> list[tuple[PlacedShelf, int]]:
        found = self.blocks.of(layer, projection, s)
        return [(shelf, count) for shelf, count in found if shelf.has_gain == has_gain]

    def _add_blocks(
        self,
        layer: int,
        x: torch.Tensor,
        u: torch.Tensor,
        shelves: Sequence[tuple[PlacedShelf, int]],
        taken: tuple[int, int],
    ) -> None:
        """Add what blocks make of some rows to ``u``, in place."""
        for shelf, _ in shelves:
            own = shelf.tables[0][layer]
            input_blocks(x, u, own, shelf.places, self.table, taken=taken[0], bit=taken[1])

    def _add_gained_blocks(
        self,
        layer: int,
        projection: str,
        s: int,
        x: torch.Tensor,
        y: torch.Tensor,
        base: BaseProduct,
    ) -> None:
        """Add what the base makes of blocks under gains to a slice's result, in place."""
        packed = self.projections[projection]
        for shelf, count in self._shelves(layer, projection, s, has_gain=True):
            assert packed.gain_delta is not None
            gain = packed.gain_delta[layer, :, packed.columns[s]]
            for nth in range(count):
                own = torch.zeros_like(x)
                input_blocks(x, own, shelf.tables[0][layer], shelf.places, self.table, nth)
                gained_add(y, base(own), gain, shelf.places, self.table, nth)


def add_modulated(
    modulated: StepPlaced,
    place: tuple[int, str, int],
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    base: BaseProduct,
    table: SegmentTable,
) -> None:
    """Add the modulated updates of a slice to ``y``, in place.

    Args:
        modulated: The step's.
        place: Layer, projection and slice.
        x: The projection's input, ``[rows, in]``.
        y: The slice's result, ``[rows, out]``.
        base: The slice.
        table: The step's segments.
    """
    step = max(1, _MODULATED_ROWS // max(len(x), 1))
    for shelf, count in modulated.of(*place):
        a, b = (factor[place[0]] for factor in shelf.tables)
        for nth in range(count):
            for first in range(0, a.shape[1], step):
                ranks = slice(first, min(first + step, a.shape[1]))
                rows = modulate(x, a, ranks, shelf.places, table, nth)
                modulated_add(y, base.stacked(rows), b, ranks, shelf.places, table, nth)
