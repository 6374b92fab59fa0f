"""Assembles the operators of an adapter's modules, and helpers with which methods make them.

A method makes operators in fp32 or wider. They are rounded once, to the serving dtype, when the
module is assembled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from turret.lazy_torch import torch
from turret.server.adapters.base import WeightRows
from turret.server.adapters.operators.adapter_operators import ModuleOperators
from turret.server.adapters.operators.low_rank import LowRank
from turret.server.adapters.operators.operator import Operator
from turret.server.adapters.operators.sparse import Sparse

# Products of a base weight with a few vectors, block by block, on the weight's device.


# Elements of the weight held at once: 1024 x 14336 in fp32 is 59 MB.
_ELEMENTS_PER_BLOCK = 1 << 24


def weight_times(weight: WeightRows, right: torch.Tensor) -> torch.Tensor:
    """``W @ right``.

    Args:
        weight: ``[out_features, in_features]``; not modified.
        right: ``[in_features, count]``, fp32 or wider.

    Returns:
        ``[out_features, count]`` in ``right``'s dtype, on the CPU.
    """
    right = right.to(weight.device)
    return torch.cat([weight[rows].to(right.dtype) @ right for rows in _blocks(weight)]).cpu()


def times_weight(left: torch.Tensor, weight: WeightRows) -> torch.Tensor:
    """``left @ W``.

    Args:
        left: ``[count, out_features]``, fp32 or wider.
        weight: ``[out_features, in_features]``; not modified.

    Returns:
        ``[count, in_features]`` in ``left``'s dtype, on the CPU.
    """
    left = left.to(weight.device)
    total = left.new_zeros(left.shape[0], weight.shape[1])
    for rows in _blocks(weight):
        total += left[:, rows] @ weight[rows].to(left.dtype)
    return total.cpu()


def _blocks(weight: WeightRows) -> list[slice]:
    size = max(1, _ELEMENTS_PER_BLOCK // weight.shape[1])
    return [slice(start, start + size) for start in range(0, weight.shape[0], size)]


# Elements of ``b`` folded at once: 1 MB in fp32. Larger temporaries are returned to the system
# after every adapter, and touching fresh memory took a quarter of the time.
_BATCH_ELEMENTS = 1 << 18


class Scaled(NamedTuple):
    """``scaling · b (a x)`` of LoRA, with the file's factors ``[rank, in]`` and ``[out, rank]``.

    The factors of all modules are rounded together, which is faster. The scaling is recorded.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


# An operator of a module, as a method makes it.
Piece = Operator | Scaled


def low_rank(a: torch.Tensor, b: torch.Tensor) -> LowRank:
    """``Δ(x) = b (a x)``, from ``[rank, in]`` and ``[out, rank]``."""
    return LowRank(a, b.T)


def sparse(
    rows: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, shape: tuple[int, int]
) -> Sparse:
    """Entries of a weight ``[out, in]``, in any order.

    Entries at the same position are added up.
    """
    flat = rows.to(torch.int64) * shape[1] + columns.to(torch.int64)
    places, order = flat.unique(return_inverse=True)
    wide = torch.promote_types(values.dtype, torch.float32)
    summed = torch.zeros(len(places), dtype=wide).index_add_(0, order, values.to(wide))
    starts = torch.searchsorted(places // shape[1], torch.arange(shape[0] + 1))
    columns = (places % shape[1]).to(torch.int32).to(torch.uint16)
    return Sparse(summed, columns, starts.to(torch.int32))


def _rounded(factors: Mapping[str, Scaled], dtype: torch.dtype) -> dict[str, LowRank]:
    """Scales ``b`` of all modules in fp32 and rounds once, with one call for each shape.

    Args:
        factors: The factors by module, in the file's dtype.
        dtype: Serving dtype.

    Returns:
        The factors by module; they may be any views until ``finish`` copies them into a block.
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


class Assembly:
    """Assembles modules. Each operator is rounded as soon as it is made, if possible."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        # A None marks a low-rank update that is rounded later with those of other modules.
        self._made: dict[str, list[Operator | None]] = {}
        self._factors: dict[str, Scaled] = {}

    @property
    def scalings(self) -> dict[str, float]:
        """The scaling that was folded into ``b`` of a LoRA, by module."""
        return {name: factors.scaling for name, factors in self._factors.items()}

    def add(self, name: str, pieces: Piece | Iterable[Piece]) -> None:
        """Adds the operators of a module; without any, the module is unchanged."""
        made: list[Operator | None] = []
        for piece in [pieces] if isinstance(pieces, Operator | Scaled) else pieces:
            if isinstance(piece, Scaled):
                self._factors[name] = piece
            made.append(None if isinstance(piece, Scaled) else piece.rounded(self._dtype))
        if made:
            self._made[name] = made

    def modules(self, order: Iterable[str] | None = None) -> dict[str, ModuleOperators]:
        """All modules, in the given order or else in the order in which they were added."""
        for name, update in _rounded(self._factors, self._dtype).items():
            made = self._made[name]
            made[made.index(None)] = update
        names = self._made if order is None else [name for name in order if name in self._made]
        return {name: ModuleOperators(*self._made[name]) for name in names}
