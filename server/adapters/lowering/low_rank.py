"""From a checkpoint's factors to operators: the scale goes into ``b`` with one rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from turret.server.adapters.operators.low_rank import LowRank
from turret.server.adapters.operators.modulated_base import ModulatedBase

# Elements of ``b`` folded at once: 1 MB in fp32. Larger temporaries are returned to the system
# after every adapter, and touching their memory anew took a quarter of the time.
_BATCH_ELEMENTS = 1 << 18


class Factors(NamedTuple):
    """``s·B A`` of one module: ``a`` ``[rank, in_features]``, ``b`` ``[out_features, rank]``."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


def fold_all(factors: Mapping[str, Factors], dtype: torch.dtype) -> dict[str, LowRank]:
    """``fold`` without gains, of all modules of an adapter; those of one shape are one call's work.

    Args:
        factors: By module, in the file's dtype.
        dtype: Serving dtype.

    Returns:
        By module; views of anything until ``finish`` copies them into a block.
    """
    alike: dict[tuple[object, ...], list[str]] = {}
    for name, (a, b, scaling) in factors.items():
        alike.setdefault((a.shape, a.dtype, b.shape, b.dtype, scaling), []).append(name)
    folded: dict[str, LowRank] = {}
    for group in alike.values():
        size = max(1, _BATCH_ELEMENTS // max(1, factors[group[0]].b.numel()))
        for start in range(0, len(group), size):
            names = group[start : start + size]
            batch = [factors[name] for name in names]
            a_of: Sequence[torch.Tensor] = [one.a for one in batch]
            if a_of[0].dtype != dtype:
                a_of = torch.stack(list(a_of)).to(dtype).unbind()
            b = torch.stack([one.b for one in batch])
            # Torch multiplies 16-bit tensors by a number in fp32 and rounds the result once.
            b = b if b.dtype == dtype else b.to(torch.promote_types(dtype, torch.float32))
            b = b.mul_(batch[0].scaling).to(dtype).transpose(1, 2).contiguous()
            folded |= zip(names, map(LowRank, a_of, b.unbind()), strict=True)
    return {name: folded[name] for name in factors}


def fold(
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    dtype: torch.dtype,
    gain: torch.Tensor | None = None,
) -> LowRank:
    """Scales ``b`` (and multiplies its rows by ``gain``) in fp32 and rounds once to ``dtype``.

    Args:
        a: ``[rank, in_features]``, in the file's dtype.
        b: ``[out_features, rank]``, likewise.
        scaling: Factor of the update.
        dtype: Serving dtype.
        gain: ``[out_features]`` fp32, or None.
    """
    wide = torch.promote_types(dtype, torch.float32)
    b = b.to(wide) * scaling
    if gain is not None:
        b = b * gain.to(wide)[:, None]
    return LowRank(a=a.to(dtype).contiguous(), b=b.T.to(dtype).contiguous())


def modulated(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> ModulatedBase:
    """The factors of a modulated update, from ``[rank, in]`` and ``[out, rank]``, rounded once."""
    factors = fold(a, b, 1.0, dtype)
    return ModulatedBase(factors.a, factors.b)
