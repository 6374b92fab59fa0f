"""``y = x Wᵀ``; a row's bits do not depend on the number of rows that are computed together.

A request's tokens must not depend on the other requests of its batch, and a library does not
guarantee bits. On a CPU with compiled kernels, these fix the order of every sum
(``cpu/c/products.c``, ``cpu/c/dense_product.c``). Otherwise a library product is used in calls that
passed a trial on this machine (``trial.py``), or else a product of elementwise operations.
"""

from __future__ import annotations

from turret.kernels.cpu.native import has_kernels
from turret.kernels.cpu.products import (
    add_column_products_,
    column_products,
    dense_product,
    dot_products,
    serves_dense,
    serves_transposed,
    transposed_product,
)
from turret.kernels.rows.trial import (
    LARGEST,
    SAMPLE_ROWS,
    Compute,
    Sizes,
    cancelling,
    choose,
    in_sizes,
    name_of,
)
from turret.lazy_torch import torch

# Rows of one library product on other devices, where the algorithm is chosen by the shape.
PIECE_ROWS = 64
# Trials of a weight with more elements than this use fewer rows and smaller calls, to save time.
_LARGE_WEIGHT, _LARGE_WEIGHT_ROWS, _LARGE_WEIGHT_SAMPLE = 1 << 22, 64, 8


def row_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply rows by a dense weight, each row bit-identical in any batch.

    Args:
        x: ``[num_rows, in_features]``, dtype of ``weight``.
        weight: ``[out_features, in_features]``, contiguous. Without compiled kernels, a library
            product is tried for this shape, once.

    Returns:
        ``[num_rows, out_features]``, dtype of ``x``. On devices other than the CPU, these are
        library products of one shape, whose sums ``keep_sums_whole``
        (``server/models/weights/nf4_gpu.py``) keeps from being split.
    """
    if x.requires_grad or weight.requires_grad:
        return torch.nn.functional.linear(x.float(), weight.float())
    if x.device.type != "cpu":
        return linear_in_pieces(x, weight)
    if serves_dense(weight):
        return dense_product(x, weight)
    if has_kernels(x.device):
        return dot_products(x.float().unsqueeze(0), weight.unsqueeze(0))[0].to(x.dtype)
    if sizes := _sizes(weight):
        return in_sizes(lambda rows: torch.nn.functional.linear(rows, weight), x, sizes)
    return ordered_product(x, weight).to(x.dtype)


def row_linear_transposed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply rows by a transposed weight, each row bit-identical in any batch.

    Args:
        x: ``[num_rows, out_features]`` fp32; rounded to the dtype of ``weight`` if that is bf16 or
            there are no compiled kernels.
        weight: ``[out_features, in_features]``, contiguous.

    Returns:
        ``[num_rows, in_features]`` fp32.
    """
    if serves_transposed(weight):
        return transposed_product(x, weight)
    if has_kernels(x.device):
        return column_products(x.unsqueeze(0), weight.unsqueeze(0))[0]
    if x.device.type != "cpu":
        return transposed_in_pieces(x, weight)
    return row_linear(x.to(weight.dtype), weight.T.contiguous()).float()


# Elements of the fp32 terms of a piece of ``ordered_product``: 4 MiB stay in the cache.
_PIECE_ELEMENTS = 1 << 20


def ordered_product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """``x wᵀ`` by elementwise operations, which round correctly on any machine, but are slow.

    Args:
        x: ``[rows, inner]``.
        w: ``[columns, inner]``.

    Returns:
        ``[rows, columns]`` fp32. Neighbouring terms are added until one is left.
    """
    inner = x.shape[1]
    if inner == 0:
        return x.new_zeros(x.shape[0], w.shape[0], dtype=torch.float32)
    more = (1 << (inner - 1).bit_length()) - inner
    x, w = (torch.nn.functional.pad(each.float(), (0, more)) for each in (x, w))
    parts = []
    for row in x:
        columns = []
        for some in w.split(max(1, _PIECE_ELEMENTS // w.shape[1])):
            terms = row * some
            while terms.shape[1] > 1:
                terms = terms[:, ::2] + terms[:, 1::2]
            columns.append(terms[:, 0])
        parts.append(torch.cat(columns))
    return torch.stack(parts) if parts else x.new_zeros(0, w.shape[0])


def linear_in_pieces(x: torch.Tensor, weight: torch.Tensor, size: int = PIECE_ROWS) -> torch.Tensor:
    """``x weightᵀ`` in library products of one shape, the last one filled up with zeros.

    Args:
        x: ``[num_rows, in_features]``, dtype of ``weight``.
        weight: ``[out_features, in_features]``.
        size: Rows of a product. Libraries choose their algorithm by the shape.

    Returns:
        ``[num_rows, out_features]``.
    """
    num_rows = x.shape[0]
    missing = -num_rows % size
    padded = torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x
    pieces = [torch.nn.functional.linear(piece, weight) for piece in padded.split(size)]
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces))[:num_rows]


def transposed_in_pieces(
    x: torch.Tensor, weight: torch.Tensor, size: int = PIECE_ROWS
) -> torch.Tensor:
    """``x weight`` like ``linear_in_pieces``, for gradients, which are too small for float16.

    Args:
        x: ``[num_rows, out_features]`` fp32; each row is divided by its largest number before it
            is rounded to the dtype of ``weight``.
        weight: ``[out_features, in_features]``.
        size: Rows of a product.

    Returns:
        ``[num_rows, in_features]`` fp32.
    """
    largest = x.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    rows = (x / largest).to(weight.dtype)
    return linear_in_pieces(rows, weight.T, size).float() * largest


def _addmm_in_pieces(y: torch.Tensor, v: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``y + v b`` computed like ``linear_in_pieces``, with one rounding."""
    missing = -v.shape[0] % PIECE_ROWS
    rows, factors = (
        torch.nn.functional.pad(t, (0, 0, 0, missing)).split(PIECE_ROWS) for t in (y, v)
    )
    pieces = [torch.addmm(r, f, b) for r, f in zip(rows, factors, strict=True)]
    return torch.cat(pieces)[: v.shape[0]]


def row_addmm_(y: torch.Tensor, v: torch.Tensor, b: torch.Tensor) -> None:
    """``y += v b`` in place, each row bit-identical in any batch.

    Args:
        y: ``[num_rows, out_features]``, rounded once; rows may be strided (a slice of a fused
            projection).
        v: ``[num_rows, rank]``, any float dtype.
        b: ``[rank, out_features]``, any float dtype.
    """
    if v.requires_grad or b.requires_grad:
        y.addmm_(v.float(), b.float())
    elif v.device.type != "cpu":
        y.copy_(_addmm_in_pieces(y, v.to(y.dtype), b.to(y.dtype)))
    elif has_kernels(v.device):
        total = y if y.dtype == torch.float32 and y.stride(1) == 1 else y.float()
        add_column_products_(total, v.float(), b)
        if total is not y:
            y.copy_(total)
    else:
        y.copy_(y.float() + row_linear(v.float(), b.T.float().contiguous()))


def prepare_linear(weight: torch.Tensor) -> None:
    """Prepare a weight for ``row_linear``, so that trials run now and not during a request.

    The trials take some milliseconds for a weight of a layer, once per shape. Compiled kernels need
    none.
    """
    if weight.device.type == "cpu" and not has_kernels(weight.device):
        _sizes(weight)


def linear_formulation(weight: torch.Tensor) -> str:
    """A description of the product of rows and a weight on the CPU."""
    return "native" if has_kernels(weight.device) else f"torch {name_of(_sizes(weight))}"


def _sizes(weight: torch.Tensor) -> Sizes:
    """The calls in which rows are multiplied by a weight of this shape without compiled kernels."""
    (out_features, in_features), dtype = weight.shape, weight.dtype
    largest, sample = LARGEST, SAMPLE_ROWS
    if out_features * in_features > _LARGE_WEIGHT:
        largest, sample = _LARGE_WEIGHT_ROWS, _LARGE_WEIGHT_SAMPLE

    def trial() -> tuple[Compute, torch.Tensor]:
        x, tried = cancelling(sample, out_features, in_features, dtype)
        # If there are few terms, they may cancel in any order; sums of other numbers then show it.
        generator = torch.Generator().manual_seed(1)
        for some in (x[1::2], tried[::2]):
            some.copy_(torch.randn(some.shape, generator=generator))
        return lambda rows: torch.nn.functional.linear(rows, tried), x

    return choose("linear", (dtype, out_features, in_features), trial, largest)


# ``row_product`` multiplies a small matrix per row of the step, where ``row_linear`` multiplies a
# vector. The bits of a row are the same in any batch here, too.


def row_product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Multiply a matrix per row by a weight per row or by one weight for all.

    Args:
        x: ``[num_rows, m, k]``, fp32.
        w: ``[num_rows, n, k]`` or, shared by all rows, ``[n, k]``; fp32. Appending zero rows or
            columns changes no bit of the rest.

    Returns:
        ``[num_rows, m, n]``, fp32. On devices other than the CPU, library products of one shape.
    """
    num_rows, m, _ = x.shape
    if x.requires_grad or w.requires_grad:
        return x @ w.transpose(-1, -2)
    if has_kernels(x.device):
        if w.dim() == 3:
            return dot_products(x, w)
        return dot_products(x.reshape(1, num_rows * m, -1), w.unsqueeze(0)).view(num_rows, m, -1)
    if w.dim() == 2:
        return row_linear(x.reshape(num_rows * m, -1), w).view(num_rows, m, -1)
    if x.device.type == "cpu":
        return torch.stack([row_linear(*pair) for pair in zip(x, w, strict=True)])
    missing = -num_rows % PIECE_ROWS
    pairs = (torch.nn.functional.pad(t, (0, 0, 0, 0, 0, missing)).split(PIECE_ROWS) for t in (x, w))
    # Multiply pieces of one shape, because a library chooses its algorithm by the shape.
    pieces = [torch.bmm(a, b.transpose(1, 2)) for a, b in zip(*pairs, strict=True)]
    return torch.cat(pieces)[:num_rows]


# Products of many small matrices at a time; a row's bits do not depend on the batch.
#
# Tables that are multiplied in every layer of every step are kept in fp32 and padded, rows to
# multiples of 4, columns and reductions to multiples of 16.


ROWS = 4
COLUMNS = 16


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
    tables = table.transpose(1, 2).contiguous().expand(len(x), -1, -1)
    return torch.stack([row_linear(*pair) for pair in zip(x, tables, strict=True)])


def prepare_products(k: int, n: int, device: torch.device) -> None:
    """Run trials of products with tables ``[…, k, n]`` now, not during a request, if needed."""
    prepare_linear(torch.empty(n, k, device=device))
