"""LoRA (arXiv 2106.09685) and rsLoRA (arXiv 2312.03732): ``Δ(x) = s·B A x``.

``s`` is alpha/r, or alpha/√r for rsLoRA, with each module's own r and alpha. A bias inside
``lora_B`` is scaled with it; biases that PEFT saved whole become differences to the base's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from turret.server.adapters.base import BaseModel
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.lowering.finish import finish
from turret.server.adapters.lowering.low_rank import fold_all
from turret.server.adapters.lowering.lowered import Lowered
from turret.server.adapters.operators import ModuleOperators
from turret.server.adapters.peft_format.lora_checkpoint import LoraModule, read_lora_layout
from turret.server.adapters.peft_format.lora_rules import LORA_RULES


class LoraMethod:
    name = "lora"
    peft_types = frozenset({"LORA"})
    rules = LORA_RULES

    def accepts(self, config: Mapping[str, Any]) -> bool:
        return config.get("use_dora") is not True

    def lower(
        self, checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None
    ) -> Lowered:
        layout = read_lora_layout(checkpoint, base, max_rank)
        folded = fold_all(layout.modules, base.dtype)
        operators = {
            module.name: ModuleOperators(low_rank=folded[module.name], bias=_scaled_bias(module))
            for module in layout.modules
        }
        return finish(layout, operators, base, checkpoint.path, depends_on_base=False)


def _scaled_bias(module: LoraModule) -> torch.Tensor | None:
    if module.lora_bias is None:
        return None
    return module.lora_bias.to(torch.float32) * module.scaling


METHOD = LoraMethod()
