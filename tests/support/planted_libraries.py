"""Fake libraries with products that violate the guarantee of equal bits, each in a different way.

``plant`` replaces torch's products with one of them. Affected rows are summed in another order, as
by another kernel of a real library. Rows of ``F.linear`` are multiplied one by one, so that this
machine's own library adds no other violations.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

Spoils = Callable[[int], list[bool]]
_calls = itertools.count()

# Number of rows → the rows that get different bits.
LIBRARIES: dict[str, Spoils] = {
    "others for 8 rows than for 16": lambda rows: [rows < 16] * rows,
    "others for odd places": lambda rows: [i % 2 == 1 for i in range(rows)],
    "others for the last rows": lambda rows: [i >= rows - rows % 6 for i in range(rows)],
    "others with two threads": lambda rows: [rows > 3 and torch.get_num_threads() == 2] * rows,
    "others for rows in company": lambda rows: [rows > 1] * rows,
    "others every time": lambda rows: [next(_calls) % 3 == 0] * rows,
}

_linear, _mm, _bmm = F.linear, torch.mm, torch.bmm


def plant(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    """Multiply by one of ``LIBRARIES`` until the test ends."""
    spoils = LIBRARIES[library]

    def linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return _spoilt(_each_row(x, w), _each_row(x.flip(1), w.flip(1)), spoils)

    def mm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return _spoilt(_mm(x, w), _mm(x.flip(1), w.flip(0)), spoils)

    def bmm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        right, wrong = _bmm(x, w), _bmm(x.flip(2), w.flip(1))
        return torch.stack([_spoilt(*pair, spoils) for pair in zip(right, wrong, strict=True)])

    monkeypatch.setattr(F, "linear", linear)
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "bmm", bmm)


def _each_row(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.cat([_linear(x[:0], w), *(_linear(row[None], w) for row in x)])


def _spoilt(right: torch.Tensor, wrong: torch.Tensor, spoils: Spoils) -> torch.Tensor:
    chosen = torch.tensor(spoils(right.shape[0]), dtype=torch.bool).unsqueeze(1)
    return torch.where(chosen, wrong, right)
