"""The functions with which methods make operators: each returns one operator of a module.

A piece is fp32 or wider, and is rounded once, to the serving dtype, when the module is assembled.
Methods make operators only with these functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from turret.lazy_torch import torch
from turret.server.adapters.base import WeightRows
from turret.server.adapters.lowering.components import gate_of, query_score
from turret.server.adapters.operators.adapter_operators import ModuleOperators
from turret.server.adapters.operators.circulant import Circulant
from turret.server.adapters.operators.dense import Dense
from turret.server.adapters.operators.gate import GivenScore, PrototypeScore, QueryScore
from turret.server.adapters.operators.hadamard import Hadamard
from turret.server.adapters.operators.input_blocks import InputBlocks
from turret.server.adapters.operators.kronecker import Kronecker
from turret.server.adapters.operators.low_rank import LowRank
from turret.server.adapters.operators.modulated_base import ModulatedBase
from turret.server.adapters.operators.operator import Operator
from turret.server.adapters.operators.pair_rotation import PairRotation
from turret.server.adapters.operators.sparse import Sparse
from turret.server.adapters.operators.vectors import Bias, Gain, InputGain

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


Score = QueryScore | PrototypeScore | GivenScore

# Elements of ``b`` folded at once: 1 MB in fp32. Larger temporaries are returned to the system
# after every adapter, and touching their memory anew took a quarter of the time.
_BATCH_ELEMENTS = 1 << 18


class Factors(NamedTuple):
    """``s·B A`` of one module: ``a`` ``[rank, in_features]``, ``b`` ``[out_features, rank]``."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


@dataclass(frozen=True, slots=True)
class Piece:
    """One operator of a module.

    Attributes:
        make: Makes the operator in the serving dtype.
        factors: The file's own factors of a low-rank update, or None. Those of all modules are
            rounded together, which is faster.
        scaling: The scaling that was folded into ``b`` of a LoRA.
    """

    make: Callable[[torch.dtype], Operator]
    factors: Factors | None = None
    scaling: float | None = None


def low_rank(a: torch.Tensor, b: torch.Tensor) -> Piece:
    """``Δ(x) = b (a x)``, from ``[rank, in]`` and ``[out, rank]``."""
    return Piece(lambda dtype: _fold(a, b, 1.0, dtype))


def scaled_low_rank(
    a: torch.Tensor, b: torch.Tensor, scaling: float, gain: torch.Tensor | None = None
) -> Piece:
    """``Δ(x) = gain ⊙ scaling · b (a x)`` of LoRA and its variants; records the scaling."""
    return Piece(
        lambda dtype: _fold(a, b, scaling, dtype, gain),
        factors=Factors(a, b, scaling) if gain is None else None,
        scaling=scaling,
    )


def modulated(a: torch.Tensor, b: torch.Tensor) -> Piece:
    """``Δ(x) = (W ⊙ b a) x``, from ``[rank, in]`` and ``[out, rank]``."""

    def make(dtype: torch.dtype) -> ModulatedBase:
        factors = _fold(a, b, 1.0, dtype)
        return ModulatedBase(factors.a, factors.b)

    return Piece(make)


def hadamard(
    w1a: torch.Tensor, w1b: torch.Tensor, w2a: torch.Tensor, w2b: torch.Tensor, scaling: float
) -> Piece:
    """``Δ(x) = scaling · ((w1a w1b) ⊙ (w2a w2b)) x``."""

    def make(dtype: torch.dtype) -> Hadamard:
        scaled = (w1a.to(torch.promote_types(dtype, torch.float32)) * scaling).to(dtype)
        return Hadamard(scaled.contiguous(), *(t.to(dtype).contiguous() for t in (w1b, w2a, w2b)))

    return Piece(make)


def kronecker(w1: torch.Tensor, w2: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> Piece:
    """``Δ(x) = kron(w1, w2) x``; ``w2`` may be given as a product of two."""

    def make(dtype: torch.dtype) -> Kronecker:
        first, *rest = (
            t.to(dtype).contiguous() for t in (w1, *(w2 if isinstance(w2, tuple) else (w2,)))
        )
        return Kronecker(first, rest[0] if len(rest) == 1 else (rest[0], rest[1]))

    return Piece(make)


def circulant(kernel: torch.Tensor) -> Piece:
    """A circulant matrix per block, from ``[out / b, in / b, b]``."""
    return Piece(lambda dtype: Circulant(kernel.to(dtype).contiguous()))


def dense(weight: torch.Tensor) -> Piece:
    """``Δ(x) = weight x``, as large as the module's own weight."""
    return Piece(lambda dtype: Dense(weight.to(dtype).contiguous()))


def sparse(
    rows: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, shape: tuple[int, int]
) -> Piece:
    """Entries of a weight ``[out, in]``, in any order; those of one place are added up."""
    return Piece(lambda dtype: _sparse_of(rows, columns, values, shape, dtype))


def input_blocks(change: torch.Tensor) -> Piece:
    """The base multiplies ``x + D x``, from the blocks of ``D``, ``[blocks, size, size]``."""
    return Piece(lambda dtype: InputBlocks(change.to(dtype).contiguous()))


def pairs(sine: torch.Tensor, group: int) -> Piece:
    """``Δ(x)_o = sine_o (W x)_p(o)``: partners within groups of outputs are added."""
    return Piece(lambda _: PairRotation(_single(sine), group))


def gain(values: torch.Tensor) -> Piece:
    """``y = values ⊙ (W x)``, on the base's result without its bias."""
    return Piece(lambda _: Gain(_single(values)))


def input_gain(values: torch.Tensor) -> Piece:
    """The base multiplies ``values ⊙ x``."""
    return Piece(lambda _: InputGain(_single(values)))


def bias(values: torch.Tensor) -> Piece:
    """Added to the base's bias."""
    return Piece(lambda _: Bias(_single(values)))


def gate(updates: Sequence[LowRank | None], score: Score) -> Piece:
    """Low-rank updates of components, weighted token by token; a None changes nothing here."""
    return Piece(lambda _: gate_of(updates, lambda b: score))


def gate_by_query(
    updates: Sequence[LowRank | None], query: torch.Tensor, keys: torch.Tensor
) -> Piece:
    """A gate over components with scores ``(query x) · (keys Δ_k(x))``."""
    return Piece(lambda dtype: gate_of(updates, lambda b: query_score(query, keys, b, dtype)))


def _single(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1).to(torch.float32)


def _fold(
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


def _fold_all(factors: Mapping[str, Factors], dtype: torch.dtype) -> dict[str, LowRank]:
    """``_fold`` without gains, for all modules of an adapter; one call does all of one shape.

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


def _sparse_of(
    rows: torch.Tensor,
    columns: torch.Tensor,
    values: torch.Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Sparse:
    """Sorts entries by place, adds up those of one place and rounds once.

    Args:
        rows: Outputs, ``[n]``, integers.
        columns: Inputs, ``[n]``, integers.
        values: ``[n]``, any float dtype, the scaling in them.
        shape: Shape of the weight; every place is inside it.
        dtype: Serving dtype.
    """
    flat = rows.to(torch.int64) * shape[1] + columns.to(torch.int64)
    places, order = flat.unique(return_inverse=True)
    wide = torch.promote_types(values.dtype, torch.float32)
    summed = torch.zeros(len(places), dtype=wide).index_add_(0, order, values.to(wide))
    outputs = places // shape[1]
    starts = torch.searchsorted(outputs, torch.arange(shape[0] + 1))
    return Sparse(
        values=summed.to(dtype),
        columns=(places % shape[1]).to(torch.int32).to(torch.uint16),
        row_starts=starts.to(torch.int32),
    )


class Assembly:
    """Assembles modules; each operator is rounded as soon as it is made, if possible."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        # A None marks a low-rank update that is rounded later with those of other modules.
        self._made: dict[str, list[Operator | None]] = {}
        self._factors: dict[str, Factors] = {}
        self.scalings: dict[str, float] = {}

    def add(self, name: str, pieces: Piece | Iterable[Piece]) -> None:
        """Adds the operators of a module; without any, the module is unchanged."""
        made: list[Operator | None] = []
        for piece in [pieces] if isinstance(pieces, Piece) else pieces:
            made.append(piece.make(self._dtype) if piece.factors is None else None)
            if piece.factors is not None:
                self._factors[name] = piece.factors
            if piece.scaling is not None:
                self.scalings[name] = piece.scaling
        if made:
            self._made[name] = made

    def modules(self, order: Iterable[str] | None = None) -> dict[str, ModuleOperators]:
        """All modules, in the given order or else in the order in which they were added."""
        for name, update in _fold_all(self._factors, self._dtype).items():
            made = self._made[name]
            made[made.index(None)] = update
        names = self._made if order is None else [name for name in order if name in self._made]
        return {name: ModuleOperators(*self._made[name]) for name in names}
