"""Trials that choose call sizes in which a row's bits do not depend on the batch.

A library does not guarantee bits. Its kernel and its blocking of a sum depend on the whole shape,
so row 0 of a 1-row product and row 0 of a 16-row product may differ, and so may equal rows at
different positions. Rows therefore go to a library only in calls of a few sizes; the last call is
filled up with zeros. Each of these calls is tried for the operation, shape, dtype and number of
threads. If a row's bits change, the next set of sizes is tried. The last set is one row at a time;
if a library computes even that same call differently each time, no set is left. A choice is made
once, before its first use, and kept.

Trials use operands whose exact products are 0, so that the leading bits of the result show the
order of the sum.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import TypeAlias

from turret.lazy_torch import torch

_log = logging.getLogger(__name__)

Compute: TypeAlias = "Callable[[torch.Tensor], torch.Tensor]"
Sizes = tuple[int, ...]

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
    # If a library never keeps a row's bits, compute one row at a time, the best possible here.
    # Sums of products have a second formulation for such libraries.
    return in_sizes(compute, x, choose(op, key, lambda: (compute, sample())) or (1,))


def in_sizes(compute: Compute, x: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    """Compute in calls with these row counts, ascending; the last call is padded with zeros."""
    parts, start, num_rows = [], 0, x.shape[0]
    if num_rows == 0:
        return compute(x)
    while start < num_rows:
        left = num_rows - start
        size = max((s for s in sizes if s <= left), default=sizes[0])
        # Copy a part, because a library's algorithm may depend on where a row lies in memory.
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
    # Every call up to a size, and some that need padding.
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
