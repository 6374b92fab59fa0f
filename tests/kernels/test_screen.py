"""A screen keeps every output that may be the largest, for all weights and rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from turret.kernels import cpu as native
from turret.kernels.likeliest import MOST_ROWS, Screen
from turret.kernels.rows import row_linear

Make = Callable[[torch.Generator, int, int], torch.Tensor]


@pytest.fixture(params=[isa for isa in native.usable_isas() if isa != "baseline"], autouse=True)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    found = native.load(request.param)
    monkeypatch.setattr(native, "library", lambda: found)


def noise(generator: torch.Generator, out: int, size: int) -> torch.Tensor:
    return torch.randn(out, size, generator=generator)


def alike(generator: torch.Generator, out: int, size: int) -> torch.Tensor:
    """A weight with rows that differ by less than a code."""
    one = torch.randn(1, size, generator=generator)
    return one + 0.004 * torch.randn(out, size, generator=generator)


def of_all_sizes(generator: torch.Generator, out: int, size: int) -> torch.Tensor:
    scales = torch.logspace(-36, 3, out)[torch.randperm(out, generator=generator)]
    return scales.unsqueeze(1) * torch.randn(out, size, generator=generator)


def with_outliers(generator: torch.Generator, out: int, size: int) -> torch.Tensor:
    weight = 0.01 * torch.randn(out, size, generator=generator)
    weight[:, size // 3] = 4 * torch.randn(out, generator=generator)
    return weight


def with_zeros(generator: torch.Generator, out: int, size: int) -> torch.Tensor:
    weight = torch.randn(out, size, generator=generator)
    weight[::3] = 0
    return weight


def twice(generator: torch.Generator, out: int, size: int) -> torch.Tensor:
    weight = torch.randn(out, size, generator=generator)
    weight[out // 2 :] = weight[: out - out // 2].flip(0)
    return weight


MAKES: list[Make] = [noise, alike, of_all_sizes, with_outliers, with_zeros, twice]


def largest(x: torch.Tensor, weight: torch.Tensor, slack: float) -> set[int]:
    """The outputs that must remain, by the whole product."""
    y = row_linear(x, weight).double()
    found: set[int] = set()
    for row in y:
        found |= set((row >= row.max() - slack).nonzero().flatten().tolist())
    return found


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize(("out", "size"), [(256, 8), (300, 64), (1001, 576), (4097, 136)])
def test_the_screen_never_excludes_the_largest_output(make: Make, out: int, size: int) -> None:
    generator = torch.Generator().manual_seed(out + size)
    weight = make(generator, out, size).bfloat16()
    screen = Screen(weight)
    told = 0
    for rows in (1, 2, 3, 4, 5, 7, 8, 9, MOST_ROWS):
        for kind in range(4):
            x = torch.randn(rows, size, generator=generator)
            if kind == 1:
                x[:, size // 3] *= 300  # as in hidden states
            elif kind == 2:
                # Negated rows of ``alike``, so that all logits are below 0; else tiny inputs.
                x = -weight[:rows].float() if make is alike else x * 1e-20
            elif kind == 3:
                x = weight[torch.randint(out, (rows,), generator=generator)].float()
            for slack in (0.0, 0.25):
                x16 = x.bfloat16()
                found = None
                # After a useless call, the screen skips up to 64 calls.
                for _ in range(70):
                    if (found := screen.outputs(x16, slack)) is not None:
                        break
                if found is None:
                    continue
                told += 1
                ids = found.tolist()
                assert ids == sorted(set(ids))
                assert ids[-1] < out
                assert largest(x16, weight, slack) <= set(ids), (rows, kind, slack)
    assert told or make is alike


def test_the_screen_leaves_few_candidates() -> None:
    """The weight is noise, whose largest logits are the closest to each other."""
    generator = torch.Generator().manual_seed(1)
    weight = (0.1 * torch.randn(20_000, 576, generator=generator)).bfloat16()
    screen = Screen(weight)
    for _ in range(10):
        found = screen.outputs(torch.randn(1, 576, generator=generator).bfloat16())
        assert found is not None
        assert len(found) < 200


def test_rows_that_are_not_finite_are_not_screened() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(300, 64, generator=generator).bfloat16()
    for value in (float("nan"), float("inf"), float("-inf"), 1e38):
        x = torch.randn(3, 64, generator=generator).bfloat16()
        x[1, 5] = value
        assert Screen(weight).outputs(x) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_weight_that_is_not_finite_has_no_screen(value: float) -> None:
    weight = torch.randn(300, 64).bfloat16()
    weight[7, 3] = value
    with pytest.raises(ValueError, match="not finite"):
        Screen(weight)


def test_screening_becomes_rare_if_it_excludes_nothing() -> None:
    """If all outputs are alike, the screen excludes none, and soon skips most calls."""
    weight = torch.ones(512, 64).bfloat16()
    screen, x = Screen(weight), torch.ones(1, 64).bfloat16()
    tried = []
    original = native.functions().turret_screen

    class Counting:
        def __getattr__(self, name: str) -> object:
            return getattr(native.library(), name)

        def turret_screen(self, *arguments: object) -> int:
            tried.append(1)
            count: int = original(*arguments)
            return count

    counting = Counting()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "functions", lambda: counting)
        for _ in range(512):
            assert screen.outputs(x) is None
    assert 5 <= len(tried) <= 16


def test_sums_stay_within_their_32_bits() -> None:
    """All numbers of the rows, and all codes, have the maximum size."""
    size = 4096
    weight = torch.ones(256, size).bfloat16()
    weight[:128] = -1
    weight[200] = 1.25
    found = Screen(weight).outputs(torch.ones(1, size).bfloat16())
    assert found is not None
    assert 200 in found.tolist()
    assert not set(range(128)) & set(found.tolist())


def test_which_weights_can_be_screened() -> None:
    weight = torch.randn(512, 64)
    assert Screen.serves(weight.bfloat16())
    assert not Screen.serves(weight)
    assert not Screen.serves(weight[:100].bfloat16())
    assert not Screen.serves(weight[:, :60].bfloat16())
