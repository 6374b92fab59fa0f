"""Finds the outputs of a wide weight that may be the largest, reading half of its bytes."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from turret.kernels.cpu import native
from turret.kernels.cpu.threads import num_threads

# Most rows of a call. For more rows, the product with the weight itself is as fast.
MOST_ROWS = 16
_TILE = 32  # outputs
# Weights with fewer outputs are not worth a copy. AMX's tiles need at least 16 outputs.
_LEAST_OUTPUTS = 256
# At most one output in this many may remain after screening.
_MOST_SHARE = 8
# Most calls that are skipped after one that was of no use.
_MOST_PAUSE = 64
# Longer weights are rejected, because their products with a row may overflow fp32.
_MOST_LENGTH = 1e15


class _Screen(ctypes.Structure):
    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("spread", ctypes.c_double),
        ("length", ctypes.c_double),
    )


@dataclass(slots=True)
class _Patience:
    """Skips calls after one that was of no use: twice as many each consecutive time."""

    left_out: int = 0
    next_pause: int = 1
    was_told: bool = False

    def wants(self) -> bool:
        """Whether to make the next call."""
        if self.left_out:
            self.left_out -= 1
            return False
        if self.was_told:
            self.was_told, self.next_pause = False, 1
        return True

    def pause(self) -> None:
        """Note that the last call was of no use."""
        self.was_told = False
        self.left_out = self.next_pause
        self.next_pause = min(2 * self.next_pause, _MOST_PAUSE)


class Screen:
    """An int8 copy of a weight, and bounds of what it leaves out (``cpu/c/screen.c``).

    One thread only.

    Args:
        weight: ``serves`` it.

    Raises:
        ValueError: The weight is not finite.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        out_features, in_features = weight.shape
        tiles = -(-out_features // _TILE)
        self._codes = torch.empty(tiles * _TILE, in_features, dtype=torch.int8)
        self._scales = torch.empty(tiles * _TILE)
        facts = torch.empty(tiles, 2, dtype=torch.float64)
        native.functions().turret_screen_codes(
            weight.data_ptr(),
            *weight.shape,
            self._codes.data_ptr(),
            self._scales.data_ptr(),
            facts.data_ptr(),
            num_threads(),
        )
        spread, length = facts.amax(0).tolist()
        if not length <= _MOST_LENGTH:
            raise ValueError("the weight is not finite")
        self._native = _Screen(
            self._codes.data_ptr(), self._scales.data_ptr(), *weight.shape, spread, length
        )
        self._found = torch.empty(out_features // _MOST_SHARE, dtype=torch.int64)
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._patience = _Patience()

    @staticmethod
    def serves(weight: torch.Tensor) -> bool:
        """Whether there are kernels to screen the weight and to compute the remaining outputs."""
        is_here = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
        fits = weight.shape[0] >= _LEAST_OUTPUTS and weight.shape[1] % 2 == 0
        return is_here and fits and native.isa() not in {None, "baseline"}

    def outputs(self, x: torch.Tensor, slack: float = 0.0) -> torch.Tensor | None:
        """Find the outputs that may be the largest of some row.

        Semantics:
            y = x weightᵀ, rounded to bf16; every o with y[r, o] ≥ max(y[r]) − slack for some r is
            among them

        Args:
            x: ``[rows, in]`` bf16, at most ``MOST_ROWS``.
            slack: See above; at least 0.

        Returns:
            ``[outputs]`` int64, ascending, to be used before the next call; None where there are
            too many, a row is not finite, or calls before were of no use.
        """
        if not self._patience.wants():
            return None
        if x.stride(1) != 1:
            x = x.contiguous()
        shape = self._native.out_features, self._native.in_features
        functions = native.functions()
        size = functions.turret_screen_bytes(*shape, x.shape[0])
        if size > self._memory.shape[0]:
            self._memory = torch.empty(size, dtype=torch.uint8)
        count = functions.turret_screen(
            ctypes.addressof(self._native),
            x.data_ptr(),
            x.stride(0),
            x.shape[0],
            slack,
            self._memory.data_ptr(),
            self._found.data_ptr(),
            self._found.shape[0],
            num_threads(),
        )
        if count < 0:
            self._patience.pause()
            return None
        self._patience.was_told = True
        return self._found[:count]

    def pause(self) -> None:
        """Note that the last call's result was of no use; skip the next calls, at first one."""
        self._patience.pause()
