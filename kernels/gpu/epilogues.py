"""The operation that follows a fused projection.

Where no adapter changes a projection, the base's product can end with it; elsewhere it is a kernel
of its own. The bits are the same both ways.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from turret.kernels.gpu.kv_write import KvWrite
from turret.kernels.gpu.nf4_matmul import nf4_matmul
from turret.kernels.gpu.nf4_rotate import nf4_rotate
from turret.kernels.gpu.rope_kv_write import rope_kv_write
from turret.kernels.gpu.shared.tuning import tuning
from turret.kernels.gpu.silu_mul import silu_mul
from turret.kernels.nf4_matmul import Nf4Matrix


class Epilogue(Protocol):
    """The operation that follows a projection."""

    def __call__(self, y: torch.Tensor) -> torch.Tensor:
        """Apply it to the finished result, ``[rows, out]``, by a kernel of its own."""
        ...

    def ends_product(self, bias: torch.Tensor | None, device: torch.device) -> bool:
        """Whether ``of_product`` can be called."""
        ...

    def of_product(
        self, x: torch.Tensor, first_row: int, weight: Nf4Matrix, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Apply it to the base's product with some rows.

        Args:
            x: Those rows, at most 64, ``[rows, in]``.
            first_row: The first one's place in the step.
            weight: The base's.
            bias: The base's, ``[out]``, or None.
        """
        ...


class GatedSilu:
    """The silu of the gates times the ups: ``[rows, out]`` → ``[rows, out / 2]``."""

    def __call__(self, y: torch.Tensor) -> torch.Tensor:
        return silu_mul(y)

    def ends_product(self, bias: torch.Tensor | None, device: torch.device) -> bool:
        return bias is None

    def of_product(
        self, x: torch.Tensor, first_row: int, weight: Nf4Matrix, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return nf4_matmul(x, weight, gated=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Turned queries, ``[rows, heads, head_dim]``; keys and values are stored.

    Attributes:
        write: How they turn and where they go.
        q_norm: RMSNorm weight of the query heads, ``[head_dim]``, or None.
        k_norm: The same for the key heads.
        eps: Of the norms.
    """

    write: KvWrite
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    eps: float = 1e-6

    @property
    def _has_norms(self) -> bool:
        # Each kernel has its own order for a norm's sum.
        return self.q_norm is not None or self.k_norm is not None

    def __call__(self, y: torch.Tensor) -> torch.Tensor:
        norms = {"q_norm": self.q_norm, "k_norm": self.k_norm}
        return rope_kv_write(y, self.write, eps=self.eps, **norms)

    def ends_product(self, bias: torch.Tensor | None, device: torch.device) -> bool:
        return not self._has_norms and self.write.divides(tuning(device).nf4_block_n)

    def of_product(
        self, x: torch.Tensor, first_row: int, weight: Nf4Matrix, bias: torch.Tensor | None
    ) -> torch.Tensor:
        write = self.write.rows(first_row, first_row + x.shape[-2])
        return nf4_rotate(x, weight, bias, write)
