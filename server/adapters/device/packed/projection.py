"""The packed matrices of one fused projection kind (``qkv``, ``o``, …), all layers."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from turret.server.adapters.device.layout import ProjectionLayout
from turret.server.adapters.device.packed.pieces import by_layers
from turret.server.adapters.operators.adapter_operators import AdapterOperators


class PackedProjection:
    """Low-rank matrices stacked along the rank axis, and per-slot tables.

    Attributes:
        columns: The columns of each slice in a fused result.
        a: ``[layers, pack_rank, slices, in]``: an adapter's ranks are one run for all slices.
        b: Per slice ``[layers, pack_rank, out]``.
        layers: Per layer, its views of ``a`` and ``b``.
        gain_delta: ``g − 1`` per slot, ``[layers, slots, sum(out)]`` fp32, or None (no gains yet).
        input_gain_delta: ``l − 1`` per slot, ``[layers, slots, slices, in]`` fp32, or None.
        bias: ``[layers, slots, sum(out)]`` fp32, or None.
    """

    def __init__(
        self, layout: ProjectionLayout, name: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.name = name
        self.slices = layout.projections[name]
        self.columns = layout.columns(name)
        self.dtype = dtype
        self._layout = layout
        self._device = device
        self.a, self.b = self._make_a(0), [self._make_b(s, 0) for s in range(len(self.slices))]
        self.layers = self._layers()
        self.gain_delta: torch.Tensor | None = None
        self.input_gain_delta: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None

    def grow(self, rank: int, moves: Iterable[tuple[int, int, int]]) -> None:
        """Make matrices of ``rank`` ranks.

        Args:
            rank: How many.
            moves: What of the old ones goes where: first rank and end, first rank in the new ones.
        """
        # One matrix after the other, since the old and the new one are there at once.
        self.layers = []
        old, self.a = self.a, self._make_a(rank)
        for start, end, first in moves:
            self.a[:, first : first + end - start] = old[:, start:end]
        for s in range(len(self.slices)):
            old, self.b[s] = self.b[s], self._make_b(s, rank)
            for start, end, first in moves:
                self.b[s][:, first : first + end - start] = old[:, start:end]
        self.layers = self._layers()

    def move(self, moves: Iterable[tuple[int, int, int]]) -> None:
        """Move ranks down within the matrices.

        Args:
            moves: As for ``grow``; no range moves up, and lower ones come first.
        """
        for start, end, first in moves:
            if first != start:
                for matrix in (self.a, *self.b):
                    # A copy: what moves may overlap where it goes.
                    matrix[:, first : first + end - start] = matrix[:, start:end].clone()

    def _make_a(self, rank: int) -> torch.Tensor:
        shape = (self._layout.num_layers, rank, len(self.slices), self.slices[0].in_features)
        return torch.zeros(shape, dtype=self.dtype, device=self._device)

    def _make_b(self, s: int, rank: int) -> torch.Tensor:
        shape = (self._layout.num_layers, rank, self.slices[s].out_features)
        return torch.zeros(shape, dtype=self.dtype, device=self._device)

    def _layers(self) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
        return [(self.a[i], [b[i] for b in self.b]) for i in range(self._layout.num_layers)]

    def put_low_rank(self, operators: AdapterOperators, start: int, end: int) -> None:
        """Copy an adapter's factors into ranks ``[start, end)``; unused ones become zero."""
        if start == end:
            return
        self.a[:, start:end] = 0
        for b in self.b:
            b[:, start:end] = 0
        found = self._layout.of(operators, self.name)
        for s, b in enumerate(self.b):
            own = [
                (i, ops.low_rank) for i, of, ops in found if of == s and ops.low_rank is not None
            ]
            for layers, factor in by_layers((i, low_rank.a) for i, low_rank in own):
                self.a[layers, start : start + factor.shape[1], s] = factor
            for layers, factor in by_layers((i, low_rank.b) for i, low_rank in own):
                b[layers, start : start + factor.shape[1]] = factor

    def put_tables(self, operators: AdapterOperators, slot: int, num_slots: int) -> None:
        """Copy an adapter's gains and biases into its slot; clears what the slot held."""
        found = self._layout.of(operators, self.name)
        width, inner = self._layout.width(self.name), (len(self.slices), self.slices[0].in_features)
        # A table that exists covers every slot: rows of adapters that are not in it read zeros.
        if self.gain_delta is not None or any(ops.gain is not None for _, _, ops in found):
            self.gain_delta = self._grown(self.gain_delta, num_slots, width)
        has_input_gain = any(ops.input_gain is not None for _, _, ops in found)
        if self.input_gain_delta is not None or has_input_gain:
            self.input_gain_delta = self._grown(self.input_gain_delta, num_slots, *inner)
        if self.bias is not None or any(ops.bias is not None for _, _, ops in found):
            self.bias = self._grown(self.bias, num_slots, width)
        for table in (self.gain_delta, self.input_gain_delta, self.bias):
            if table is not None:
                table[:, slot] = 0
        for s, columns in enumerate(self.columns):
            own = [(layer, ops) for layer, of, ops in found if of == s]
            for layers, gain in by_layers((i, ops.gain) for i, ops in own if ops.gain is not None):
                assert self.gain_delta is not None
                self.gain_delta[layers, slot, columns] = gain - 1.0
            for layers, bias in by_layers((i, ops.bias) for i, ops in own if ops.bias is not None):
                assert self.bias is not None
                self.bias[layers, slot, columns] = bias
            of_inputs = ((i, ops.input_gain) for i, ops in own if ops.input_gain is not None)
            for layers, gain in by_layers(of_inputs):
                assert self.input_gain_delta is not None
                self.input_gain_delta[layers, slot, s] = gain - 1.0

    def _grown(self, table: torch.Tensor | None, num_slots: int, *shape: int) -> torch.Tensor:
        if table is not None and table.shape[1] >= num_slots:
            return table
        grown = torch.zeros(self._layout.num_layers, num_slots, *shape, device=self._device)
        if table is not None:
            grown[:, : table.shape[1]] = table
        return grown
