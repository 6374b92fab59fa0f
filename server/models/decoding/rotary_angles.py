"""Cosines and sines of positions, made once.

A library's sine may round by where an element lies in a vector, and a position's place in the step
changes with the batch. So positions are computed in blocks that are always the same, and looked up.
"""

from __future__ import annotations

import torch

_BLOCK = 1024


class RotaryAngles:
    """The rotary angles of a model (RoFormer, arXiv 2104.09864).

    Args:
        inv_freq: Angle per position, ``[head_dim / 2]`` fp32.
        scaling: Multiplied into cosines and sines.
    """

    def __init__(self, inv_freq: torch.Tensor, scaling: float) -> None:
        self._inv_freq, self._scaling = inv_freq, scaling
        self._cos = self._sin = inv_freq.new_empty(0, inv_freq.shape[0])

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, ``[rows, head_dim / 2]`` fp32, of positions ``[rows]`` int64."""
        if positions.device.type != "cpu":
            return self._make(positions)
        most = int(positions.max()) if positions.numel() else 0
        while self._cos.shape[0] <= most:
            start = self._cos.shape[0]
            cos, sin = self._make(torch.arange(start, start + _BLOCK))
            self._cos, self._sin = torch.cat((self._cos, cos)), torch.cat((self._sin, sin))
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)

    def _make(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        phases = positions[:, None].float() * self._inv_freq
        return phases.cos() * self._scaling, phases.sin() * self._scaling
