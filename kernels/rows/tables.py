"""Products of small matrices, many at a time, whose bits do not depend on the batch.

Tables that are multiplied in every layer of every step are kept in fp32 and padded, rows to
multiples of 4, columns and reductions to multiples of 16. Where there are no compiled kernels,
matrices go to a library in calls of a few tried sizes (``trial.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

from turret.kernels.cpu.native import has_kernels
from turret.kernels.cpu.products import column_products
from turret.kernels.rows.linear import ordered_product
from turret.kernels.rows.trial import Formulation, Sizes, cancelling, choose
from turret.lazy_torch import torch

ROWS = 4
COLUMNS = 16
# Numbers of matrices in one library call, and numbers of rows of each.
_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_ROW_SIZES = (4, 16, 64)


def padded(size: int, multiple: int) -> int:
    """``size`` rounded up to a multiple."""
    return -(-size // multiple) * multiple


def table_product(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Multiply a matrix per row by a matrix per row or by one for all.

    Args:
        x: ``[num_rows, m, k]`` fp32.
        table: ``[num_rows, k, n]``, or ``[1, k, n]`` for all; fp32.

    Returns:
        ``[num_rows, m, n]``, fp32. Bits are kept on the CPU: those of a row and its matrix alone.
    """
    if has_kernels(x.device):
        return column_products(x, table)
    if x.device.type != "cpu":
        return x @ table
    return _prepare(table.shape[1], table.shape[2]).call(x, table)


def prepare_products(k: int, n: int, device: torch.device) -> None:
    """Try products with tables ``[…, k, n]`` now instead of during a request, where needed."""
    if device.type == "cpu" and not has_kernels(device):
        _prepare(k, n)


def _prepare(k: int, n: int) -> Formulation:
    """Choose how matrices of ``[…, k] [k, n]`` are multiplied without compiled kernels."""

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
    """Begin, size and number of real entries of each call."""
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
