"""``y = x Wᵀ``; a row's bits do not depend on the number of rows that are computed together.

A request's tokens must not depend on the other requests of its batch, and a library does not
guarantee bits. On a CPU with compiled kernels, these fix the order of every sum
(``cpu/c/products.c``, ``cpu/c/dense_product.c``). Otherwise a library product is used in calls that
were tried on this machine (``trial.py``), or else a product of elementwise operations
(``ordered_product``).
"""

from __future__ import annotations

from collections.abc import Sequence

from turret.kernels.cpu.native import has_kernels
from turret.kernels.cpu.products import (
    add_column_products_,
    column_products,
    dense_product,
    dot_products,
    serves_dense,
)
from turret.kernels.rows.trial import (
    LARGEST,
    SAMPLE_ROWS,
    Formulation,
    Sizes,
    cancelling,
    choose,
    keeps_rows,
    most_sizes,
    size_formulations,
)
from turret.lazy_torch import torch

# Products made of torch's elementwise operations alone, so this file sets the order of every sum.
#
# Elementwise products and sums are rounded correctly on any machine, but they are slow.

# Size of the fp32 temporary of one piece of rows, in elements: 4 MiB stay in the cache.
_PIECE_ELEMENTS = 1 << 20


def ordered_product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """``x wᵀ``, in which neighbouring terms are added until one is left.

    Args:
        x: ``[rows, inner]``.
        w: ``[columns, inner]``. Zeros appended to the inner dimension of both change no bit.

    Returns:
        ``[rows, columns]`` fp32.
    """
    inner = x.shape[1]
    if inner == 0:
        return x.new_zeros(x.shape[0], w.shape[0], dtype=torch.float32)
    more = (1 << (inner - 1).bit_length()) - inner
    x, w = (
        torch.nn.functional.pad(x.float(), (0, more)),
        torch.nn.functional.pad(w.float(), (0, more)),
    )
    out = torch.empty(x.shape[0], w.shape[0])
    columns = max(1, _PIECE_ELEMENTS // w.shape[1])
    rows = max(1, _PIECE_ELEMENTS // (w.shape[1] * min(columns, max(w.shape[0], 1))))
    for r in range(0, x.shape[0], rows):
        for c in range(0, w.shape[0], columns):
            terms = x[r : r + rows].unsqueeze(1) * w[c : c + columns]
            while terms.shape[2] > 1:
                terms = terms[..., ::2] + terms[..., 1::2]
            out[r : r + rows, c : c + columns] = terms[..., 0]
    return out


def ordered_columns(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """``x w``, term by term; zeros anywhere in the inner dimension change no bit.

    Args:
        x: ``[rows, inner]``.
        w: ``[inner, columns]``.

    Returns:
        ``[rows, columns]`` fp32.
    """
    x, w = x.float(), w.float()
    out = x.new_zeros(x.shape[0], w.shape[1])
    for k in range(w.shape[0]):
        out += x[:, k : k + 1] * w[k]
    return out


# Columns of one library product, for weights whose shape changes from step to step.
_COLUMNS = 64
# Rows of one library product on other devices, where the algorithm is chosen by the shape.
PIECE_ROWS = 64
# Trials of a weight with more elements than this use fewer rows and smaller calls, to save time.
_LARGE_WEIGHT, _LARGE_WEIGHT_ROWS, _LARGE_WEIGHT_SAMPLE = 1 << 22, 64, 8
# Length of every library product in ``row_addmm_``, and so its longest reduction. Libraries cut
# longer reductions into blocks, and zeros would change which terms share a block.
MAX_REDUCTION = 128


def row_linear(x: torch.Tensor, weight: torch.Tensor, *, probe: bool = True) -> torch.Tensor:
    """Multiply rows by a dense weight, each row bit-identical in any batch.

    Args:
        x: ``[num_rows, in_features]``, dtype of ``weight``.
        weight: ``[out_features, in_features]``, contiguous.
        probe: Whether a library product is tried for just this shape, once. Pass False if the shape
            changes from step to step; then a column's bits do not depend on the other columns
            either.

    Returns:
        ``[num_rows, out_features]``, dtype of ``x``. On devices other than the CPU by library
        products of one shape, whose sums ``server/models/weights/nf4_gpu.py`` keeps whole.
    """
    if x.device.type != "cpu":
        return linear_in_pieces(x, weight)
    if serves_dense(weight):
        return dense_product(x, weight)
    if has_kernels(x.device):
        return dot_products(x.float().unsqueeze(0), weight.unsqueeze(0))[0].to(x.dtype)
    if probe:
        return _prepare(weight).call(x, weight)
    out = [
        _prepare_tile(weight.dtype, weight.shape[1]).call(x, tile)
        for tile in torch.nn.functional.pad(weight, (0, 0, 0, -weight.shape[0] % _COLUMNS)).split(
            _COLUMNS
        )
    ]
    return torch.cat(out, dim=1)[:, : weight.shape[0]] if out else x.new_empty(x.shape[0], 0)


def linear_in_pieces(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x weightᵀ`` in library products of one shape, the last one filled up with zeros.

    Args:
        x: ``[num_rows, in_features]``, dtype of ``weight``.
        weight: ``[out_features, in_features]``.

    Returns:
        ``[num_rows, out_features]``.
    """
    num_rows = x.shape[0]
    padded = torch.nn.functional.pad(x, (0, 0, 0, -num_rows % PIECE_ROWS))
    pieces = [torch.nn.functional.linear(piece, weight) for piece in padded.split(PIECE_ROWS)]
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces))[:num_rows]


def _addmm_in_pieces(y: torch.Tensor, v: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``y + v b`` computed like ``linear_in_pieces``, with one rounding."""
    missing = -v.shape[0] % PIECE_ROWS
    rows, factors = (
        torch.nn.functional.pad(t, (0, 0, 0, missing)).split(PIECE_ROWS) for t in (y, v)
    )
    pieces = [torch.addmm(r, f, b) for r, f in zip(rows, factors, strict=True)]
    return torch.cat(pieces)[: v.shape[0]]


def row_addmm_(y: torch.Tensor, v: torch.Tensor, b: torch.Tensor) -> None:
    """``y += v b`` in place, each row bit-identical in any batch and at any place among zeros.

    Because of the second property, adapters can share one product: a row of ``v`` that is zero
    outside of the ranks ``[lo, hi)`` adds the same bits as ``v[:, lo:hi] b[lo:hi]``, for ``lo`` a
    multiple of 8.

    Args:
        y: ``[num_rows, out_features]``, rounded once; rows may be strided (a slice of a fused
            projection).
        v: ``[num_rows, rank]``, any float dtype, rank at most ``MAX_REDUCTION``.
        b: ``[rank, out_features]``, any float dtype.
    """
    rank = v.shape[1]
    assert rank <= MAX_REDUCTION, rank
    if v.device.type != "cpu":
        y.copy_(_addmm_in_pieces(y, v.to(y.dtype), b.to(y.dtype)))
    elif has_kernels(v.device):
        total = y if y.dtype == torch.float32 and y.stride(1) == 1 else y.float()
        add_column_products_(total, v.float(), b)
        if total is not y:
            y.copy_(total)
    else:
        more = MAX_REDUCTION - rank
        update = _prepare_update(v.dtype, b.shape[1])
        y.copy_(
            y.float()
            + update.call(
                torch.nn.functional.pad(v, (0, more)), torch.nn.functional.pad(b, (0, 0, 0, more))
            )
        )


def prepare_linear(weight: torch.Tensor) -> None:
    """Prepare a weight for ``row_linear``, so that trials run now and not during a request.

    It takes some milliseconds for a weight of a layer, once per shape, and no time if compiled
    kernels are used.
    """
    if weight.device.type == "cpu" and not has_kernels(weight.device):
        _prepare(weight)


def linear_formulation(weight: torch.Tensor) -> str:
    """A description of the product of rows and a weight on the CPU."""
    return "native" if has_kernels(weight.device) else f"torch {_prepare(weight).name}"


def _prepare(weight: torch.Tensor) -> Formulation:
    """Choose how to multiply by a weight of this shape without compiled kernels."""
    (out_features, in_features), dtype = weight.shape, weight.dtype

    largest, sample = LARGEST, SAMPLE_ROWS
    if out_features * in_features > _LARGE_WEIGHT:
        largest, sample = _LARGE_WEIGHT_ROWS, _LARGE_WEIGHT_SAMPLE

    def holds(formulation: Formulation) -> bool:
        x, weight = cancelling(sample, out_features, in_features, dtype)
        return keeps_rows(lambda x: formulation.call(x, weight), x, most_sizes(largest))

    key = dtype, out_features, in_features
    return choose("linear", key, lambda: _linears(largest), holds)


def _linears(largest: int = LARGEST) -> list[Formulation]:
    """Candidate functions of ``(x, weight)``."""

    def of(sizes: Formulation) -> Formulation:
        return Formulation(
            sizes.name,
            lambda x, weight: sizes.call(lambda rows: torch.nn.functional.linear(rows, weight), x),
        )

    def ordered(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return ordered_product(x, weight).to(x.dtype)

    return [*map(of, size_formulations(largest)), Formulation("ordered sums", ordered)]


def _prepare_tile(dtype: torch.dtype, in_features: int) -> Formulation:
    """Choose how to multiply by ``_COLUMNS`` columns whose order must not matter."""

    def holds(formulation: Formulation) -> bool:
        x, weight = cancelling(SAMPLE_ROWS, _COLUMNS, in_features, dtype)
        if not keeps_rows(lambda x: formulation.call(x, weight), x, most_sizes()):
            return False
        for rows in most_sizes():
            if rows > SAMPLE_ROWS:
                break
            expected = formulation.call(x[:rows], weight)
            for shift in (1, 2, 3, 8, 13, 16, 31, 32, 48):
                moved = formulation.call(x[:rows], weight.roll(shift, 0))
                if not torch.equal(moved, expected.roll(shift, 1)):
                    return False
            some = weight.clone()
            some[5:] = 0
            if not torch.equal(formulation.call(x[:rows], some)[:, :5], expected[:, :5]):
                return False
        return True

    return choose("columns", (dtype, in_features), _linears, holds)


def _prepare_update(dtype: torch.dtype, out_features: int) -> Formulation:
    """Choose how to multiply ``[rows, MAX_REDUCTION] [MAX_REDUCTION, out_features]`` to fp32."""

    def of(sizes: Formulation) -> Formulation:
        def call(v: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            wide = b.float()
            return sizes.call(lambda rows: torch.mm(rows.float(), wide), v)

        return Formulation(sizes.name, call)

    def formulations() -> list[Formulation]:
        return [*map(of, size_formulations()), Formulation("ordered sums", ordered_columns)]

    def holds(formulation: Formulation) -> bool:
        return _keeps_zeros(formulation, dtype, out_features)

    return choose("updates", (dtype, out_features), formulations, holds)


def _keeps_zeros(formulation: Formulation, dtype: torch.dtype, out_features: int) -> bool:
    """Whether rows keep their bits in any number, and with their ranks anywhere among zeros."""
    span = MAX_REDUCTION
    generator = torch.Generator().manual_seed(span)
    part = torch.randn(8, out_features, generator=generator)
    # Consecutive groups of eight ranks cancel, wherever a row's ranks begin.
    b = torch.cat([part if i % 2 else -part for i in range(span // 8)]).to(dtype)
    for rank in (16, 32, 96, span):
        own = torch.randn(SAMPLE_ROWS, 8, generator=generator).to(dtype).repeat(1, rank // 8)
        for low in {0, 8, 16, (span - rank) // 16 * 8, span - rank}:
            if low + rank > span:
                continue
            v = torch.nn.functional.pad(own, (low, span - rank - low))
            alone = torch.nn.functional.pad(own, (0, span - rank))
            alone_b = torch.nn.functional.pad(b[low : low + rank], (0, 0, 0, span - rank))
            expected = formulation.call(alone, alone_b)
            if not torch.equal(formulation.call(v, b), expected):
                return False
    v = torch.randn(SAMPLE_ROWS, 8, generator=generator).to(dtype).repeat(1, span // 8)
    return keeps_rows(lambda v: formulation.call(v, b), v, most_sizes())


# ``row_product`` multiplies a small matrix per row of the step, where ``row_linear`` multiplies a
# vector. The bits of a row are the same in any batch here, too.


def row_product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Multiply a matrix per row by a weight per row or by one weight for all.

    Args:
        x: ``[num_rows, m, k]``, fp32.
        w: ``[num_rows, n, k]`` or, shared by all rows, ``[n, k]``; fp32. Appending zero rows or
            columns changes no bit of the rest.

    Returns:
        ``[num_rows, m, n]``, fp32. On devices other than the CPU by library products of one shape.
    """
    num_rows, m, _ = x.shape
    if has_kernels(x.device):
        if w.dim() == 3:
            return dot_products(x, w)
        return dot_products(x.reshape(1, num_rows * m, -1), w.unsqueeze(0)).view(num_rows, m, -1)
    if x.device.type != "cpu":
        return _in_pieces(x, w)
    if w.dim() == 2:
        return ordered_product(x.reshape(num_rows * m, -1), w).view(num_rows, m, -1)
    out = x.new_empty(num_rows, m, w.shape[1])
    for row in range(num_rows):
        out[row] = ordered_product(x[row], w[row])
    return out


def _in_pieces(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Compute in pieces of one shape, since a library chooses its algorithm by the shape."""
    num_rows, m, _ = x.shape
    if w.dim() == 2:
        return linear_in_pieces(x.reshape(num_rows * m, -1), w).view(num_rows, m, -1)
    missing = -num_rows % PIECE_ROWS
    pairs = (torch.nn.functional.pad(t, (0, 0, 0, 0, 0, missing)).split(PIECE_ROWS) for t in (x, w))
    pieces = [torch.bmm(a, b.transpose(1, 2)) for a, b in zip(*pairs, strict=True)]
    return torch.cat(pieces)[:num_rows]


# Products of many small matrices at a time; a row's bits do not depend on the batch.
#
# Tables that are multiplied in every layer of every step are kept in fp32 and padded, rows to
# multiples of 4, columns and reductions to multiples of 16. Without compiled kernels, matrices go
# to a library in calls of a few tried sizes (``trial.py``).


ROWS = 4
COLUMNS = 16
# Numbers of matrices in one library call, and numbers of rows of each.
_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_ROW_SIZES = (4, 16, 64)


def padded(size: int, multiple: int) -> int:
    """``size`` rounded up to a multiple."""
    return -(-size // multiple) * multiple


def table_product(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Multiply a matrix per row by a matrix per row or by one matrix for all.

    Args:
        x: ``[num_rows, m, k]`` fp32.
        table: ``[num_rows, k, n]``, or ``[1, k, n]`` for all; fp32.

    Returns:
        ``[num_rows, m, n]``, fp32. On the CPU, bits depend only on a row and its matrix.
    """
    if has_kernels(x.device):
        return column_products(x, table)
    if x.device.type != "cpu":
        return x @ table
    return _prepare_products(table.shape[1], table.shape[2]).call(x, table)


def prepare_products(k: int, n: int, device: torch.device) -> None:
    """Run trials of products with tables ``[…, k, n]`` now, not during a request, if needed."""
    if device.type == "cpu" and not has_kernels(device):
        _prepare_products(k, n)


def _prepare_products(k: int, n: int) -> Formulation:
    """Choose a product of matrices ``[…, k] [k, n]`` without compiled kernels."""

    def holds(formulation: Formulation) -> bool:
        x, w = cancelling(64, n, k, torch.float32)
        table = w.T.contiguous().unsqueeze(0)
        alone = torch.cat([formulation.call(row.view(1, 1, k), table)[0] for row in x])
        for m in (1, 3, 4, 8, 16, 20, 64):
            for batch in (*_BATCHES, 3, 7, 67):
                places = (torch.arange(batch * m) * 5 + m + batch) % 64
                rows = x[places].view(batch, m, k)
                for tables in (table, table.expand(batch, -1, -1).contiguous()):
                    if not torch.equal(formulation.call(rows, tables).flatten(0, 1), alone[places]):
                        return False
        return True

    return choose("matrices", (k, n), _formulations, holds)


def _formulations() -> Sequence[Formulation]:
    """Candidate functions of ``(x, table)``."""

    def of(name: str, batches: Sizes, rows: Sizes) -> Formulation:
        return Formulation(name, lambda x, table: _in_calls(x, table, batches, rows))

    return [
        of("batches", _BATCHES, _ROW_SIZES),
        of("batches of 4 rows", _BATCHES, (4,)),
        of("one matrix at a time", (1,), (4,)),
        of("one row at a time", (1,), (1,)),
        Formulation("ordered sums", _ordered),
    ]


def _in_calls(x: torch.Tensor, table: torch.Tensor, batches: Sizes, rows: Sizes) -> torch.Tensor:
    count, m, _ = x.shape
    out = x.new_empty(count, m, table.shape[2])
    for first, batch, some in _calls(count, batches):
        matrices = slice(first, first + some)
        w = table[matrices] if table.shape[0] == count else table.expand(some, -1, -1)
        w = _filled(w, batch, 0).contiguous()
        for row, size, few in _calls(m, rows):
            part = x[matrices, row : row + few].contiguous()
            part = _filled(_filled(part, batch, 0), size, 1)
            out[matrices, row : row + few] = torch.bmm(part, w)[:some, :few]
    return out


def _calls(total: int, sizes: Sizes) -> list[tuple[int, int, int]]:
    """The start, the size and the number of real entries of each call."""
    found, start = [], 0
    while start < total:
        size = max((s for s in sizes if s <= total - start), default=sizes[0])
        found.append((start, size, min(size, total - start)))
        start += size
    return found


def _filled(x: torch.Tensor, size: int, axis: int) -> torch.Tensor:
    """Fill with zeros up to a size."""
    more = size - x.shape[axis]
    return torch.nn.functional.pad(x, (*(0, 0) * (x.dim() - 1 - axis), 0, more)) if more > 0 else x


def _ordered(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    out = x.new_empty(x.shape[0], x.shape[1], table.shape[2])
    for i in range(x.shape[0]):
        out[i] = ordered_product(x[i], table[i if table.shape[0] > 1 else 0].T)
    return out
