"""From a checkpoint's factors to operators: the scale goes into ``b`` with one rounding."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from turret.server.adapters.operators import LowRank
from turret.server.adapters.peft_format.lora_checkpoint import LoraModule

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
