"""Log probabilities of a vocabulary and their gradients, by ``logits.c``.

The bits of a row depend on the row alone, and a target's log probability is the same in all forms.
"""

from __future__ import annotations

from turret.kernels.cpu.native import functions, num_threads
from turret.lazy_torch import torch


def log_softmax(x: torch.Tensor) -> torch.Tensor:
    """``x − log Σ e^x`` of every row, ``[rows, width]`` fp32."""
    x = x.contiguous()
    out, sums = torch.empty_like(x), torch.empty(len(x), 2)
    functions().turret_log_softmax(
        x.data_ptr(), out.data_ptr(), sums.data_ptr(), *x.shape, num_threads()
    )
    return out


class TargetLogprobs:
    """The log probabilities of one target of each row.

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
            slopes: The gradients of their log probabilities, ``[n]`` fp32.

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
