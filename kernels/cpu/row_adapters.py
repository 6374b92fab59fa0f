"""Updates, gains and biases of every row's own adapters, read in place.

Semantics, per row and slice ``s`` of a fused projection, over the members ``k`` of its mix::

    y ← G ⊙ y + bias + Σ_k w_k (b_k + Δ_k(x))      G = 1 + Σ_k w_k (g_k − 1)

    Δ(x) = B (A x) + ((w1a w1b) ⊙ (w2a w2b)) x + kron(w1, w2) x + C x + S x + D x + sine ⊙ p(W x)

``C`` is block-circulant, ``S`` sparse and ``D`` dense; ``p`` exchanges pairs of outputs. All terms
are added in fp32 with one rounding. Nothing is packed: a step is a list of row segments, each with
its members, and a member is a pointer to its adapter's table of modules. Rows are gathered as in
Punica (arXiv 2310.18547, section 4). All products run in one call, because on a CPU a call takes
longer than the products of one row.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from turret.kernels.cpu import LANES, functions, isa, num_threads
from turret.kernels.expert_routing import Routing
from turret.lazy_torch import torch

# Low-rank updates of experts, read in place.
#
# Semantics, per pair ``p`` of a row and an expert ``e``, over the members ``k`` of the row's mix::
#
#     y_p ← y_p + Σ_k w_k B_ke (A_ke x_p)
#
# The sum is fp32, with one rounding. As for all other updates, nothing is packed.


class ExpertTable:
    """The addresses of one adapter's factors, by layer and projection. Keeps the factors alive.

    Args:
        updates: For each layer and projection, ``a`` ``[experts, rank, in]`` and ``b`` ``[experts,
            rank, out]``, bf16, contiguous; None if there is no update.

    Attributes:
        width: The number of floats of scratch memory per pair, for the projection that needs most.
    """

    def __init__(self, updates: Sequence[tuple[torch.Tensor, torch.Tensor] | None]) -> None:
        self._kept = updates
        # Each row is an ``ExpertUpdate`` in ``adapters.h``.
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
    """A step's rows whose adapters change experts, prepared once for all layers.

    Args:
        rows: (table, weight) in the request's order for each row, up to the last adapted row.
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
        # The fields of ``ExpertStep`` in ``adapters.h``. Each row of ``_members`` is one of its
        # ``ExpertMember`` structures.
        self._step = (ctypes.c_int64 * 6)(
            self._members.data_ptr(),
            self._first.data_ptr(),
            len(rows),
            self._scratch.data_ptr(),
            width,
            threads,
        )
        self.address = ctypes.addressof(self._step)

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
            rows: The row of ``x`` that each pair reads, ``[pairs]`` int64; None if each pair has
                its own.
        """
        # The fields of ``ExpertPairs`` in ``adapters.h``.
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
        functions().turret_adapt_experts(self.address, ctypes.addressof(pairs))


# Operators of linear modules, as the kernels read them.


class CStruct(NamedTuple):
    """An operator of a module, as a struct of ``adapters.h`` declares it.

    Attributes:
        kind: The operator's field in ``Module``.
        values: The fields of its struct in their order: contiguous tensors, None for a null
            pointer, and numbers.
        scratch: The number of floats of its activations per row.
    """

    kind: str
    values: tuple[torch.Tensor | int | None, ...]
    scratch: int = 0


def low_rank(a: torch.Tensor | None, b: torch.Tensor) -> CStruct:
    """``bᵀ (a x)`` with ``a`` ``[rank, in]`` and ``b`` ``[rank, out]``, bf16.

    If ``a`` is None, ``a x`` adds up pieces of ``rank`` inputs: ``a[r, i]`` is 1 if
    ``i mod rank = r``, and 0 otherwise.
    """
    return CStruct("low_rank", (a, b, len(b)), _padded(len(b)))


def hadamard(w1a: torch.Tensor, w1b: torch.Tensor, w2a: torch.Tensor, w2b: torch.Tensor) -> CStruct:
    """``((w1aᵀ w1b) ⊙ (w2aᵀ w2b)) x``, with factors ``[rank, out]`` and ``[rank, in]``, bf16.

    ``w1a`` and ``w2a`` are transposed because the kernel computes neighbouring outputs together.
    """
    rank = len(w1a)
    return CStruct("hadamard", (w1a, w2a, w1b, w2b, rank), _padded(_padded(rank) * rank))


def kronecker(w1: torch.Tensor, *w2: torch.Tensor) -> CStruct:
    """``kron(w1, w2) x``, all bf16.

    Args:
        w1: ``[out_l, in_m]``.
        w2: The transposed factor, ``[in_n, out_k]``; or its own factors ``a`` and ``b``, ``[rank,
            in_n]`` and ``[rank, out_k]``, as in a low-rank update.
    """
    if len(w2) == 1:
        (in_n, out_k), rank, parts = w2[0].shape, 0, (w2[0], None, None)
    else:
        (rank, in_n), out_k, parts = w2[0].shape, w2[1].shape[1], (None, *w2)
    values = (w1, *parts, *w1.shape, out_k, in_n, rank)
    return CStruct("kronecker", values, w1.shape[1] * _padded(rank or out_k))


def input_blocks(blocks: torch.Tensor) -> CStruct:
    """Blocks that change the input, ``[count, size, size]`` bf16."""
    return CStruct("input_blocks", (blocks, *blocks.shape[:2]))


def pairs(sine: torch.Tensor, group: int) -> CStruct:
    """``sine_o · (W x)_p(o)``, ``sine`` ``[out]`` fp32; ``p`` swaps the halves of each group."""
    return CStruct("pairs", (sine, group), _padded(len(sine)))


def dense(weight: torch.Tensor) -> CStruct:
    """``weight x`` for a whole update, ``[out, in]`` bf16."""
    return CStruct("dense", (weight, weight.shape[1]))


# A block-circulant update in the form that ``circulant.c`` reads: its frequencies, padded to whole
# vectors.


@functools.cache
def transforms(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The real transform of ``size`` values and its inverse, fp32.

    Returns:
        ``[2, f, size]``, real and imaginary parts of the ``f = size // 2 + 1`` frequencies, and
        ``[size, 2, f]``.
    """
    cosines, sines = _turns(torch.arange(size // 2 + 1), torch.arange(size), size)
    forward = torch.stack((cosines, -sines))
    inverse = (forward * _shares(size).unsqueeze(1)).permute(2, 0, 1)
    return forward.float(), inverse.float().contiguous()


def spectrum(kernel: torch.Tensor) -> torch.Tensor:
    """The transforms of kernels ``[…, size]``: ``[…, 2, f]`` fp32."""
    forward = transforms(kernel.shape[-1])[0].double()
    return torch.einsum("cfi,...i->...cf", forward, kernel.double()).float()


def circulant(kernel: torch.Tensor) -> CStruct:
    """A block-circulant update, ``[rows, columns, size]``; see ``operators/circulant.py``.

    The kernels read the spectra, ``[rows, columns, 2, width]`` fp32, where ``width`` is the number
    of frequencies, padded with zeros, and the matrices of the transforms (``_matrices``).
    """
    rows, columns, size = kernel.shape
    found, matrices = spectrum(kernel), _matrices(size)
    spectra = _wide(found, found.shape[3])
    width, parts = spectra.shape[3], len(matrices[1])
    values = (spectra, *matrices, rows, columns, size, width, parts)
    return CStruct("circulant", values, (columns + 1) * 2 * width + _padded(rows * size))


def transform_products(size: int) -> int:
    """The number of products in a transform of a block of this size, or in its inverse."""
    if size % LANES:
        return size * (size + 2)
    return size * 2 * LANES + size // LANES * 2 * (size + 2)


def _wide(tensor: torch.Tensor, size: int) -> torch.Tensor:
    return torch.nn.functional.pad(tensor, (0, _padded(size) - size)).contiguous()


@functools.cache
def _matrices(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The matrices by which blocks of a size are transformed, fp32.

    Returns:
        ``forward``, ``[16, 2, 16]``, and ``inverse``, ``[2, 16, 16]``, transform a part of a block;
        ``turns`` and ``back``, ``[parts, 2, width]``, join the parts. A block whose size is not a
        multiple of 16 is transformed as a whole: there are no parts, ``forward`` is ``[size, 2,
        width]`` and ``inverse`` ``[2, width, padded size]``.
    """
    if size % LANES:
        forward, inverse = _padded_transforms(size)
        none = torch.empty(0, 2, forward.shape[2])
        return forward, none, none, inverse
    parts, count = size // LANES, size // 2 + 1
    cosines, sines = _turns(torch.arange(LANES), torch.arange(LANES), LANES)
    forward, inverse = torch.stack((cosines, -sines), 1), torch.stack((cosines, -sines))
    cosines, sines = _turns(torch.arange(parts), torch.arange(count), size)
    turns = torch.stack((cosines, -sines), 1)
    back = torch.stack((cosines, sines), 1) * _shares(size)
    whole = (forward.float().contiguous(), inverse.float().contiguous())
    return whole[0], _wide(turns.float(), count), _wide(back.float(), count), whole[1]


def _shares(size: int) -> torch.Tensor:
    """The weight of each frequency in the inverse of a real transform, fp64."""
    shares = torch.full((size // 2 + 1,), 2.0 / size, dtype=torch.float64)
    shares[0] = 1.0 / size
    if size % 2 == 0:
        shares[-1] = 1.0 / size
    return shares


def _turns(rows: torch.Tensor, columns: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
    """Cosines and sines of ``2π r c / size``, ``[rows, columns]`` fp64."""
    # Reduce the product modulo the size first: sines of large angles are not exact.
    angles = torch.outer(rows, columns).remainder(size).double() * (2 * math.pi / size)
    return angles.cos(), angles.sin()


def _padded_transforms(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrices of ``transforms``, padded: ``[size, 2, width]``, ``[2, width, padded size]``."""
    forward, inverse = transforms(size)
    count = forward.shape[1]
    made = _wide(forward.permute(2, 0, 1), count)
    back = _wide(inverse.permute(1, 2, 0), size)  # [2, f, padded size]
    return made, torch.nn.functional.pad(back, (0, 0, 0, _padded(count) - count)).contiguous()


def _padded(size: int) -> int:
    return -(-size // LANES) * LANES


# The entries of a sparse update in the order that ``sparse.c`` reads: by 16 outputs and 64 inputs.


_BLOCK = 64  # The same as BLOCK in sparse.c.
_BEHIND = 64  # elements that the kernel reads past the last entry


def sparse(values: torch.Tensor, columns: torch.Tensor, row_starts: torch.Tensor) -> CStruct:
    """``S x``, where ``S`` has only a few entries.

    The kernel adds entries in steps. A step has 32 slots, two for each of 16 outputs, for entries
    whose inputs are in the same block of 64.

    Args:
        values: ``[entries]`` bf16, in the order of compressed rows (CSR), on the CPU.
        columns: ``[entries]`` uint16.
        row_starts: ``[out + 1]`` int32.

    Returns:
        The operator, with these tensors:

        - values, ``[entries + 64]`` bf16: the entries in the slots, step by step;
        - places, ``[entries + 64]`` uint8: the position of an entry's input in its block;
        - masks, ``[steps]`` int32: bit ``s`` is set where slot ``s``, of output ``s % 16``, has an
          entry;
        - skips, ``[steps]`` uint16: the number of blocks since the previous step, or since block 0;
        - starts, ``[groups + 1, 2]`` int32: steps and entries before each 16 outputs;
        - outputs, ``[out]`` uint8: the outputs in the order of the lanes, counted from the first
          column of their unit of work.
    """
    made = _filled(values, columns, row_starts)
    if made is None:
        order = _by_block(columns, row_starts)
        made = _filled(values[order], _taken(columns, order), row_starts)
    assert made is not None
    return CStruct("sparse", (*made, len(values) // (len(row_starts) - 1)))


def blocks_bytes(columns: torch.Tensor, row_starts: torch.Tensor) -> int:
    """Number of bytes of the tensors that ``sparse`` makes."""
    out = len(row_starts) - 1
    steps = _steps(columns, row_starts)
    if steps < 0:
        steps = _steps(_taken(columns, _by_block(columns, row_starts)), row_starts)
    return 3 * (len(columns) + _BEHIND) + 6 * steps + out + 8 * (-(-out // LANES) + 1)


def _filled(
    values: torch.Tensor, columns: torch.Tensor, row_starts: torch.Tensor
) -> tuple[torch.Tensor, ...] | None:
    """Fill the arrays; None if the inputs of some output are not in the order of blocks."""
    entries, out = len(values), len(row_starts) - 1
    # There are at most as many steps as entries; pages that are never written take no memory.
    filled = (
        torch.zeros(entries + _BEHIND, dtype=values.dtype),
        torch.zeros(entries + _BEHIND, dtype=torch.uint8),
        torch.empty(entries, dtype=torch.int32),
        torch.empty(entries, dtype=torch.uint16),
        torch.empty(-(-out // LANES) + 1, 2, dtype=torch.int32),
        torch.empty(out, dtype=torch.uint8),
    )
    steps = functions().turret_sparse_fill(
        values.data_ptr(),
        columns.data_ptr(),
        row_starts.data_ptr(),
        out,
        *(part.data_ptr() for part in filled),
    )
    if steps < 0:
        return None
    kept, places, masks, skips, *others = filled
    return kept, places, masks[:steps].clone(), skips[:steps].clone(), *others


def _taken(columns: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    # torch cannot index uint16 tensors.
    return columns.to(torch.int32)[order].to(torch.uint16)


def _steps(columns: torch.Tensor, row_starts: torch.Tensor) -> int:
    """Count the steps; negative if the inputs of some output are not in the order of blocks."""
    found: int = functions().turret_sparse_steps(
        columns.data_ptr(), row_starts.data_ptr(), len(row_starts) - 1
    )
    return found


def _by_block(columns: torch.Tensor, row_starts: torch.Tensor) -> torch.Tensor:
    """The stable order of the entries by row and block, ``[entries]`` int64."""
    rows = torch.repeat_interleave(row_starts.to(torch.int64).diff())
    most = 1 << 10  # blocks
    return torch.argsort(rows * most + columns.to(torch.int64) // _BLOCK, stable=True)


# The share of a thread's cache for factors that are read ahead. The base's weights also pass
# through this cache.
_AHEAD_BYTES = 3 << 19
# A step reads at least this many modules ahead, whatever their size: from a layer's last projection
# to q, k and v of the next layer. Factors that arrive too early are still in the shared cache, and
# memory would otherwise be idle.
_LEAST_REACH = 4


# The fields of a module's entry (``Module`` in ``adapters.h``). The entry contains the operators of
# ``_DIRECT`` themselves and, from field ``_FIRST`` on, pointers to those of ``_POINTERS``.
_DIRECT = {"low_rank": (0, 1, 5), "gain": (2,), "bias": (3,), "input_gain": (4,)}
_POINTERS = ("hadamard", "kronecker", "input_blocks", "pairs", "circulant", "sparse", "dense")
_FIRST = 6


class ModuleTable:
    """The addresses of one adapter's tensors, by module of the base. Keeps the tensors alive.

    Attributes:
        width: The number of floats of scratch memory per row, for the module that needs most.
        num_low_rank_bytes: The size of all factors of low-rank updates.
        address: The address of the table; 0 until it is closed.
    """

    def __init__(self, num_modules: int) -> None:
        self._rows = [[0] * (_FIRST + len(_POINTERS)) for _ in range(num_modules)]
        self._kept: list[torch.Tensor] = []
        # The operators to which the last fields point: (module, kind, values).
        self._factors: list[tuple[int, str, list[int]]] = []
        self._table = self._factor_table = torch.empty(0, dtype=torch.int64)
        self.width = 0
        self.num_low_rank_bytes = 0
        self.address = 0

    def put(self, module: int, *entries: CStruct) -> None:
        """Enter the operators of the module with this number."""
        for kind, values, _ in entries:
            numbers = [
                value if isinstance(value, int) else self._address(value) for value in values
            ]
            if kind in _DIRECT:
                for place, number in zip(_DIRECT[kind], numbers, strict=True):
                    self._rows[module][place] = number
            else:
                self._factors.append((module, kind, numbers))
            if kind == "low_rank":
                factors = (value for value in values if isinstance(value, torch.Tensor))
                self.num_low_rank_bytes += sum(factor.nbytes for factor in factors)
        self.width = max(self.width, sum(entry.scratch for entry in entries))

    def close(self) -> None:
        """Build the table from the modules entered so far; no more can be added afterwards."""
        values = [value for _, _, values in self._factors for value in values]
        self._factor_table = torch.tensor(values, dtype=torch.int64)
        address = self._factor_table.data_ptr()
        for module, kind, values in self._factors:
            self._rows[module][_FIRST + _POINTERS.index(kind)] = address
            address += 8 * len(values)
        self._table = torch.tensor(self._rows, dtype=torch.int64)
        self._rows, self._factors = [], []
        self.address = self._table.data_ptr()

    def _address(self, tensor: torch.Tensor | None) -> int:
        """The address of a tensor, which is kept alive; 0 for None."""
        if tensor is None:
            return 0
        assert tensor.is_contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()


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
        num_layers: The number of layers, which are all alike.
    """

    def __init__(self, layer: Sequence[tuple[int, int]], num_layers: int) -> None:
        self._sizes = torch.tensor(layer, dtype=torch.int64)
        self.address = self._sizes.data_ptr()
        self.per_layer, self.num_layers = len(layer), num_layers

    def reach(self, num_bytes: int, num_threads: int) -> int:
        """The number of modules to read ahead, for factors of ``num_bytes`` over all modules."""
        modules = self.per_layer * self.num_layers
        in_cache = num_threads * _AHEAD_BYTES * modules // max(num_bytes, 1)
        return min(max(in_cache, _LEAST_REACH), self.per_layer)


class Ahead(NamedTuple):
    """The adapters of a projection, which the base's product prefetches while it runs.

    Attributes:
        step: The address of the step's adapters.
        module: The number of the projection's first module.
    """

    step: int
    module: int


class RowAdapters:
    """A step's segments, prepared once for all layers.

    Args:
        segments: The adapted rows, each at most once.
        max_slices: The maximum number of slices of a fused projection.
        sizes: Sizes of the base's modules.

    Attributes:
        num_threads: The number of threads of the kernel.
    """

    def __init__(self, segments: Sequence[RowSegment], max_slices: int, sizes: ModuleSizes) -> None:
        rows, members, weights = [], [], []
        size = 0
        self._tables = set[ModuleTable]()
        for segment in segments:
            first = len(members)
            for table, weight in segment.members:
                self._tables.add(table)
                members.append([table.address, size, table.width, 0])
                weights.append(weight)
                size += (segment.end - segment.start) * max_slices * table.width
            rows.append([segment.start, segment.end, first, len(members)])
        # The structs of ``adapters.h``: each row of ``_segments`` is a ``Segment``, of ``_members``
        # a ``Component``, and of ``_marks`` a ``Mark``; ``_step`` is the ``Step``.
        self._segments = torch.tensor(rows, dtype=torch.int64)
        self._members = torch.tensor(members, dtype=torch.int64).view(-1, 4)
        self._members.view(torch.float64)[:, 3] = torch.tensor(weights, dtype=torch.float64)
        self._scratch = torch.empty(size)
        self.num_threads = threads = num_threads()
        self._marks = torch.zeros(threads, 7, dtype=torch.int64)
        self._sizes = sizes
        num_bytes = sum(t.num_low_rank_bytes for t in self._tables)
        # The base's products leave memory idle, unless they are computed on AMX's tiles. Read ahead
        # only while memory is idle.
        reach = sizes.reach(num_bytes, threads) if isa() != "amx" else 0
        self._step = (ctypes.c_int64 * 10)(
            self._segments.data_ptr(),
            self._members.data_ptr(),
            self._scratch.data_ptr(),
            len(rows),
            threads,
            sizes.address,
            sizes.per_layer,
            sizes.per_layer * sizes.num_layers,
            reach,
            self._marks.data_ptr(),
        )
        self.address = ctypes.addressof(self._step)
        self._adapt = functions().turret_adapt

    def restart(self) -> None:
        """Reuse this object for another step with the same rows."""
        self._marks.zero_()

    def ahead(self, module: int) -> Ahead:
        """The adapters to read ahead during a projection's product, by its first module."""
        return Ahead(self.address, module)

    def adapt(
        self, shape: ProjectionShape, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        """Apply one fused projection's adapters to the segments' rows of ``y``, in place.

        Args:
            shape: Shape of the projection.
            x: ``[rows, in]`` bf16, rows may be strided.
            y: Bias-free base results, ``[rows, sum(out)]`` bf16, rows may be strided.
            bias: The base's bias, ``[sum(out)]`` bf16, or None.
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
            rows: Row numbers, ``[n]`` int64, possibly repeated.
            members: The range of the members that are summed for each row, ``[n, 2]`` int64, where
                the members of all segments are numbered in order.
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
    """A fused projection of one layer: its inputs, its slices' widths, its first module."""

    def __init__(self, in_features: int, widths: Sequence[int], first_module: int) -> None:
        values = (in_features, len(widths), first_module, *widths)
        self._values = (ctypes.c_int64 * len(values))(*values)
        self.address = ctypes.addressof(self._values)
