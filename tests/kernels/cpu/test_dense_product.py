"""The compiled product with a wide bf16 weight, compared with float64 and with each row alone.

Faults planted in the C code, and how many tests each one failed: inputs beyond the last 32 read
(4), two rows of three left (10), every other tile of rows left out (10), truncation to bf16 (2),
rows as far apart as they are long (10), the last output left out (10), a narrow tile's rows swapped
(8).
"""

from __future__ import annotations

import pytest
import torch
from kernel_traffic import error_ratio

from turret.kernels.cpu.products import dense_product, serves_dense

MAX_ERROR = 4e-3  # one rounding to bf16 makes up to 2.3e-3 of the RMS


@pytest.mark.skipif(
    not serves_dense(torch.empty(0, dtype=torch.bfloat16)), reason="no compiled products here"
)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("out_features", "in_features"), [(1, 8), (7, 32), (64, 33), (129, 95), (1003, 576)]
)
def test_rows_equal_float64_and_the_rows_alone(
    out_features: int, in_features: int, threads: int
) -> None:
    torch.manual_seed(out_features)
    weight = torch.randn(out_features, in_features).bfloat16()
    wide = torch.randn(23, in_features + 8).bfloat16()
    x = wide[:, 8:]
    exact = x.double() @ weight.double().T
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    alone = [dense_product(row[None], weight)[0] for row in x]
    found = [dense_product(x[:count], weight) for count in (1, 2, 3, 4, 5, 16, 22, 23)]
    torch.set_num_threads(before)
    for y in found:
        assert error_ratio(y, exact[: len(y)]) < MAX_ERROR
        assert torch.equal(y, torch.stack(alone[: len(y)]))


def test_unsupported_weights_are_not_served() -> None:
    assert not serves_dense(torch.empty(2, 2))
    assert not serves_dense(torch.empty(2, 2, dtype=torch.bfloat16, device="meta"))
