"""``Δ(x) = g ⊙ W (D x)``: the base multiplies ``x + D x`` instead of ``x`` (OFT, BOFT).

``D`` is block-diagonal (arXiv 2306.07280, 2311.06243). With ``x`` read as a matrix with a row of
``b`` inputs per block, ``(D x)_n = x_n blocks_n``. ``g`` is the same adapter's gain in the module,
or 1: an adapter's gain does not scale the changes that other adapters make to the input.
"""

from __future__ import annotations

from dataclasses import dataclass

from turret.kernels.rows import row_product
from turret.lazy_torch import torch
from turret.server.adapters.operators import BaseRows, Operator, ServedWeight


@dataclass(frozen=True, slots=True)
class InputBlocks(Operator):
    """Adds a block-diagonal change to the input of a module; see the formula above.

    Attributes:
        blocks: ``[in / b, b, b]``, or ``[1, b, b]`` if all inputs share a block; serving dtype,
            contiguous. A rotation ``R`` is stored as ``R − I``, so that rounding is relative to the
            change.
    """

    name = "input_blocks"

    blocks: torch.Tensor

    @property
    def size(self) -> int:
        """Number of inputs in a block."""
        return self.blocks.shape[1]

    def changed(self, x: torch.Tensor) -> torch.Tensor:
        """``D x``, ``[rows, in]`` fp32."""
        rows = x.float().unflatten(1, (-1, self.size))
        columns = self.blocks.float().transpose(1, 2).contiguous()
        if len(columns) == 1:
            return row_product(rows.contiguous(), columns[0]).flatten(1)
        by_block = row_product(rows.transpose(0, 1).contiguous(), columns)
        return by_block.transpose(0, 1).flatten(1)

    def add(self, y: torch.Tensor, x: torch.Tensor, base: BaseRows, weight: float) -> None:
        change = base(self.changed(x).to(x.dtype)).float()
        y += weight * (change if base.gain is None else change * base.gain)

    def add_dense(self, total: torch.Tensor, served: ServedWeight, weight: float) -> None:
        scale = weight if served.gain is None else weight * served.gain[:, None]
        for number in range(total.shape[1] // self.size):
            columns = slice(number * self.size, (number + 1) * self.size)
            block = self.blocks[min(number, len(self.blocks) - 1)].float()
            total[:, columns] += scale * (served.weight[:, columns] @ block.T)
