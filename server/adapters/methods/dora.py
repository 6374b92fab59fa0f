"""DoRA (arXiv 2402.09353): ``y = g ⊙ (W x + s·B A x) + b`` with ``g = m / ‖W + s·B A‖_row``.

As operators: gain ``g`` on the bias-free base result, and a low-rank update whose ``B`` is scaled
by ``s·g``. ``W`` is the weight actually served, so the norms belong to this base and are computed
at load, never taken from elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from turret.server.adapters.base import BaseModel
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.lowering.finish import finish
from turret.server.adapters.lowering.low_rank import fold
from turret.server.adapters.lowering.lowered import Lowered
from turret.server.adapters.operators import ModuleOperators
from turret.server.adapters.peft_format.lora_checkpoint import LoraModule, read_lora_layout
from turret.server.adapters.peft_format.lora_rules import LORA_RULES

# Rows of W + sBA held at once: 1024 x 14336 in fp32 is 59 MB.
_ROWS_PER_BLOCK = 1024


class DoraMethod:
    name = "dora"
    peft_types = frozenset({"LORA"})
    rules = LORA_RULES

    def accepts(self, config: Mapping[str, Any]) -> bool:
        return config.get("use_dora") is True

    def lower(
        self, checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None
    ) -> Lowered:
        layout = read_lora_layout(checkpoint, base, max_rank)
        operators = {}
        for module in layout.modules:
            # One dequantised weight at a time: it is dropped before the next is made.
            gain = dora_gain(module, base.modules[module.name].dequantize())
            operators[module.name] = ModuleOperators(
                low_rank=fold(module, base.dtype, gain), gain=gain
            )
        return finish(layout, operators, base, checkpoint.path, depends_on_base=True)


def dora_gain(module: LoraModule, weight: torch.Tensor) -> torch.Tensor:
    """``m / ‖W + s·B A‖`` per output row.

    Args:
        module: With a magnitude.
        weight: The served weight, ``[out_features, in_features]``, fp32; not modified.

    Returns:
        ``[out_features]``, fp32, on the CPU. Rows of norm 0 give inf or NaN, which the caller
        rejects.
    """
    assert module.magnitude is not None
    wide = torch.promote_types(weight.dtype, torch.float32)
    a, b = (factor.to(weight.device, wide) for factor in (module.a, module.b))
    norms = []
    for start in range(0, weight.shape[0], _ROWS_PER_BLOCK):
        rows = slice(start, start + _ROWS_PER_BLOCK)
        merged = torch.addmm(weight[rows].to(wide), b[rows], a, alpha=module.scaling)
        norms.append(torch.linalg.vector_norm(merged, dim=1, dtype=torch.float64))
    norm = torch.cat(norms).cpu()
    return (module.magnitude.to(torch.float64) / norm).to(torch.float32)


METHOD = DoraMethod()
