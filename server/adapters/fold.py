"""From a checkpoint's factors to operators: the scale goes into ``b`` with one rounding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch

from turret.server.adapters.base import BaseModel
from turret.server.adapters.block import in_one_block
from turret.server.adapters.finite import all_finite
from turret.server.adapters.lora_layout import LoraLayout, LoraModule
from turret.server.adapters.lowered import Lowered
from turret.server.adapters.operators import AdapterOperators, LowRank, ModuleOperators
from turret.server.adapters.violations import Violations

# Elements of ``b`` folded at once: 1 MB in fp32. Larger temporaries go back to the system after
# every adapter, and touching them anew took a quarter of the time.
_BATCH_ELEMENTS = 1 << 18


def fold_all(modules: Sequence[LoraModule], dtype: torch.dtype) -> dict[str, LowRank]:
    """``fold`` without gains, of all modules of an adapter; those of one shape are one call's work.

    Args:
        modules: Factors in the file's dtype.
        dtype: Serving dtype.

    Returns:
        By module name; views of anything until ``finish_modules`` copies them into a block.
    """
    alike: dict[tuple[object, ...], list[LoraModule]] = {}
    for module in modules:
        like = (module.a.shape, module.a.dtype, module.b.shape, module.b.dtype, module.scaling)
        alike.setdefault(like, []).append(module)
    folded: dict[str, LowRank] = {}
    for group in alike.values():
        size = max(1, _BATCH_ELEMENTS // max(1, group[0].b.numel()))
        for start in range(0, len(group), size):
            batch = group[start : start + size]
            a: Sequence[torch.Tensor] = [module.a for module in batch]
            if a[0].dtype != dtype:
                a = torch.stack(list(a)).to(dtype).unbind()
            b = torch.stack([module.b for module in batch])
            # A product of 16-bit values with a number is an fp32 one that is rounded once.
            b = b if b.dtype == dtype else b.to(_wide(dtype))
            b = b.mul_(batch[0].scaling).to(dtype).transpose(1, 2).contiguous()
            for module, left, right in zip(batch, a, b.unbind(), strict=True):
                folded[module.name] = LowRank(left, right)
    return {module.name: folded[module.name] for module in modules}


def fold(module: LoraModule, dtype: torch.dtype, gain: torch.Tensor | None = None) -> LowRank:
    """Scales ``b`` (and multiplies its rows by ``gain``) in fp32 and rounds once to ``dtype``.

    Args:
        module: Factors in the file's dtype.
        dtype: Serving dtype.
        gain: ``[out_features]`` fp32, or None.
    """
    wide = _wide(dtype)
    b = module.b.to(wide) * module.scaling
    if gain is not None:
        b = b * gain.to(wide)[:, None]
    return LowRank(a=module.a.to(dtype).contiguous(), b=b.T.to(dtype).contiguous())


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


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
        violations = Violations()
        for name, module in modules.items():
            if not all(map(all_finite, module.tensors())):
                violations.add(name, f"is not finite once scaled and rounded to {base.dtype}")
        violations.raise_if_any(path)
    return Lowered(
        operators=AdapterOperators(MappingProxyType(modules)),
        ranks=tuple(sorted(set(ranks))),
        target_modules=tuple(sorted({name.rsplit(".", 1)[-1] for name in operators})),
        base_model=base_model,
        warnings=warnings,
        scalings=scalings,
        depends_on_base=depends_on_base,
    )
