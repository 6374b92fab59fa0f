"""The adapters and the shapes of traffic for kernel tests."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch

from turret.kernels.gpu.tables import RunOfRows, SegmentMember

RANKS = (1, 3, 8, 16, 64, 128)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter multiplies bf16 operands of tl.dot as raw integers and rounds to bf16 towards
# zero, so the tests use fp16, which is correct there.
HALF = torch.float16
DTYPES = [
    HALF,
    torch.float32,
    pytest.param(
        torch.bfloat16,
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(DEVICE.type != "cuda", reason="bf16 needs a GPU"),
        ],
    ),
]
# Maximum RMS of the error over the RMS of the reference. Rounding the result once causes up to
# 2.8e-4 in fp16 and 2.3e-3 in bf16; sums in another order add little.
MAX_ERROR = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def error_ratio(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS of the difference over that of the expected values; inf if a value is not finite."""
    difference = actual.double() - expected.double()
    if not torch.isfinite(difference).all():
        return float("inf")
    return float(difference.norm() / expected.double().norm().clamp_min(1e-30))


@dataclass(frozen=True)
class Pack:
    """Adapters side by side; slot 0 is neutral, slot ``k`` has ``ranks[k - 1]``.

    Attributes:
        bounds: The range of ranks of each slot.
        a: ``[pack_rank, slices, in]``.
        b: Per slice ``[pack_rank, out]``.
        slice_ranks: ``[slots, slices]`` int32.
        gain_delta: ``[slots, width]`` fp32.
        bias: ``[slots, width]`` fp32.
    """

    bounds: tuple[tuple[int, int], ...]
    a: torch.Tensor
    b: tuple[torch.Tensor, ...]
    slice_ranks: torch.Tensor
    gain_delta: torch.Tensor
    bias: torch.Tensor

    def mix(self, *weighted: tuple[int, float]) -> tuple[SegmentMember, ...]:
        """The members for ``(slot, weight)`` pairs, in the engine's form."""
        made = []
        for slot, weight in weighted:
            low, high = self.bounds[slot]
            made.append(SegmentMember(low, high if weight else low, slot, weight))
        return tuple(made)


def make_pack(
    inner: int, outs: Sequence[int], dtype: torch.dtype, ranks: Sequence[int] = RANKS
) -> Pack:
    """Random adapters; some have no update, or fewer ranks, in their first slice."""
    bounds, cursor = [(0, 0)], 0
    for rank in ranks:
        width = -(-rank // 8) * 8
        bounds.append((cursor, cursor + width))
        cursor += width
    slices, slots, width = len(outs), len(ranks) + 1, sum(outs)
    held = torch.zeros(slots, slices, dtype=torch.int32)
    a = torch.randn(cursor, slices, inner).div_(inner**0.5)
    b = [torch.randn(cursor, out) for out in outs]
    for slot, rank in enumerate(ranks, start=1):
        held[slot] = rank
        if slices > 1 and slot % 3 == 0:
            held[slot, 0] = 0
        elif slices > 1 and slot % 4 == 1:
            held[slot, 0] = rank // 2
        low, high = bounds[slot]
        for s in range(slices):
            # Memory past an adapter's own ranks must not be read.
            a[low + int(held[slot, s]) : high, s] = float("nan")
            b[s][low + int(held[slot, s]) : high] = float("nan")
    gain = torch.randn(slots, width).mul_(0.1)
    bias = torch.randn(slots, width)
    gain[0] = bias[0] = 0.0
    return Pack(
        tuple(bounds),
        a.to(DEVICE, dtype),
        tuple(slice_b.to(DEVICE, dtype) for slice_b in b),
        held.to(DEVICE),
        gain.to(DEVICE),
        bias.to(DEVICE),
    )


def traffic(pack: Pack) -> Iterator[tuple[str, list[RunOfRows], int]]:
    """Name, runs and number of rows of each traffic shape. Rows after the runs have no adapters."""
    draw = random.Random(7)
    slots = range(1, len(pack.bounds))

    def ones(mixes: Sequence[Sequence[tuple[int, float]]]) -> list[RunOfRows]:
        return [RunOfRows(i, i + 1, pack.mix(*mix)) for i, mix in enumerate(mixes)]

    yield "empty", [], 3
    yield "one row", ones([[(4, 1.0)]]), 1
    yield "distinct", ones([[(slot, 1.0)] for slot in slots]), len(slots)
    yield "identical", ones([[(3, 1.0)]] * 21), 21
    zipf = [min(int(1 / (1 - draw.random())), len(slots)) for _ in range(20)]
    yield "zipf", ones([[(slot, 1.0)] for slot in zipf]), 20
    yield "base only", [RunOfRows(0, 5, ())], 5
    mixed = [[(2, 1.0)], [], [(5, -1.5)], [], [], [(1, 0.5), (6, 2.0)]]
    yield "base rows between", ones(mixed), 7
    mixes = [
        [(1, 0.7), (2, -0.3)],
        [(4, 1.0), (3, -2.0), (1, 0.25)],
        [(2, 1.0), (1, 1.0), (5, -0.5), (4, 0.125)],
        [(2, -0.3), (1, 0.7)],
        [(3, 0.0), (2, 1.0)],
    ]
    yield "mixes", ones(mixes), len(mixes)
    for length in (15, 16, 17, 32, 33):
        runs = [RunOfRows(0, length, pack.mix((4, 1.0))), RunOfRows(length, length + 1, ())]
        yield f"run of {length}", runs, length + 1
    runs = [
        RunOfRows(0, 2, pack.mix((6, 1.0))),
        RunOfRows(2, 3, ()),
        RunOfRows(3, 40, pack.mix((5, 1.0), (3, -1.0))),
        RunOfRows(40, 41, pack.mix((6, 1.0))),
    ]
    yield "decode beside prefill", runs, 43


def update_in_float64(
    pack: Pack, runs: Sequence[RunOfRows], x: torch.Tensor, outs: Sequence[int]
) -> torch.Tensor:
    """``Σ_k w_k Δ_k(x)`` per row, ``[rows, sum(outs)]``, by plain loops."""
    total = torch.zeros(x.shape[0], sum(outs), dtype=torch.float64, device=x.device)
    for run in runs:
        rows = x[run.start : run.end].double()
        for c in run.members:
            if c.weight == 0.0:
                continue
            start = 0
            for s, out in enumerate(outs):
                stop = c.rank_start + int(pack.slice_ranks[c.slot, s])
                a = pack.a[c.rank_start : stop, s].double()
                b = pack.b[s][c.rank_start : stop].double()
                total[run.start : run.end, start : start + out] += c.weight * (rows @ a.T @ b)
                start += out
    return total


def rotated(
    heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, is_interleaved: bool
) -> torch.Tensor:
    """``[rows, heads, head_dim]`` in float64, with the first pairs of each head rotated."""
    pairs = cos.shape[1]
    if is_interleaved:
        first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    else:
        first, second = slice(0, pairs), slice(pairs, 2 * pairs)
    result = heads.double().clone()
    turn = torch.complex(cos.double(), sin.double())[:, None]
    both = torch.complex(result[..., first], result[..., second]) * turn
    result[..., first], result[..., second] = both.real, both.imag
    return result
