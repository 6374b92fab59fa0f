"""Prefetches of the base's products: every factor once, before it is read.

Faults planted in the C code, and how many tests failed for each: no progress within a factor (10),
its start prefetched again (10), B as wide as A (9), A in B's place (9), every component beginning
at the same rank (2), a part beyond its component (9), a segment without components taken for the
next one (9), no limit to the reach (12), passed factors still prefetched (1), marks forgotten (10).
"""

from __future__ import annotations

import pytest
import torch

from turret.kernels import cpu as native
from turret.kernels.cpu import row_adapters
from turret.kernels.cpu.row_adapters import ModuleSizes, ModuleTable, RowAdapters, RowSegment

pytestmark = pytest.mark.skipif(native.library() is None, reason="there is no C compiler")

SIZES = [(192, 192), (192, 64), (192, 320), (320, 192)]
# The first modules of the layer's projections, and their numbers of modules.
PROJECTIONS = [(0, 3), (3, 1)]
LAYERS = 3
LINE = 64
Factors = dict[int, list[torch.Tensor]]  # module → A, B


@pytest.fixture(autouse=True)
def asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefetch as with any library but that for AMX."""
    monkeypatch.setattr(row_adapters, "isa", lambda: "avx512_bf16")


def make(rank: int, seed: int) -> tuple[ModuleTable, Factors]:
    """Random factors for most modules; 24 or more ranks take a few products to prefetch."""
    generator = torch.Generator().manual_seed(seed)
    table, factors = ModuleTable(LAYERS * len(SIZES)), Factors()
    for module in range(LAYERS * len(SIZES)):
        if (module + seed) % 5 == 0:
            continue
        inner, out = SIZES[module % len(SIZES)]
        a = torch.randn(rank, inner, generator=generator).bfloat16()
        b = torch.randn(rank, out, generator=generator).bfloat16()
        table.put(module, row_adapters.low_rank(a, b))
        factors[module] = [a, b]
    table.close()
    return table, factors


def lines_of(address: int, num_bytes: int) -> set[int]:
    """The numbers of the cache lines at the address and every 64 bytes after it."""
    return {address + at for at in range(0, num_bytes, LINE)}


def asked(
    adapters: RowAdapters, module: int, *, rows: int, part: int, parts: int, most: int
) -> list[tuple[int, int]]:
    """At most ``most`` pairs (address, bytes) that a thread prefetches during one product.

    The thread is number ``part`` of ``parts``. It prefetches the factors of as many modules as
    ``ModuleSizes.reach`` returns, the product's first module included.
    """
    lines = torch.zeros(most, 2, dtype=torch.int64)
    step = adapters.ahead(module).step
    count = native.functions().turret_ahead(step, module, rows, part, parts, lines.data_ptr(), most)
    return [(start, LINE * number) for start, number in lines[:count].tolist()]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("reach", [0, 2, 3, 4])
def test_every_factor_is_prefetched_once_and_in_time(
    threads: int, reach: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(ModuleSizes, "reach", lambda *_: reach)
    made = [make(rank, seed) for seed, rank in enumerate((1, 8, 40, 16))]
    sizes = ModuleSizes(SIZES, LAYERS)
    segments = [
        RowSegment(0, 1, [(made[0][0], 1.0)]),
        RowSegment(1, 2, []),
        RowSegment(2, 9, [(made[1][0], 1.0), (made[2][0], -0.5)]),
        RowSegment(12, 13, [(made[3][0], 1.0)]),
    ]
    rows = RowAdapters(segments, 3, sizes)
    done: list[set[int]] = [set() for _ in range(threads)]
    for layer in range(LAYERS):
        for first, count in PROJECTIONS:
            module = layer * len(SIZES) + first
            for part in range(threads):
                for address, size in asked(
                    rows, module, rows=8, part=part, parts=threads, most=10_000
                ):
                    lines = lines_of(address, size)
                    assert not lines & done[part]
                    done[part] |= lines
            all_asked = set().union(*done)
            for number in range(LAYERS * len(SIZES)):
                is_due = module <= number < module + count <= module + reach
                is_early = number >= module + reach
                for _, factors in made:
                    for tensor in factors.get(number, []):
                        own = lines_of(tensor.data_ptr(), tensor.nbytes)
                        if is_early:
                            assert not own & all_asked
                        elif is_due:
                            assert own <= all_asked
    if reach >= len(SIZES):
        for one, part in enumerate(done):
            for other in done[one + 1 :]:
                assert not part & other
        sizes_of_parts = [len(part) for part in done]
        assert max(sizes_of_parts) < 1.5 * min(sizes_of_parts)
