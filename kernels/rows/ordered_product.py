"""Products by elementwise operations of torch alone: the order of every sum is written here.

An elementwise product or sum is rounded correctly, whatever computes it. Slow: what serves where
there are no compiled kernels and no library product passed its trial (``trial.py``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Size of the fp32 temporary of one piece of rows, in elements: 4 MiB stay in the cache.
_PIECE_ELEMENTS = 1 << 20


def ordered_product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """``x wᵀ``, neighbours added to each other until one is left.

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
    x, w = F.pad(x.float(), (0, more)), F.pad(w.float(), (0, more))
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
