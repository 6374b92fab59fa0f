"""``log softmax`` over a vocabulary, the bits of a row the same in any batch."""

from __future__ import annotations

import torch


def row_log_softmax(x: torch.Tensor) -> torch.Tensor:
    """``x − log Σ e^x`` of every row.

    Args:
        x: ``[num_rows, width]`` fp32.

    Returns:
        The same shape. On a CPU rows go to the library one at a time, each from memory of its own:
        always the same call.
    """
    if x.device.type != "cpu":
        return x.log_softmax(-1)
    out = torch.empty_like(x)
    for row, result in zip(x, out, strict=True):
        result.copy_(row.clone().log_softmax(-1))
    return out
