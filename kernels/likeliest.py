"""The likeliest allowed token of each row, and a screen that avoids computing most logits."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch

from turret.kernels import cpu as native
from turret.kernels.cpu import functions, has_kernels, num_threads

# Token masks restrict rows of logits to the tokens that may come next.


def apply_token_mask(logits: torch.Tensor, rows: torch.Tensor, words: torch.Tensor) -> None:
    """Exclude tokens of some rows, in place. Other rows are not touched.

    Semantics:
        logits[rows[i], t] = -inf if bit t % 32 of words[i, t // 32] is 0 or beyond the words

    Args:
        logits: ``[n, vocab]`` fp32, below infinity.
        rows: ``[rows]`` int64, distinct rows of ``logits``, on its device.
        words: ``[rows, at least 1]`` int32, contiguous, on the device of ``logits``.
    """
    assert words.is_contiguous()
    if has_kernels(logits.device) and logits.stride(1) == 1:
        # For sixteen masks of 49,152 tokens torch takes 2 ms, this kernel at most 0.1 ms.
        functions().turret_token_mask(
            logits.data_ptr(),
            logits.stride(0),
            logits.shape[1],
            rows.data_ptr(),
            words.data_ptr(),
            rows.shape[0],
            words.shape[1],
        )
        return
    vocab, size = logits.shape[1], 32 * words.shape[1]
    # Unlike filling scattered positions, this takes the same time for all masks.
    codes = words.view(torch.uint8).flatten().int()
    bias = _biases(words.device).index_select(0, codes).view(words.shape[0], size)
    if size < vocab:
        # The mask allows no token beyond its last word, so exclude those logits.
        bias = torch.nn.functional.pad(bias, (0, vocab - size), value=float("-inf"))
    logits.index_add_(0, rows, bias[:, :vocab])


@functools.cache
def _biases(device: torch.device) -> torch.Tensor:
    """``[256, 8]`` fp32: for each byte, its bits from the lowest on: 0 for 1, -inf for 0."""
    # A 32-bit word stores its lowest byte first on every machine that torch supports.
    bits = (torch.arange(256).unsqueeze(-1) >> torch.arange(8)) & 1
    return torch.zeros(256, 8).masked_fill_(bits == 0, float("-inf")).to(device)


def likeliest_tokens(
    logits: torch.Tensor, rows: torch.Tensor | None = None, words: torch.Tensor | None = None
) -> torch.Tensor:
    """Find the token with the largest logit; the first one wins a tie.

    Semantics:
        tokens[i] = argmax over t of logits[rows[i], t] where bit t % 32 of words[i, t // 32] is 1

    Args:
        logits: ``[n, vocab]`` fp32. A NaN counts as larger than all else, as in torch's argmax.
        rows: Indices of rows of ``logits``, ``[rows]`` int64, on its device; None for all rows.
        words: ``[rows, words]`` int32, contiguous, on the device of ``logits``: the allowed tokens;
            None for all. If their logits are all -inf, the token is 0.

    Returns:
        ``[rows]`` int64.
    """
    if has_kernels(logits.device) and logits.stride(1) == 1:
        # For sixteen rows of 49,152 on two processors, torch takes 0.7 ms at best, this kernel 0.16
        # ms.
        if rows is None:
            rows = torch.arange(logits.shape[0])
        assert words is None or words.is_contiguous()
        found = torch.empty(rows.shape[0], dtype=torch.int64)
        functions().turret_likeliest(
            logits.data_ptr(),
            logits.stride(0),
            logits.shape[1],
            rows.data_ptr(),
            rows.shape[0],
            0 if words is None else words.data_ptr(),
            0 if words is None else words.shape[1],
            found.data_ptr(),
        )
        return found
    picked = logits if rows is None else logits.index_select(0, rows)
    if words is not None:
        picked = picked.clone() if rows is None else picked
        apply_token_mask(picked, torch.arange(picked.shape[0], device=picked.device), words)
    return picked.argmax(-1)


# The screen finds the outputs of a wide weight that may be the largest. It reads an int8 copy, half
# as many bytes as the weight has.

# Maximum number of rows of a call. For more, the product with the weight itself is as fast.
MOST_ROWS = 16
_TILE = 32  # outputs
# For weights with fewer outputs, a copy does not pay. AMX's tiles need at least 16 outputs.
_LEAST_OUTPUTS = 256
# At most one output in this many may remain after screening.
_MOST_SHARE = 8
# Maximum number of calls that are skipped after a useless one.
_MOST_PAUSE = 64
# Weights with a larger norm are rejected, because their products with a row may overflow fp32.
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
class _Backoff:
    """Skips calls after a useless one; the number doubles with each consecutive useless call."""

    num_to_skip: int = 0
    next_pause: int = 1
    was_useful: bool = False

    def wants(self) -> bool:
        """Whether to make the next call."""
        if self.num_to_skip:
            self.num_to_skip -= 1
            return False
        if self.was_useful:
            self.was_useful, self.next_pause = False, 1
        return True

    def pause(self) -> None:
        """Record that the last call was useless."""
        self.was_useful = False
        self.num_to_skip = self.next_pause
        self.next_pause = min(2 * self.next_pause, _MOST_PAUSE)


@dataclass(frozen=True, slots=True)
class ScreenCodes:
    """An int8 copy of a weight, the same for all instruction sets (``cpu/c/screen.c``).

    Attributes:
        codes: ``[out, in]`` int8 in tiles; ``out`` is rounded up to whole tiles.
        scales: ``[out]`` fp32, rounded up in the same way.
        bounds: ``[2]`` fp64: ``spread`` and ``length`` of the C code's ``Screen``.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    bounds: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor) -> ScreenCodes:
        """Compute the copy of a weight for which ``Screen.serves`` is true."""
        tiles = -(-weight.shape[0] // _TILE)
        codes = torch.empty(tiles * _TILE, weight.shape[1], dtype=torch.int8)
        scales, facts = torch.empty(tiles * _TILE), torch.empty(tiles, 2, dtype=torch.float64)
        native.functions().turret_screen_codes(
            weight.data_ptr(),
            *weight.shape,
            codes.data_ptr(),
            scales.data_ptr(),
            facts.data_ptr(),
            num_threads(),
        )
        return cls(codes, scales, facts.amax(0))


class Screen:
    """Error bounds for the products of a weight, from its int8 copy (``cpu/c/screen.c``).

    An object must be used in one thread only.

    Args:
        weight: A weight for which ``serves`` is true.
        copy: Its int8 copy; by default, it is computed.

    Raises:
        ValueError: The weight is not finite.
    """

    def __init__(self, weight: torch.Tensor, copy: ScreenCodes | None = None) -> None:
        out_features = weight.shape[0]
        self._copy = copy = copy or ScreenCodes.of(weight)
        spread, length = copy.bounds.tolist()
        if not length <= _MOST_LENGTH:
            raise ValueError("the weight is not finite")
        self._native = _Screen(
            copy.codes.data_ptr(), copy.scales.data_ptr(), *weight.shape, spread, length
        )
        self._found = torch.empty(out_features // _MOST_SHARE, dtype=torch.int64)
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._backoff = _Backoff()

    @staticmethod
    def serves(weight: torch.Tensor) -> bool:
        """Whether there are kernels to screen the weight and to compute the remaining outputs."""
        is_here = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
        fits = weight.shape[0] >= _LEAST_OUTPUTS and weight.shape[1] % 8 == 0
        return is_here and fits and native.isa() not in {None, "baseline"}

    def outputs(self, x: torch.Tensor, slack: float = 0.0) -> torch.Tensor | None:
        """Find the outputs that may be the largest of some row.

        Semantics:
            y = x weightᵀ, rounded to bf16; every o with y[r, o] ≥ max(y[r]) − slack for some r is
            among them

        Args:
            x: ``[rows, in]`` bf16, at most ``MOST_ROWS``.
            slack: The slack above; at least 0.

        Returns:
            ``[outputs]`` int64, ascending, to be used before the next call; None if there are too
            many, a row is not finite, or earlier calls were useless.
        """
        if not self._backoff.wants():
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
            self._backoff.pause()
            return None
        self._backoff.was_useful = True
        return self._found[:count]

    def pause(self) -> None:
        """Record that the last call's result was useless, so that the next calls are skipped."""
        self._backoff.pause()
