"""The base's weight times a low-rank matrix, entry by entry (HiRA, ICLR 2025).

``(W ⊙ bᵀ a) x = Σ_r b_r ⊙ W (a_r ⊙ x)``: the base multiplies a row more for each rank, and nothing
as large as the weight is made.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

# Rows that the base multiplies at once.
_ROWS = 512


def modulated_reference(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    base: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Multiply by the base and by torch; the CPU path as well as the Triton kernels' oracle.

    A row's bits do not depend on the other rows if the base's do not.

    Args:
        x: ``[num_rows, in]``, any float dtype.
        a: ``[rank, in]``, any float dtype.
        b: ``[rank, out]``, any float dtype.
        base: ``[rows, in]`` in the dtype of ``x`` → ``[rows, out]``.

    Returns:
        ``[num_rows, out]`` fp32, summed in the order of the ranks.
    """
    total = x.new_zeros(len(x), b.shape[1], dtype=torch.float32)
    step = max(1, _ROWS // max(len(x), 1))
    for first in range(0, a.shape[0], step):
        left, right = a[first : first + step].float(), b[first : first + step].float()
        rows = (x.float().unsqueeze(0) * left.unsqueeze(1)).to(x.dtype)
        products = base(rows.flatten(0, 1)).view(len(left), len(x), -1)
        for product, row in zip(products, right, strict=True):
            total += product.float() * row
    return total
