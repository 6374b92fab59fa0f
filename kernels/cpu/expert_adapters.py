"""Low-rank updates of experts, read where they lie.

Semantics, per pair ``p`` of a row and an expert ``e``, over the members ``k`` of the row's mix::

    y_p ← y_p + Σ_k w_k B_ke (A_ke x_p)

in fp32 with one rounding. As in ``row_adapters.py`` nothing is packed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from turret.kernels.cpu.native import LANES, functions, num_threads
from turret.kernels.expert_routing import Routing


class ExpertTable:
    """The addresses of one adapter's factors, by layer and projection. Keeps the factors alive.

    Args:
        updates: ``a`` ``[experts, rank, in]`` and ``b`` ``[experts, rank, out]`` of each, bf16,
            contiguous; None where the adapter has none.

    Attributes:
        width: Floats of scratch memory that a pair takes, of the projection that takes most.
    """

    def __init__(self, updates: Sequence[tuple[torch.Tensor, torch.Tensor] | None]) -> None:
        self._kept = updates
        rows = [
            [0, 0, 0] if pair is None else [*(t.data_ptr() for t in pair), pair[0].shape[1]]
            for pair in updates
        ]
        self._table = torch.tensor(rows, dtype=torch.int64)
        self.width = max((-(-row[2] // LANES) * LANES for row in rows), default=0)

    @property
    def address(self) -> int:
        return self._table.data_ptr()


class ExpertAdapters:
    """A step's rows, prepared once for all layers.

    Args:
        rows: Per row, up to the last one that has any: (table, weight) in the request's order.
    """

    def __init__(self, rows: Sequence[Sequence[tuple[ExpertTable, float]]]) -> None:
        members = [member for row in rows for member in row]
        first = [0]
        for row in rows:
            first.append(first[-1] + len(row))
        self._tables = {table for table, _ in members}
        addresses = [[table.address, 0] for table, _ in members]
        self._members = torch.tensor(addresses, dtype=torch.int64).view(-1, 2)
        weights = torch.tensor([weight for _, weight in members], dtype=torch.float64)
        self._members.view(torch.float64)[:, 1] = weights
        self._first = torch.tensor(first, dtype=torch.int64)
        width = max((sum(table.width for table, _ in row) for row in rows), default=0)
        threads = num_threads()
        self._scratch = torch.empty(threads * width)
        self._step = (ctypes.c_int64 * 6)(
            self._members.data_ptr(),
            self._first.data_ptr(),
            len(rows),
            self._scratch.data_ptr(),
            width,
            threads,
        )

    def adapt(
        self,
        update: int,
        x: torch.Tensor,
        y: torch.Tensor,
        routing: Routing,
        rows: torch.Tensor | None,
    ) -> None:
        """Add the updates of one projection of a layer to ``y``, in place.

        Args:
            update: The projection's number in the tables.
            x: ``[rows, in]`` or ``[pairs, in]`` bf16, rows may be strided.
            y: ``[pairs, out]`` bf16, contiguous.
            routing: The pairs.
            rows: The row of ``x`` that each pair reads, ``[pairs]`` int64; None for its own.
        """
        pairs = (ctypes.c_int64 * 10)(
            x.data_ptr(),
            y.data_ptr(),
            routing.rows.data_ptr(),
            routing.experts.data_ptr(),
            0 if rows is None else rows.data_ptr(),
            y.shape[0],
            x.stride(0),
            x.shape[1],
            y.shape[1],
            update,
        )
        functions().turret_adapt_experts(ctypes.addressof(self._step), ctypes.addressof(pairs))
