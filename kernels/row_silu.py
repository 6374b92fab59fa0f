"""``silu(x) = x / (1 + e^−x)`` whose bits do not depend on the batch.

torch computes it with vector instructions and the last few elements of every thread's share with
scalar ones, which round differently. Where a share ends depends on the size of the whole tensor, so
tensors whose shares would not end at whole vectors are computed in blocks that one thread does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# torch gives a thread at least this many elements.
_SERIAL_ELEMENTS = 32768
# Elements that the longest vector loop takes at once (AVX-512, 16-bit, unrolled twice).
_VECTOR_ELEMENTS = 64


def row_silu(x: torch.Tensor) -> torch.Tensor:
    """Apply silu to ``[num_rows, width]``, each row bit-identical in any batch; dtype of ``x``."""
    count = x.numel()
    if x.device.type != "cpu" or count <= _SERIAL_ELEMENTS:
        return F.silu(x)
    share = -(-count // torch.get_num_threads())
    if share % _VECTOR_ELEMENTS == 0 and x.shape[1] % _VECTOR_ELEMENTS == 0:
        return F.silu(x)
    rows = max(1, _SERIAL_ELEMENTS // x.shape[1])
    return torch.cat([F.silu(block) for block in x.split(rows)])
