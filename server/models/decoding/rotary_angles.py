"""Cosines and sines of positions, made once.

A library's sine may round by where an element lies in a vector, and a position's place in the step
changes with the batch. So positions are computed in blocks that are always the same, and looked up.
"""

from __future__ import annotations

import math

import torch

from turret.server.models.decoding.arch import LONG, QueryGrowth, Rope

_BLOCK = 1024
Angles = tuple[torch.Tensor, torch.Tensor]


class RotaryAngles:
    """The rotary angles of a kind of layer (RoFormer, arXiv 2104.09864).

    Args:
        rope: See there.
        device: Where the positions are.
    """

    def __init__(self, rope: Rope, device: torch.device) -> None:
        self._all = _Angles(rope.inv_freq.to(device), rope.scaling)
        self._long = None
        if rope.long_inv_freq is not None:
            self._long = _Angles(rope.long_inv_freq.to(device), rope.scaling)

    def at(self, positions: torch.Tensor) -> Angles:
        """Cosines and sines, ``[rows, pairs]`` fp32.

        Args:
            positions: ``[rows]`` int64; those of long sequences are ``LONG`` more.
        """
        if self._long is None:
            return self._all.at(positions)
        is_long = (positions >= LONG).unsqueeze(1)
        positions = positions % LONG
        both = zip(self._long.at(positions), self._all.at(positions), strict=True)
        cos, sin = (torch.where(is_long, long, short) for long, short in both)
        return cos, sin


class _Angles:
    """The angles of one set of frequencies."""

    def __init__(self, inv_freq: torch.Tensor, scaling: float) -> None:
        self._inv_freq, self._scaling = inv_freq, scaling
        self._cos = self._sin = inv_freq.new_empty(0, inv_freq.shape[0])

    def at(self, positions: torch.Tensor) -> Angles:
        if positions.device.type != "cpu":
            return self._make(positions)
        most = int(positions.max()) if positions.numel() else 0
        while self._cos.shape[0] <= most:
            start = self._cos.shape[0]
            cos, sin = self._make(torch.arange(start, start + _BLOCK))
            self._cos, self._sin = torch.cat((self._cos, cos)), torch.cat((self._sin, sin))
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)

    def _make(self, positions: torch.Tensor) -> Angles:
        phases = positions[:, None].float() * self._inv_freq
        return phases.cos() * self._scaling, phases.sin() * self._scaling


class GrowingQueries:
    """``QueryGrowth`` of positions.

    Args:
        growth: See there.
        max_len: Most positions of a sequence.
        device: Where the positions are.
    """

    def __init__(self, growth: QueryGrowth, max_len: int, device: torch.device) -> None:
        steps = range(max_len // growth.length + 1)
        values = [1.0 + growth.beta * math.log(1.0 + step) for step in steps]
        self._length = growth.length
        self._values = torch.tensor(values, device=device)

    def at(self, positions: torch.Tensor) -> torch.Tensor:
        """The factors, ``[rows, 1, 1]`` fp32."""
        steps = (positions // self._length).clamp(max=len(self._values) - 1)
        return self._values.index_select(0, steps).view(-1, 1, 1)
