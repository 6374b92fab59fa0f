"""Operations on a CPU in which a row's bits do not depend on the batch.

A request's tokens must not depend on the other requests of its batch, but a library does not
guarantee that a row's bits stay the same. If there are compiled kernels, they fix the order of
every sum (``cpu/c/products.c``, ``cpu/c/dense_product.c``). Otherwise, these functions use library
calls that passed a trial on this machine, or elementwise operations if none passed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import TypeAlias

from turret.kernels.cpu import functions, has_kernels, num_threads
from turret.kernels.cpu.products import (
    add_column_products_,
    column_products,
    dense_product,
    dot_products,
    serves_dense,
    serves_transposed,
    transposed_product,
)
from turret.lazy_torch import torch

_log = logging.getLogger(__name__)

Compute: TypeAlias = "Callable[[torch.Tensor], torch.Tensor]"
Sizes = tuple[int, ...]

# Trials that choose call sizes in which a row's bits do not depend on the batch.
#
# A library's kernel and its blocking of a sum depend on the whole shape, so row 0 of a 1-row
# product and row 0 of a 16-row product may differ, and so may equal rows at different positions.
# Rows therefore go to a library only in calls of a few sizes; the last call is filled up with
# zeros. Each of these calls is tried for the operation, shape, dtype and number of threads. If a
# row's bits change, the next set of sizes is tried. The last set is one row at a time; if a library
# computes even that same call differently each time, no set is left. A choice is made once, before
# its first use, and kept.
#
# Trials use operands whose exact products are 0, so that the leading bits of the result show the
# order of the sum.

SAMPLE_ROWS = 64
# Number of rows of the largest call.
LARGEST = 512
# Sets of row counts: powers of two from 1, 4, 16 or 64 on; or only 16, 64 or 1.
_SETS: tuple[Sizes, ...] = (
    *(tuple(s for k in range(10) if (s := 1 << k) >= least) for least in (1, 4, 16, 64)),
    (16,),
    (64,),
    (1,),
)

# Operation, key and number of threads → the set of sizes, empty if none passed.
_choices: dict[tuple[str, Hashable, int], Sizes] = {}


def forget_choices() -> None:
    """Repeat each trial at the next use, for instance after the libraries were replaced."""
    _choices.clear()


def choices() -> dict[str, str]:
    """The sizes chosen in this process so far; an operation may have several, by shape."""
    found: dict[str, set[str]] = {}
    for (op, _, _), sizes in _choices.items():
        found.setdefault(op, set()).add(name_of(sizes))
    return {op: "/".join(sorted(names)) for op, names in sorted(found.items())}


def name_of(sizes: Sizes) -> str:
    """A description of call sizes, for the log."""
    if not sizes:
        return "ordered sums"
    if sizes == (1,):
        return "one row at a time"
    return f"{sizes[0]} rows" if len(sizes) == 1 else f"{sizes[0]} rows or more"


def choose(
    op: str,
    key: Hashable,
    trial: Callable[[], tuple[Compute, torch.Tensor]],
    largest: int = LARGEST,
) -> Sizes:
    """The first set of call sizes in which rows keep their bits, empty if there is none.

    Args:
        op: Name of the operation.
        key: Everything else that bits may depend on; the number of threads is added.
        trial: Makes a function that computes n results from ``[n, …]``, and rows to try it with.
        largest: Number of rows of the largest call.
    """
    place = (op, key, torch.get_num_threads())
    if place not in _choices:
        tried = (tuple(size for size in sizes if size <= largest) for sizes in _SETS)
        with torch.inference_mode():
            compute, rows = trial()
            passed = (sizes for sizes in tried if _keeps_rows(compute, rows, sizes, largest))
            _choices[place] = next(passed, ())
        _log.debug("%s %s: %s", op, key, name_of(_choices[place]))
    return _choices[place]


def by_rows(
    op: str,
    key: Hashable,
    compute: Compute,
    x: torch.Tensor,
    sample: Callable[[], torch.Tensor],
) -> torch.Tensor:
    """Compute rows so that each has the bits that it has alone.

    Args:
        op: Name of the operation.
        key: Everything that ``compute`` depends on: dtype, widths, constants.
        compute: Computes n results from ``[n, …]``, row by row.
        x: ``[num_rows, …]``.
        sample: Makes ``SAMPLE_ROWS`` rows to try.
    """
    # If no call size keeps a row's bits, compute one row at a time, the best that is possible here.
    # Products have another formulation for this case (``ordered_product``).
    return in_sizes(compute, x, choose(op, key, lambda: (compute, sample())) or (1,))


def in_sizes(compute: Compute, x: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    """Compute in calls with these row counts, ascending; the last call is padded with zeros."""
    parts, start, num_rows = [], 0, x.shape[0]
    if num_rows == 0:
        return compute(x)
    while start < num_rows:
        left = num_rows - start
        size = max((s for s in sizes if s <= left), default=sizes[0])
        # Copy a part, because a library's algorithm may depend on a row's address.
        part = x if size == num_rows else x[start : start + size].clone()
        missing = size - part.shape[0]
        if missing > 0:
            part = torch.nn.functional.pad(part, (0, 0) * (x.dim() - 1) + (0, missing))
        parts.append(compute(part)[: min(size, left)])
        start += size
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _keeps_rows(compute: Compute, rows: torch.Tensor, sizes: Sizes, largest: int) -> bool:
    """Whether rows have the same bits, in any number and at any position, as when alone."""
    total = rows.shape[0]
    alone = torch.cat([in_sizes(compute, rows[i : i + 1].clone(), sizes) for i in range(total)])
    # Try powers of two of rows, up to the largest call, and some numbers that need padding.
    for count in (*(1 << k for k in range(largest.bit_length())), 3, 7):
        for first in {0, 1, count // 2}:
            places = (torch.arange(count) + first) % total
            if not torch.equal(in_sizes(compute, rows[places], sizes), alone[places]):
                return False
    return True


def cancelling(
    rows: int, columns: int, inner: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x [rows, inner]`` and ``w [columns, inner]`` whose products are all exactly 0."""
    generator = torch.Generator().manual_seed(inner)
    half = inner // 2
    a = torch.randn(rows, half, generator=generator)
    b = torch.randn(columns, half, generator=generator)
    order = torch.randperm(inner, generator=generator)
    rest_x, rest_w = torch.zeros(rows, inner % 2), torch.zeros(columns, inner % 2)
    x = torch.cat((a, a, rest_x), dim=1)[:, order]
    w = torch.cat((b, -b, rest_w), dim=1)[:, order]
    return x.to(dtype), w.to(dtype)


# Products: ``y = x Wᵀ``.

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


# Elements of a piece of ``ordered_product``'s fp32 terms: 4 MiB, which stay in the cache.
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
        x: ``[num_rows, out_features]`` fp32; each row is divided by its largest absolute value
            before it is rounded to the dtype of ``weight``.
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
        # If a sum has few terms, they may cancel in any order. Random numbers in some of the rows
        # and columns then show a difference.
        generator = torch.Generator().manual_seed(1)
        for some in (x[1::2], tried[::2]):
            some.copy_(torch.randn(some.shape, generator=generator))
        return lambda rows: torch.nn.functional.linear(rows, tried), x

    return choose("linear", (dtype, out_features, in_features), trial, largest)


# ``row_product`` multiplies one small matrix for each row of the step, while ``row_linear``
# multiplies one vector. The bits of a row are the same in any batch here, too.


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


# Elementwise functions.
#
# A library computes most elements with vector instructions, and the last few of each thread's share
# with scalar ones, which may round differently. Where there is no compiled kernel, rows are
# therefore padded to whole vectors, in calls that passed a trial.

# The number of elements in the longest vector loop (AVX-512, 16-bit, unrolled twice).
VECTOR_ELEMENTS = 64


def row_exp_(x: torch.Tensor) -> torch.Tensor:
    """Replace fp32 ``x`` by ``e^x``; an element's bits depend only on its row. Returns ``x``."""
    if x.device.type != "cpu":
        return x.exp_()
    if has_kernels(x.device):
        out = x.contiguous()
        functions().turret_exp_f32(out.data_ptr(), out.numel())
    else:
        width = x.shape[-1]
        wide = torch.nn.functional.pad(x.reshape(-1, width), (0, -width % VECTOR_ELEMENTS))
        out = by_rows("exp", wide.shape[1], torch.exp, wide, lambda: _sample(wide, 10.0))
        out = out[:, :width].reshape(x.shape)
    return x if out is x else x.copy_(out)


def _sample(like: torch.Tensor, scale: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SAMPLE_ROWS, like.shape[1], generator=generator).mul_(scale).to(like.dtype)


def row_silu(x: torch.Tensor) -> torch.Tensor:
    """Apply ``x / (1 + e^−x)`` to ``[num_rows, width]``; each row is bit-identical in any batch."""
    if x.device.type != "cpu":
        return torch.nn.functional.silu(x)
    width, dtype = x.shape[1], x.dtype
    wide = torch.nn.functional.pad(x, (0, -width % VECTOR_ELEMENTS)).contiguous()
    key, silu = (dtype, wide.shape[1]), torch.nn.functional.silu
    return by_rows("silu", key, silu, wide, lambda: _sample(wide, 4.0))[:, :width]


# gelu by its tanh formula (arXiv 1606.08415).
#
# ``gelu(x) = x / (1 + e^−y)`` with ``y = 2 √(2/π) (x + 0.044715 x³)``, by ``row_exp_`` and
# operations that are correctly rounded.


def row_gelu(x: torch.Tensor) -> torch.Tensor:
    """Apply gelu to ``[num_rows, width]``, each row bit-identical in any batch; dtype of ``x``."""
    wide = x.float()
    y = (wide * wide).mul_(0.044715).add_(1.0).mul_(wide).mul_(-1.5957691216057308)
    return torch.div(wide, row_exp_(y).add_(1.0)).to(x.dtype)


# ``c · tanh(x / c)``, which keeps scores and logits within ±c; its bits do not depend on the batch,
# for the same reason as gelu's.


def row_softcap_(x: torch.Tensor, cap: float) -> torch.Tensor:
    """Cap fp32 ``x`` in place; an element's bits depend only on its row. Returns ``x``."""
    # c · tanh(x / c) = c − 2c / (e^(2x/c) + 1), within 2e-7 · c.
    row_exp_(x.mul_(2.0 / cap)).add_(1.0)
    return torch.div(-2.0 * cap, x, out=x).add_(cap)


# The gate of gpt-oss (arXiv 2508.10925) over a fused projection of gates and ups::
#
#     g = min(gate, limit)    u = min(max(up, -limit), limit)    (u + 1) · g · σ(alpha · g)
#
# Gates and ups alternate, as in gpt-oss' checkpoints and in adapters.


def clamped_swiglu_reference(gate_up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """Apply the gate, computed in fp32; the oracle of the Triton kernel.

    Args:
        gate_up: ``[num_rows, 2 · width]``, gates at even columns; fp16, bf16 or fp32.
        alpha: Gain of the sigmoid.
        limit: The maximum of gates and ups; the ups' minimum is ``-limit``.

    Returns:
        ``[num_rows, width]``, one rounding to the dtype of ``gate_up``.
    """
    gate, up = gate_up.float().unflatten(1, (-1, 2)).unbind(-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return ((up + 1) * gate * (alpha * gate).sigmoid()).to(gate_up.dtype)


def row_clamped_swiglu(gate_up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """Apply the gate to ``[num_rows, 2 · width]``, in which gate and up columns alternate.

    Returns ``[num_rows, width]`` in the dtype of ``gate_up``.
    Each row is bit-identical in any batch.
    """
    gate, up = gate_up.float().unflatten(1, (-1, 2)).unbind(-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit).add_(1.0)
    gate = torch.div(gate, row_exp_(gate * -alpha).add_(1.0))
    return gate.mul_(up).to(gate_up.dtype)


# Residual addition and RMSNorm (arXiv 1910.07467) are one operation:
#
# ``residual ← residual + update`` (rounded to its dtype, as the residual stream is stored), then
# ``normed = residual / sqrt(mean(residual²) + eps) ⊙ weight``.


def residual_rms_norm_reference(
    residual: torch.Tensor, update: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Add ``update`` in place and normalise the sum; the oracle of the Triton kernel.

    Args:
        residual: ``[num_rows, width]``, fp16, bf16 or fp32; becomes the sum.
        update: Same shape and dtype, or None (only normalise).
        weight: ``[width]``, same dtype or fp32.
        eps: Added to the mean square.

    Returns:
        ``[num_rows, width]``, dtype of ``residual``.
    """
    if update is not None:
        residual += update
    return row_rms_norm(residual, weight, eps)


def row_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of each row, computed by torch.

    Args:
        x: ``[num_rows, width]``, fp16, bf16 or fp32.
        weight: ``[width]``, same dtype or fp32.
        eps: Added to the mean square.

    Returns:
        ``[num_rows, width]``, dtype of ``x``; on a CPU a row's bits are the same in any batch.
    """

    def compute(rows: torch.Tensor) -> torch.Tensor:
        if rows.dtype == weight.dtype:
            return torch.nn.functional.rms_norm(rows, weight.shape, weight, eps)
        wide = torch.nn.functional.rms_norm(rows.float(), weight.shape, weight.float(), eps)
        return wide.to(rows.dtype)

    def sample() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(SAMPLE_ROWS, x.shape[1], generator=generator).to(x.dtype)

    if x.device.type != "cpu":
        return compute(x)
    return by_rows("norm", (x.dtype, weight.dtype, x.shape[1]), compute, x, sample)


# Rotary positions (RoFormer, arXiv 2104.09864).
#
# The first ``2 · pairs`` features of a head rotate. The pairs are ``(i, i + pairs)``, as in most
# Hugging Face checkpoints, or neighbours.


def rotate_heads(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, is_interleaved: bool = False
) -> torch.Tensor:
    """Rotary positions on ``[rows, heads, head_dim]``, any float dtype; fp32 result.

    Args:
        x: The heads, as above.
        cos: ``[rows, pairs]`` fp32.
        sin: Same shape.
        is_interleaved: Whether neighbouring features make a pair, not (i, i + pairs).
    """
    x = x.float()
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    out = x.clone()
    first, second = _pairs(x, cos.shape[-1], is_interleaved)
    out_first, out_second = _pairs(out, cos.shape[-1], is_interleaved)
    # Separate products and sums round alike in vector loops and in scalar loops for the remainder.
    out_first.copy_((first * cos).sub_(second * sin))
    out_second.copy_((second * cos).add_(first * sin))
    return out


def _pairs(x: torch.Tensor, count: int, is_interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the first and second features of the pairs, ``[rows, heads, count]`` each."""
    if is_interleaved:
        return x[..., 0 : 2 * count : 2], x[..., 1 : 2 * count : 2]
    return x[..., :count], x[..., count : 2 * count]


# Log probabilities of a vocabulary, and their gradients. A target's log probability has the same
# bits in all forms.


def row_log_softmax(x: torch.Tensor) -> torch.Tensor:
    """``x − log Σ e^x`` of every row.

    Args:
        x: ``[num_rows, width]`` fp32.

    Returns:
        The same shape. On a CPU without compiled kernels, rows go to the library one at a time,
        each as a separate copy, so that the call is always the same.
    """
    if x.device.type != "cpu":
        return x.log_softmax(-1)
    if has_kernels(x.device):
        x = x.contiguous()
        out, sums = torch.empty_like(x), torch.empty(len(x), 2)
        functions().turret_log_softmax(
            x.data_ptr(), out.data_ptr(), sums.data_ptr(), *x.shape, num_threads()
        )
        return out
    out = torch.empty_like(x)
    for row, result in zip(x, out, strict=True):
        result.copy_(row.clone().log_softmax(-1))
    return out


class TargetLogprobs:
    """The log probability of one target token in each row.

    Args:
        logits: ``[rows, width]`` bf16, contiguous.
        targets: ``[rows]`` int64.

    Attributes:
        logprobs: ``[rows]`` fp32.
    """

    def __init__(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        self._logits, self._targets = logits, targets
        self._sums = torch.empty(len(logits), 2)
        functions().turret_log_sums(
            logits.data_ptr(), self._sums.data_ptr(), *logits.shape, num_threads()
        )
        most, rest = self._sums.unbind(1)
        chosen = logits.gather(1, targets[:, None])[:, 0].float()
        self.logprobs = (chosen - most) - rest

    def gradients(self, rows: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
        """The gradient of the logits. It may overwrite the logits, so compute it only once.

        Args:
            rows: The rows to compute, ``[n]`` int64.
            slopes: The gradients of the loss with respect to the rows' log probabilities, ``[n]``
                fp32.

        Returns:
            ``[n, width]`` bf16.
        """
        grads, sums, targets = self._logits, self._sums, self._targets
        if len(rows) < len(grads):
            grads, sums, targets = grads[rows], sums[rows], targets[rows]
        slopes = slopes.contiguous()
        functions().turret_logit_gradients(
            grads.data_ptr(),
            sums.data_ptr(),
            targets.data_ptr(),
            slopes.data_ptr(),
            *grads.shape,
            num_threads(),
        )
        return grads
