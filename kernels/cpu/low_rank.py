"""Low-rank updates, gains and biases of every row's own adapters, read where they lie.

Semantics, per row and slice ``s`` of a fused projection, over the components ``k`` of its mix::

    y ← G ⊙ y + bias + Σ_k w_k (b_k + B_k (A_k x))      G = 1 + Σ_k w_k (g_k − 1)

in fp32 with one rounding. Nothing is packed or copied: a step is a list of row segments, each with
its components, and a component is a pointer to its adapter's table of modules. The gathering is
Punica's (arXiv 2310.18547, section 4); both products run in one call, since on a CPU the call costs
more than the products of one row.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from turret.kernels.cpu.native import functions

_FIELDS = 6


class ModuleTable:
    """Where one adapter's tensors lie, by module of the base. Keeps them alive."""

    def __init__(self, num_modules: int) -> None:
        self._rows = [[0] * _FIELDS for _ in range(num_modules)]
        self._kept: list[torch.Tensor] = []
        self._table = torch.empty(0, dtype=torch.int64)
        self.max_rank = 0

    def put(
        self,
        module: int,
        *,
        a: torch.Tensor | None = None,
        b: torch.Tensor | None = None,
        gain: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        input_gain: torch.Tensor | None = None,
    ) -> None:
        """Enter a module's tensors.

        Args:
            module: Its number.
            a: ``[rank, in]`` bf16, contiguous like all of them; together with ``b`` or not at all.
            b: ``[rank, out]`` bf16.
            gain: ``[out]`` fp32.
            bias: ``[out]`` fp32.
            input_gain: ``[in]`` fp32.
        """
        tensors = (a, b, gain, bias, input_gain)
        assert (a is None) == (b is None)
        for tensor in tensors:
            if tensor is not None:
                assert tensor.is_contiguous(), module
                self._kept.append(tensor)
        rank = 0 if a is None else a.shape[0]
        pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        self._rows[module] = [*pointers, rank]
        self.max_rank = max(self.max_rank, rank)

    def close(self) -> None:
        """Make the table; nothing can be put any more."""
        self._table = torch.tensor(self._rows, dtype=torch.int64)
        self._rows = []

    @property
    def address(self) -> int:
        return self._table.data_ptr()


@dataclass(frozen=True, slots=True)
class RowSegment:
    """Rows ``[start, end)`` that share a mix: (table, weight) in the request's order."""

    start: int
    end: int
    components: Sequence[tuple[ModuleTable, float]]


class LowRankStep:
    """A step's segments, prepared once for all layers.

    Args:
        segments: The adapted rows; no row twice.
        max_slices: Most slices a fused projection has.
    """

    def __init__(self, segments: Sequence[RowSegment], max_slices: int) -> None:
        rows, components, weights = [], [], []
        size = 0
        for segment in segments:
            first = len(components)
            for table, weight in segment.components:
                components.append([table.address, size, table.max_rank, 0])
                weights.append(weight)
                size += (segment.end - segment.start) * max_slices * table.max_rank
            rows.append([segment.start, segment.end, first, len(components)])
        self._tables = [table for segment in segments for table, _ in segment.components]
        self._segments = torch.tensor(rows, dtype=torch.int64)
        self._components = torch.tensor(components, dtype=torch.int64).view(-1, 4)
        self._components.view(torch.float64)[:, 3] = torch.tensor(weights, dtype=torch.float64)
        self._scratch = torch.empty(size)
        self._step = (ctypes.c_int64 * 5)(
            self._segments.data_ptr(),
            self._components.data_ptr(),
            self._scratch.data_ptr(),
            len(rows),
            torch.get_num_threads(),
        )
        self._address = ctypes.addressof(self._step)
        self._adapt = functions().turret_adapt

    def adapt(
        self, shape: ProjectionShape, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        """Apply one fused projection's adapters to the segments' rows of ``y``, in place.

        Args:
            shape: Of the projection.
            x: ``[rows, in]`` bf16, rows may be strided.
            y: Bias-free base results, ``[rows, sum(out)]`` bf16, rows may be strided.
            bias: The base's, ``[sum(out)]`` bf16, or None.
        """
        self._adapt(
            self._address,
            shape.address,
            x.data_ptr(),
            x.stride(0),
            y.data_ptr(),
            y.stride(0),
            None if bias is None else bias.data_ptr(),
        )

    def input_gain(
        self, module: int, x: torch.Tensor, rows: torch.Tensor, segments: torch.Tensor
    ) -> torch.Tensor:
        """``x ⊙ Σ_k w_k (l_k − 1)`` for some rows.

        Args:
            module: Number of the module.
            x: ``[rows, in]`` bf16.
            rows: Row numbers, ``[n]`` int64.
            segments: Number of each row's segment, ``[n]`` int64.

        Returns:
            ``[n, in]`` bf16.
        """
        out = torch.empty(rows.shape[0], x.shape[1], dtype=x.dtype)
        functions().turret_input_gain(
            self._address,
            module,
            x.shape[1],
            x.data_ptr(),
            x.stride(0),
            rows.data_ptr(),
            segments.data_ptr(),
            rows.shape[0],
            out.data_ptr(),
        )
        return out


class ProjectionShape:
    """A fused projection of one layer: ``in``, the slices' widths, its first module's number."""

    def __init__(self, in_features: int, widths: Sequence[int], first_module: int) -> None:
        values = (in_features, len(widths), first_module, *widths)
        self._values = (ctypes.c_int64 * len(values))(*values)
        self.address = ctypes.addressof(self._values)
