"""What methods make operators with: each function here gives one operator of a module. No torch.

A piece is rounded to the serving dtype when the module is put together, from fp32 or wider and
once. Methods know no other way to make an operator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from turret.server.basics.lazy_torch import torch

if TYPE_CHECKING:
    from turret.server.adapters.lowering.low_rank import Factors
    from turret.server.adapters.operators.adapter_operators import ModuleOperators
    from turret.server.adapters.operators.gate import GivenScore, PrototypeScore, QueryScore
    from turret.server.adapters.operators.low_rank import LowRank
    from turret.server.adapters.operators.operator import Operator

    Score = QueryScore | PrototypeScore | GivenScore


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
    from turret.server.adapters.lowering.low_rank import fold

    return Piece(lambda dtype: fold(a, b, 1.0, dtype))


def scaled_low_rank(
    a: torch.Tensor, b: torch.Tensor, scaling: float, gain: torch.Tensor | None = None
) -> Piece:
    """``Δ(x) = gain ⊙ scaling · b (a x)`` of LoRA and its variants; records the scaling."""
    from turret.server.adapters.lowering.low_rank import Factors, fold

    return Piece(
        lambda dtype: fold(a, b, scaling, dtype, gain),
        factors=Factors(a, b, scaling) if gain is None else None,
        scaling=scaling,
    )


def modulated(a: torch.Tensor, b: torch.Tensor) -> Piece:
    """``Δ(x) = (W ⊙ b a) x``, from ``[rank, in]`` and ``[out, rank]``."""
    from turret.server.adapters.lowering.low_rank import modulated

    return Piece(lambda dtype: modulated(a, b, dtype))


def hadamard(
    w1a: torch.Tensor, w1b: torch.Tensor, w2a: torch.Tensor, w2b: torch.Tensor, scaling: float
) -> Piece:
    """``Δ(x) = scaling · ((w1a w1b) ⊙ (w2a w2b)) x``."""
    from turret.server.adapters.operators.hadamard import Hadamard

    def make(dtype: torch.dtype) -> Hadamard:
        scaled = (w1a.to(torch.promote_types(dtype, torch.float32)) * scaling).to(dtype)
        return Hadamard(scaled.contiguous(), *(t.to(dtype).contiguous() for t in (w1b, w2a, w2b)))

    return Piece(make)


def kronecker(w1: torch.Tensor, w2: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> Piece:
    """``Δ(x) = kron(w1, w2) x``; ``w2`` may be given as a product of two."""
    from turret.server.adapters.operators.kronecker import Kronecker

    def make(dtype: torch.dtype) -> Kronecker:
        first, *rest = (
            t.to(dtype).contiguous() for t in (w1, *(w2 if isinstance(w2, tuple) else (w2,)))
        )
        return Kronecker(first, rest[0] if len(rest) == 1 else (rest[0], rest[1]))

    return Piece(make)


def circulant(kernel: torch.Tensor) -> Piece:
    """A circulant matrix per block, from ``[out / b, in / b, b]``."""
    from turret.server.adapters.operators.circulant import Circulant

    return Piece(lambda dtype: Circulant(kernel.to(dtype).contiguous()))


def dense(weight: torch.Tensor) -> Piece:
    """``Δ(x) = weight x``, as large as the module's own weight."""
    from turret.server.adapters.operators.dense import Dense

    return Piece(lambda dtype: Dense(weight.to(dtype).contiguous()))


def sparse(
    rows: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, shape: tuple[int, int]
) -> Piece:
    """Entries of a weight ``[out, in]``, in any order; those of one place are added up."""
    from turret.server.adapters.lowering.sparse import sparse_of

    return Piece(lambda dtype: sparse_of(rows, columns, values, shape, dtype))


def input_blocks(change: torch.Tensor) -> Piece:
    """The base multiplies ``x + D x``, from the blocks of ``D``, ``[blocks, size, size]``."""
    from turret.server.adapters.operators.input_blocks import InputBlocks

    return Piece(lambda dtype: InputBlocks(change.to(dtype).contiguous()))


def pairs(sine: torch.Tensor, group: int) -> Piece:
    """``Δ(x)_o = sine_o (W x)_p(o)``: partners within groups of outputs are added."""
    from turret.server.adapters.operators.pair_rotation import PairRotation

    return Piece(lambda _: PairRotation(_single(sine), group))


def gain(values: torch.Tensor) -> Piece:
    """``y = values ⊙ (W x)``, on the base's result without its bias."""
    from turret.server.adapters.operators.vectors import Gain

    return Piece(lambda _: Gain(_single(values)))


def input_gain(values: torch.Tensor) -> Piece:
    """The base multiplies ``values ⊙ x``."""
    from turret.server.adapters.operators.vectors import InputGain

    return Piece(lambda _: InputGain(_single(values)))


def bias(values: torch.Tensor) -> Piece:
    """Added to the base's bias."""
    from turret.server.adapters.operators.vectors import Bias

    return Piece(lambda _: Bias(_single(values)))


def gate(updates: Sequence[LowRank | None], score: Score) -> Piece:
    """Low-rank updates of components, weighted token by token; None adapts nothing here."""
    from turret.server.adapters.lowering.components import gate_of

    return Piece(lambda _: gate_of(updates, lambda b: score))


def gate_by_query(
    updates: Sequence[LowRank | None], query: torch.Tensor, keys: torch.Tensor
) -> Piece:
    """A gate over components with scores ``(query x) · (keys Δ_k(x))``."""
    from turret.server.adapters.lowering.components import gate_of, query_score

    return Piece(lambda dtype: gate_of(updates, lambda b: query_score(query, keys, b, dtype)))


def _single(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1).to(torch.float32)


class Assembly:
    """Assembles modules; each operator is rounded as soon as it is made, where possible."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        # A None marks a low-rank update that is rounded later with those of other modules.
        self._made: dict[str, list[Operator | None]] = {}
        self._factors: dict[str, Factors] = {}
        self.scalings: dict[str, float] = {}

    def add(self, name: str, pieces: Piece | Iterable[Piece]) -> None:
        """Adds the operators of a module; without any, the module is left alone."""
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
        from turret.server.adapters.lowering.low_rank import fold_all
        from turret.server.adapters.operators.adapter_operators import ModuleOperators

        for name, update in fold_all(self._factors, self._dtype).items():
            made = self._made[name]
            made[made.index(None)] = update
        names = self._made if order is None else [name for name in order if name in self._made]
        return {name: ModuleOperators(*self._made[name]) for name in names}
