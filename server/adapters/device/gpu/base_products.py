"""What adapters add by products with the base on the gpu path: changed inputs, modulated weights.

Changes of inputs without a gain add up before the base multiplies them, once for each slice. A
member with a gain has a product of its own, under its gain.
"""

from __future__ import annotations

import torch

from turret.kernels.gpu.adapters.input_blocks import gained_add, input_blocks
from turret.kernels.gpu.adapters.modulated_base import modulate, modulated_add
from turret.kernels.gpu.tables.segment_table import SegmentTable
from turret.server.adapters.device.gpu.placed_shelves import StepPlaced
from turret.server.adapters.device.store import BaseProduct
from turret.server.adapters.operators import ModuleOperators

# Rows that the base multiplies at once for modulated updates.
_MODULATED_ROWS = 256


def blocks_of(ops: ModuleOperators) -> tuple[torch.Tensor, ...] | None:
    """What goes on the shelves of input blocks."""
    return None if ops.input_blocks is None else ops.input_blocks.tensors()


def modulated_of(ops: ModuleOperators) -> tuple[torch.Tensor, ...] | None:
    """What goes on the shelves of modulated updates."""
    return None if ops.modulated is None else ops.modulated.tensors()


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
    """
    shelves = blocks.of(*place)
    for shelf, _ in shelves:
        if not shelf.has_gain:
            u = torch.zeros_like(x) if u is None else u
            input_blocks(x, u, shelf.tables[0][place[0]], shelf.places, table)
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
