"""Updates, gains and biases of every row's own adapters, read where they lie.

Semantics, per row and slice ``s`` of a fused projection, over the members ``k`` of its mix::

    y ← G ⊙ y + bias + Σ_k w_k (b_k + Δ_k(x))      G = 1 + Σ_k w_k (g_k − 1)

    Δ(x) = B (A x) + ((w1a w1b) ⊙ (w2a w2b)) x + kron(w1, w2) x + S x + D x

in fp32 with one rounding. Nothing is packed: a step is a list of row segments, each with its
members, and a member is a pointer to its adapter's table of modules. The gathering is that of
Punica (arXiv 2310.18547, section 4); all products run in one call, since on a CPU the call costs
more than the products of one row.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from turret.kernels.cpu.circulant import CirculantFactors
from turret.kernels.cpu.native import LANES, functions, isa, num_threads
from turret.kernels.cpu.sparse import SparseBlocks

# Share of a thread's cache for factors that are read ahead. The base's weights pass through it too.
_AHEAD_BYTES = 3 << 19
# A step reads at least this many modules ahead, whatever their size: from a layer's last projection
# to q, k and v of the next layer. What arrives too early is still in the shared cache, and memory
# would otherwise be idle.
_LEAST_REACH = 4


@dataclass(frozen=True, slots=True)
class HadamardFactors:
    """``((w1a w1b) ⊙ (w2a w2b)) x``.

    Attributes:
        w1a: ``[rank, out]`` bf16, contiguous like all of them (transposed: columns are computed
            side by side).
        w1b: ``[rank, in]`` bf16.
        w2a: ``[rank, out]`` bf16.
        w2b: ``[rank, in]`` bf16.
    """

    w1a: torch.Tensor
    w1b: torch.Tensor
    w2a: torch.Tensor
    w2b: torch.Tensor

    @property
    def scratch(self) -> int:
        """Number of floats that its activations take: ``[padded rank, rank]``."""
        rank = self.w1a.shape[0]
        return _padded(_padded(rank) * rank)


@dataclass(frozen=True, slots=True)
class KroneckerFactors:
    """``kron(w1, w2) x``.

    Attributes:
        w1: ``[out_l, in_m]`` bf16, contiguous like all of them.
        w2: Transposed, ``[in_n, out_k]`` bf16; or its factors ``a`` and ``b`` as a low-rank
            update has them, ``[rank, in_n]`` and ``[rank, out_k]``.
    """

    w1: torch.Tensor
    w2: torch.Tensor | tuple[torch.Tensor, torch.Tensor]

    @property
    def scratch(self) -> int:
        """Number of floats that its activations take: ``[in_m, padded width]``."""
        width = self.w2.shape[1] if isinstance(self.w2, torch.Tensor) else self.w2[0].shape[0]
        return self.w1.shape[1] * _padded(width)


# Fields of a module's entry behind its five tensors and rank; each points to an operator's factors.
_FIELDS = ("hadamard", "kronecker", "input_blocks", "pairs", "circulant", "sparse", "dense")
_FIRST = 6


class ModuleTable:
    """The addresses of one adapter's tensors, by module of the base. Keeps the tensors alive.

    Attributes:
        width: Floats of scratch memory that a row takes, of the module that takes most.
        num_low_rank_bytes: Bytes of all ``a`` and ``b``.
    """

    def __init__(self, num_modules: int) -> None:
        self._rows = [[0] * (_FIRST + len(_FIELDS)) for _ in range(num_modules)]
        self._kept: list[torch.Tensor] = []
        # The operators that the last fields point to: (module, field, values).
        self._factors: list[tuple[int, str, list[int]]] = []
        self._table = self._factor_table = torch.empty(0, dtype=torch.int64)
        self.width = 0
        self.num_low_rank_bytes = 0

    def put(
        self,
        module: int,
        *,
        a: torch.Tensor | None = None,
        b: torch.Tensor | None = None,
        gain: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        input_gain: torch.Tensor | None = None,
        hadamard: HadamardFactors | None = None,
        kronecker: KroneckerFactors | None = None,
        input_blocks: torch.Tensor | None = None,
        pairs: tuple[torch.Tensor, int] | None = None,
        circulant: CirculantFactors | None = None,
        sparse: SparseBlocks | None = None,
        dense: torch.Tensor | None = None,
    ) -> None:
        """Enter a module's tensors.

        Args:
            module: Its number.
            a: ``[rank, in]`` bf16, contiguous like all of them. None beside ``b``: the sums of the
                pieces of ``rank`` inputs, ``A[r, i] = 1`` where ``i mod rank = r``.
            b: ``[rank, out]`` bf16.
            gain: ``[out]`` fp32.
            bias: ``[out]`` fp32.
            input_gain: ``[in]`` fp32.
            hadamard: The Hadamard update.
            kronecker: The Kronecker update.
            input_blocks: ``[count, size, size]`` bf16.
            pairs: What partners are multiplied by, ``[out]`` fp32, and the outputs of a group.
            circulant: The block-circulant update.
            sparse: Entries of the weight.
            dense: ``[out, in]`` bf16.
        """
        assert a is None or b is not None
        rank = 0 if b is None else b.shape[0]
        pointers = [self._address_of(tensor) for tensor in (a, b, gain, bias, input_gain)]
        self._rows[module][:_FIRST] = [*pointers, rank]
        self.num_low_rank_bytes += sum(t.nbytes for t in (a, b) if t is not None)
        width = _padded(rank)
        if hadamard is not None:
            factors = (hadamard.w1a, hadamard.w2a, hadamard.w1b, hadamard.w2b)
            values = [*map(self._address_of, factors), hadamard.w1a.shape[0]]
            self._factors.append((module, "hadamard", values))
            width += hadamard.scratch
        if kronecker is not None:
            self._factors.append((module, "kronecker", self._kronecker(kronecker)))
            width += kronecker.scratch
        if input_blocks is not None:
            values = [self._address_of(input_blocks), *input_blocks.shape[:2]]
            self._factors.append((module, "input_blocks", values))
        if pairs is not None:
            self._factors.append((module, "pairs", [self._address_of(pairs[0]), pairs[1]]))
            width += _padded(len(pairs[0]))
        if circulant is not None:
            matrices = (circulant.forward, circulant.turns, circulant.back, circulant.inverse)
            addresses = map(self._address_of, (circulant.spectra, *matrices))
            values = [*addresses, *circulant.sizes, circulant.parts]
            self._factors.append((module, "circulant", values))
            width += circulant.scratch
        if sparse is not None:
            values = [*map(self._address_of, sparse.parts), sparse.mean]
            self._factors.append((module, "sparse", values))
        if dense is not None:
            self._factors.append((module, "dense", [self._address_of(dense), dense.shape[1]]))
        self.width = max(self.width, width)

    def close(self) -> None:
        """Make the table from the modules entered so far; none can be added afterwards."""
        values = [value for _, _, values in self._factors for value in values]
        self._factor_table = torch.tensor(values, dtype=torch.int64)
        address = self._factor_table.data_ptr()
        for module, field, values in self._factors:
            self._rows[module][_FIRST + _FIELDS.index(field)] = address
            address += 8 * len(values)
        self._table = torch.tensor(self._rows, dtype=torch.int64)
        self._rows, self._factors = [], []

    @property
    def address(self) -> int:
        return self._table.data_ptr()

    def _kronecker(self, factors: KroneckerFactors) -> list[int]:
        w1, w2 = factors.w1, factors.w2
        if isinstance(w2, torch.Tensor):
            (in_n, out_k), rank, parts = w2.shape, 0, (w2, None, None)
        else:
            (rank, in_n), out_k, parts = w2[0].shape, w2[1].shape[1], (None, *w2)
        return [*map(self._address_of, (w1, *parts)), *w1.shape, out_k, in_n, rank]

    def _address_of(self, tensor: torch.Tensor | None) -> int:
        """The address of a tensor, which is kept alive; 0 for None."""
        if tensor is None:
            return 0
        assert tensor.is_contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()


def _asks_ahead() -> bool:
    """Whether the base's products leave memory idle; AMX's tiles wait for memory themselves."""
    return isa() != "amx"


def _padded(size: int) -> int:
    return -(-size // LANES) * LANES


@dataclass(frozen=True, slots=True)
class RowSegment:
    """Rows ``[start, end)`` that share a mix: (table, weight) in the request's order."""

    start: int
    end: int
    members: Sequence[tuple[ModuleTable, float]]


class ModuleSizes:
    """The modules of the base, in the order of their numbers.

    Args:
        layer: (inputs, outputs) of each module of a layer.
        num_layers: Layers, all alike.
    """

    def __init__(self, layer: Sequence[tuple[int, int]], num_layers: int) -> None:
        self._sizes = torch.tensor(layer, dtype=torch.int64)
        self.address = self._sizes.data_ptr()
        self.per_layer, self.num_layers = len(layer), num_layers

    def reach(self, num_bytes: int, num_threads: int) -> int:
        """How many modules ahead a step reads factors that take ``num_bytes`` over all modules."""
        modules = self.per_layer * self.num_layers
        in_cache = num_threads * _AHEAD_BYTES * modules // max(num_bytes, 1)
        return min(max(in_cache, _LEAST_REACH), self.per_layer)


class Ahead(NamedTuple):
    """What a product of the base may prefetch while it runs: the adapters that follow it.

    Attributes:
        step: Address of the step's adapters.
        module: Number of the projection's first module.
    """

    step: int
    module: int


class RowAdapters:
    """A step's segments, prepared once for all layers.

    Args:
        segments: The adapted rows; no row twice.
        max_slices: Most slices a fused projection has.
        sizes: Sizes of the base's modules.

    Attributes:
        num_threads: That compute it.
    """

    def __init__(self, segments: Sequence[RowSegment], max_slices: int, sizes: ModuleSizes) -> None:
        rows, members, weights = [], [], []
        size = 0
        for segment in segments:
            first = len(members)
            for table, weight in segment.members:
                members.append([table.address, size, table.width, 0])
                weights.append(weight)
                size += (segment.end - segment.start) * max_slices * table.width
            rows.append([segment.start, segment.end, first, len(members)])
        self._tables = {table for segment in segments for table, _ in segment.members}
        self._segments = torch.tensor(rows, dtype=torch.int64)
        self._members = torch.tensor(members, dtype=torch.int64).view(-1, 4)
        self._members.view(torch.float64)[:, 3] = torch.tensor(weights, dtype=torch.float64)
        self._scratch = torch.empty(size)
        self.num_threads = threads = num_threads()
        self._marks = torch.zeros(threads, 7, dtype=torch.int64)
        self._sizes = sizes
        num_bytes = sum(t.num_low_rank_bytes for t in self._tables)
        self._step = (ctypes.c_int64 * 10)(
            self._segments.data_ptr(),
            self._members.data_ptr(),
            self._scratch.data_ptr(),
            len(rows),
            threads,
            sizes.address,
            sizes.per_layer,
            sizes.per_layer * sizes.num_layers,
            sizes.reach(num_bytes, threads) if _asks_ahead() else 0,
            self._marks.data_ptr(),
        )
        self.address = ctypes.addressof(self._step)
        self._adapt = functions().turret_adapt

    def restart(self) -> None:
        """Reuse this for another step with the same rows."""
        self._marks.zero_()

    def ahead(self, module: int) -> Ahead:
        """What to read ahead during the base's product of the projection with this first module."""
        return Ahead(self.address, module)

    def adapt(
        self, shape: ProjectionShape, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        """Apply one fused projection's adapters to the segments' rows of ``y``, in place.

        Args:
            shape: Shape of the projection.
            x: ``[rows, in]`` bf16, rows may be strided.
            y: Bias-free base results, ``[rows, sum(out)]`` bf16, rows may be strided.
            bias: The base's, ``[sum(out)]`` bf16, or None.
        """
        self._adapt(
            self.address,
            shape.address,
            x.data_ptr(),
            x.stride(0),
            y.data_ptr(),
            y.stride(0),
            None if bias is None else bias.data_ptr(),
        )

    def input_change(
        self,
        module: int,
        x: torch.Tensor,
        rows: torch.Tensor,
        members: torch.Tensor,
        *,
        start: float,
    ) -> torch.Tensor:
        """``start · x + Σ_k w_k ((l_k − 1) ⊙ x + D_k x)`` for some rows.

        Args:
            module: Number of the module.
            x: ``[rows, in]`` bf16.
            rows: Row numbers, ``[n]`` int64; a row may be there more than once.
            members: First and last number of the members that are summed for each, ``[n, 2]``
                int64: those of a segment follow one another, in the order of all segments.
            start: 1 for the changed input, 0 for the change alone.

        Returns:
            ``[n, in]`` bf16.
        """
        out = torch.empty(rows.shape[0], x.shape[1], dtype=x.dtype)
        functions().turret_input_change(
            self.address,
            module,
            x.shape[1],
            x.data_ptr(),
            x.stride(0),
            rows.data_ptr(),
            members.data_ptr(),
            rows.shape[0],
            start,
            out.data_ptr(),
        )
        return out


class ProjectionShape:
    """A fused projection of one layer: ``in``, the slices' widths, its first module's number."""

    def __init__(self, in_features: int, widths: Sequence[int], first_module: int) -> None:
        values = (in_features, len(widths), first_module, *widths)
        self._values = (ctypes.c_int64 * len(values))(*values)
        self.address = ctypes.addressof(self._values)
