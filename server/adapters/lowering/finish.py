"""From a method's operators to a lowered adapter: one block of memory, checked, summed up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType

import torch

from turret.server.adapters.base import BaseModel
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.finite import all_finite
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.lowering.arena import in_one_block
from turret.server.adapters.lowering.lowered import Lowered
from turret.server.adapters.operators import AdapterOperators, ModuleOperators
from turret.server.adapters.peft_format.base_name import base_name_warning
from turret.server.adapters.peft_format.lora_checkpoint import LoraLayout
from turret.server.adapters.peft_format.prompt_checkpoint import EMBEDDINGS
from turret.server.adapters.soft_prompt import SoftPrompt


def finish(
    layout: LoraLayout,
    operators: Mapping[str, ModuleOperators],
    base: BaseModel,
    path: str,
    *,
    depends_on_base: bool,
) -> Lowered:
    """Adds the replaced biases, checks that nothing overflowed, and sums up.

    Raises:
        AdapterCheckpointError: A value is not finite in the serving dtype (names every module).
    """
    result = with_biases(operators, layout.biases, base)
    return finish_modules(
        result,
        base,
        path,
        ranks={module.rank for module in layout.modules},
        base_model=layout.base_model,
        warnings=layout.warnings,
        scalings={module.name: module.scaling for module in layout.modules},
        depends_on_base=depends_on_base or bool(layout.biases),
    )


def with_biases(
    operators: Mapping[str, ModuleOperators], biases: Mapping[str, torch.Tensor], base: BaseModel
) -> dict[str, ModuleOperators]:
    """Adds whole biases that replace those of the base, which has one wherever they do."""
    result = dict(operators)
    for name, bias in biases.items():
        served = base.modules[name].bias
        assert served is not None  # the layout checked it
        # The file holds the whole bias; operators add, so only the difference goes in.
        change = bias.to(torch.float32) - served.to(torch.float32).cpu()
        before = result.get(name, ModuleOperators())
        result[name] = replace(before, bias=change if before.bias is None else before.bias + change)
    return result


def finish_modules(
    operators: Mapping[str, ModuleOperators],
    base: BaseModel,
    path: str,
    *,
    ranks: Iterable[int],
    base_model: str,
    warnings: tuple[str, ...],
    scalings: Mapping[str, float] = MappingProxyType({}),
    depends_on_base: bool = True,
) -> Lowered:
    """Puts the operators into a block of memory, checks that nothing overflowed, and sums up.

    Raises:
        AdapterCheckpointError: A value is not finite in the serving dtype (names every module).
    """
    modules, is_finite = in_one_block(operators)
    if not is_finite:
        findings = Findings(path)
        for name, module in modules.items():
            if not all(map(all_finite, module.tensors())):
                findings.add(name, f"is not finite once scaled and rounded to {base.dtype}")
        findings.raise_if_any()
    return Lowered(
        operators=AdapterOperators(MappingProxyType(modules)),
        ranks=tuple(sorted(set(ranks))),
        target_modules=tuple(sorted({name.rsplit(".", 1)[-1] for name in operators})),
        base_model=base_model,
        warnings=warnings,
        scalings=scalings,
        depends_on_base=depends_on_base,
    )


def finish_prompt(prompt: SoftPrompt, checkpoint: AdapterCheckpoint, base: BaseModel) -> Lowered:
    """Checks that nothing overflowed, and sums up.

    Raises:
        AdapterCheckpointError: A value is not finite in the serving dtype.
    """
    findings = Findings(checkpoint.path)
    if not all(map(all_finite, prompt.tensors())):
        findings.add(EMBEDDINGS, f"is not finite once rounded to {base.dtype}")
    findings.raise_if_any()
    base_model = checkpoint.config.get("base_model_name_or_path") or ""
    warning = base_name_warning(base_model, base.name)
    is_prefix = prompt.prefix is not None
    return Lowered(
        operators=AdapterOperators({}, prompt),
        ranks=(),
        target_modules=(),
        base_model=base_model,
        warnings=(warning,) if warning else (),
        num_soft_tokens=0 if is_prefix else prompt.num_positions,
        num_prefix_positions=prompt.num_positions if is_prefix else 0,
        depends_on_base=False,
    )
