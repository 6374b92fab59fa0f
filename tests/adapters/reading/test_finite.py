"""A NaN or Inf is found at any position; the largest finite values are accepted."""

from __future__ import annotations

import pytest
import torch

from turret.server.adapters.checkpoint.reader import DTYPES, all_finite


@pytest.mark.parametrize(
    "dtype", [d for name in DTYPES.values() if (d := getattr(torch, name)).is_floating_point]
)
@pytest.mark.parametrize("size", [1, 2, 7, 63, 64, 65, 1000])
def test_a_non_finite_value_is_found_at_every_position(dtype: torch.dtype, size: int) -> None:
    limits = torch.finfo(dtype)
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensor[0], tensor[-1] = limits.max, limits.min
    assert all_finite(tensor)
    for place in range(size):
        for value in (float("nan"), float("inf"), float("-inf")):
            changed = tensor.clone()
            changed[place] = value
            assert not all_finite(changed), (place, value)


def test_shapes_do_not_matter() -> None:
    assert all_finite(torch.empty(0, 3))
    assert all_finite(torch.tensor(1.0))
    assert not all_finite(torch.tensor(float("nan")))
    assert not all_finite(torch.full((3, 4), float("inf")).T[1:])
