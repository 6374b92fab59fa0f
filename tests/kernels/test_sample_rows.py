"""Triton's ``sample_rows``, compared with a sorted float64 reference over all uniform numbers.

Planted faults, and the number of tests that fail for each of them (tried by hand):

- tokens exactly at the limit left out: 3
- ties not cut: 4
- the count of ties not carried from block to block: 4
- top-p of all mass, not of the rest after top-k: 2
- running mass not carried from block to block: 10
- the last of equal tokens: 1
- no fallback for rounded sums: 1
- temperature left out: 2
- min-p left out: 3
- one tie too few for top-p: 4

If NaN is not treated as infinitely far away, no test fails, because the bits of a positive NaN are
larger than those of infinity.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kernel_traffic import DEVICE

from turret.kernels.gpu.sample_rows import sample_rows
from turret.kernels.gpu.tables import SamplingTable

INF = float("inf")
# The number of uniform numbers, each of which takes a while in the interpreter.
COUNT = 5
# Size of a vocabulary that takes more than two blocks and is no power of two.
VOCAB = 150


def draw(logits: torch.Tensor, rows: list[tuple[float, float, float, float, float]]) -> list[int]:
    table = SamplingTable(len(rows) + 3, DEVICE)
    table.load([number for row in rows for number in row])
    tokens = torch.full((len(rows) + 2,), -7, dtype=torch.int64, device=DEVICE)
    sample_rows(logits, table.buffer, tokens)
    assert tokens[len(rows) :].tolist() == [-7, -7], "more rows than there are"
    return tokens[: len(rows)].tolist()


def how(
    uniform: float,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> tuple[float, float, float, float, float]:
    """A row of the table.

    Tokens are kept by the distance of their scaled logits from the largest. A probability of
    ``min_p`` times the largest has the distance -log(min_p).
    """
    distance = 0.0 - math.log(min_p) if min_p else INF
    return uniform, temperature, top_p, distance, float(top_k)


def swept(logits: torch.Tensor, **params: Any) -> list[int]:
    """The token for each of ``COUNT`` uniform numbers, one per row."""
    rows = [how((i + 0.5) / COUNT, **params) for i in range(COUNT)]
    return draw(logits.expand(COUNT, -1), rows)


def exact(logits: torch.Tensor, **params: Any) -> torch.Tensor:
    """The probabilities in float64, by sorting; excluded tokens have 0."""
    _, temperature, top_p, distance, top_k = how(0.0, **params)
    scaled = logits.double() / temperature
    # The order is stable: of equal tokens, the lower id comes first.
    order = scaled.argsort(descending=True, stable=True)
    p = scaled.softmax(-1)[order]
    if top_k:
        p[int(top_k) :] = 0.0
        p = p / p.sum()
    before = p.cumsum(0) - p
    p[(before >= top_p) & (torch.arange(len(p)) > 0)] = 0.0
    p[scaled[order] < scaled.max() - distance] = 0.0
    return torch.zeros_like(p).index_copy_(0, order, p / p.sum())


PARAMS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"top_k": 5},
    {"top_k": 149},
    {"top_p": 0.6},
    {"top_p": 0.999},
    {"min_p": 0.2},
    {"top_k": 12, "top_p": 0.7, "temperature": 1.4},
    {"top_k": 30, "top_p": 0.95, "min_p": 0.05},
]


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_every_uniform_number_selects_its_token(params: dict[str, Any]):
    torch.manual_seed(3)
    logits = torch.randn(VOCAB) * 2
    found, ends = swept(logits.to(DEVICE), **params), exact(logits, **params).cumsum(0)
    for i, token in enumerate(found):
        uniform = (i + 0.5) / COUNT
        low = 0.0 if token == 0 else float(ends[token - 1])
        assert low - 1e-5 <= uniform <= float(ends[token]) + 1e-5
        assert float(ends[token]) > low, "a token that was filtered out"


@pytest.mark.parametrize(
    "params", [{"top_k": 4}, {"top_p": 0.31}, {"top_k": 6, "top_p": 0.45}, {"min_p": 1.0}], ids=str
)
def test_the_first_of_equal_tokens_are_kept(params: dict[str, Any]):
    """The ten likeliest tokens are equal and lie in two blocks; 100 others are less likely."""
    logits = torch.full((110,), -1.0)
    best = torch.tensor([3, 7, 20, 60, 61, 66, 70, 90, 100, 109])
    logits[best] = 2.0
    kept = exact(logits, **params).nonzero().flatten().tolist()
    rows = [how(uniform, **params) for uniform in (0.0, 0.4, 0.7, 0.999)]
    found = draw(logits.to(DEVICE).expand(4, -1), rows)
    assert set(found) <= set(kept)
    assert (found[0], found[-1]) == (kept[0], kept[-1])


def test_equal_tokens_below_the_likeliest_are_cut_too():
    logits = torch.full((90,), -3.0)
    logits[50], logits[[10, 30, 70, 80]] = 3.0, 2.5
    found = set(swept(logits.to(DEVICE), top_k=3))
    assert found == {50, 10, 30}
    # Token 50 has a mass of 1 and each of the other four 0.61, out of 3.43 in total.
    assert set(swept(logits.to(DEVICE), top_k=5, top_p=0.6)) == {50, 10, 30}


def test_a_vocabulary_of_one():
    rows = [how(0.5, **params) for params in PARAMS]
    assert set(draw(torch.randn(len(rows), 1, device=DEVICE), rows)) == {0}


def test_greedy_rows_and_rows_without_a_possible_token():
    torch.manual_seed(0)
    logits = torch.randn(5, 150).to(DEVICE)
    logits[1, [20, 130]] = 9.0
    logits[2] = -INF
    logits[3, :149] = -INF
    logits[4] = float("nan")
    # NaN of both signs between other tokens.
    logits[0, ::3] = float("nan")
    logits[0, 1::3] = torch.tensor([-(1 << 22)], dtype=torch.int32).view(torch.float32).item()
    greedy = [how(0.7, temperature=0.0)] * 5
    tokens = draw(logits, greedy)
    assert tokens[0] == int(logits[0].nan_to_num(-INF).argmax())
    assert tokens[1:4] == [20, 0, 149]
    sampled = draw(logits, [how(0.999999)] * 5)
    assert sampled[2:4] == [0, 149]
    assert tokens[0] % 3 == sampled[0] % 3 == 2
    assert all(0 <= token < 150 for token in tokens + sampled)


def test_the_extremes_of_the_uniform_numbers():
    logits = torch.full((1, 150), -INF)
    logits[0, [5, 64, 101]] = 0.0
    for uniform, token in ((0.0, 5), (1.0 - 2**-30, 101), (0.34, 64)):
        assert draw(logits.to(DEVICE), [how(uniform)]) == [token]
        assert draw(logits.to(DEVICE), [how(uniform, top_p=0.99999)]) == [token]


def test_a_row_does_not_depend_on_other_rows():
    torch.manual_seed(1)
    logits = (torch.randn(7, 150) * 3).to(DEVICE)
    rows = [how((i + 0.3) / 7, **PARAMS[i]) for i in range(7)]
    together = draw(logits, rows)
    assert together == [draw(logits[i : i + 1], rows[i : i + 1])[0] for i in range(7)]
    wide = torch.zeros(7, 400, device=DEVICE)
    wide[:, 20:170] = logits
    assert draw(wide[:, 20:170], rows) == together
