"""What adapters add by products with the base on the gpu path: changed inputs, modulated weights.

A projection of one slice multiplies the changed inputs in place of its own. Where slices have
inputs of their own, or something else of a row's mix needs the base's own result, changes add up
before the base multiplies them too, once for each slice. A member with a gain has a product of its
own, under its gain.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from turret.kernels.gpu.adapters.input_blocks import gained_add, input_blocks
from turret.kernels.gpu.adapters.modulated_base import modulate, modulated_add
from turret.kernels.gpu.tables.segment_table import SegmentTable
from turret.server.adapters.device.gpu.pack import GpuPack
from turret.server.adapters.device.gpu.pairs import GpuPairs
from turret.server.adapters.device.gpu.placed_shelves import StepPlaced
from turret.server.adapters.device.members import Members
from turret.server.adapters.device.packed.pack import PackedKinds
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


def needed_as_is(
    mixes: Sequence[Members],
    kinds: PackedKinds,
    pack: GpuPack,
    pairs: GpuPairs,
    blocks: StepPlaced,
) -> tuple[list[int], frozenset[str]]:
    """Where mixes need what the base makes of their rows' own inputs.

    Args:
        mixes: Those of the step's runs.
        kinds: Packed operators that they have between them.
        pack: Knows which each has.
        pairs: Knows who has pairs.
        blocks: The step's input blocks.

    Returns:
        ``LongSegment.as_is`` of each, and ``GpuAdapterStep.bound``.
    """
    if not (kinds.input_gains or blocks.shelves):
        return [0] * len(mixes), frozenset()
    bits: list[int] = []
    bound: set[str] = set()
    # Of several slices the base multiplies no changed input in place of the rows' own.
    single = {name for name, packed in pack.projections.items() if len(packed.columns) == 1}
    for mix in mixes:
        own = pack.kinds(key for key, _ in mix)
        needed = own.gains.union(*(pairs.of(key) for key, _ in mix))
        changed = own.input_gains.union(*(blocks.without_gain(key) for key, _ in mix))
        bits.append(sum(1 << i for i, name in enumerate(pack.projections) if name in needed))
        bound |= needed & changed & single
    return bits, frozenset(bound)


def add_blocks(
    blocks: StepPlaced,
    place: tuple[int, str, int],
    x: torch.Tensor,
    u: torch.Tensor | None,
    table: SegmentTable,
    taken: tuple[int, int],
) -> torch.Tensor | None:
    """Add what blocks without a gain make of some rows; see ``add_changed_inputs``.

    Returns:
        ``u``, or zeros and what was added, or None where there is neither.
    """
    for shelf, _ in blocks.of(*place):
        if not shelf.has_gain:
            u = torch.zeros_like(x, memory_format=torch.contiguous_format) if u is None else u
            own = shelf.tables[0][place[0]]
            input_blocks(x, u, own, shelf.places, table, taken=taken[0], bit=taken[1])
    return u


def add_changed_inputs(
    blocks: StepPlaced,
    place: tuple[int, str, int],
    x: torch.Tensor,
    y: torch.Tensor,
    u: torch.Tensor | None,
    *,
    gain_delta: torch.Tensor | None,
    base: BaseProduct,
    table: SegmentTable,
    taken: tuple[int, int] | None,
) -> None:
    """Add what the base makes of a slice's changed inputs to ``y``, in place.

    Args:
        blocks: The step's input blocks.
        place: Layer, projection and slice.
        x: The projection's input, ``[rows, in]``.
        y: The slice's result, ``[rows, out]``.
        u: What input gains change, ``[rows, in]``, or None; may be overwritten.
        gain_delta: ``g − 1`` by slot of the pack, ``[slots, out]``, or None: no gains.
        base: The slice.
        table: The step's segments.
        taken: Rows whose changes without a gain are not in ``y`` yet, and the projection's bit; or
            None: all are.
    """
    shelves = blocks.of(*place)
    if taken is not None:
        u = add_blocks(blocks, place, x, u, table, taken)
    if u is not None:
        y += base(u)
    for shelf, count in shelves:
        for nth in range(count if shelf.has_gain else 0):
            assert gain_delta is not None
            own = torch.zeros_like(x)
            input_blocks(x, own, shelf.tables[0][place[0]], shelf.places, table, nth)
            gained_add(y, base(own), gain_delta, shelf.places, table, nth)


def add_modulated(
    modulated: StepPlaced,
    place: tuple[int, str, int],
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    base: BaseProduct,
    table: SegmentTable,
) -> None:
    """Add the modulated updates of a slice to ``y``, in place; see ``add_changed_inputs``."""
    step = max(1, _MODULATED_ROWS // max(len(x), 1))
    for shelf, count in modulated.of(*place):
        a, b = (factor[place[0]] for factor in shelf.tables)
        for nth in range(count):
            for first in range(0, a.shape[1], step):
                ranks = slice(first, min(first + step, a.shape[1]))
                rows = modulate(x, a, ranks, shelf.places, table, nth)
                modulated_add(y, base.stacked(rows), b, ranks, shelf.places, table, nth)
